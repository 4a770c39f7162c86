"""The packed kernels against torch's own convolution of the signs, to the last bit, on every code path of this processor."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from quant import kernels
from quant.kernels import reference
from quant.kernels.layers import prepared
from quant.kernels.machine import PATH_VARIABLE, Processor, cache_folder, processors

PATHS = processors()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sign(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0)


def values(*shape: int, channels_last: bool = False) -> Tensor:
    """Normal numbers with many exact 0.0, -0.0, 1.0 and -1.0 among them."""
    x = torch.randn(shape)
    special = torch.tensor([0.0, -0.0, 1.0, -1.0])[torch.randint(0, 4, shape)]
    x = torch.where(torch.rand(shape) < 0.2, special, x)
    return x.to(memory_format=torch.channels_last) if channels_last else x


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, int]:
    sizes = {
        "batch": (1, 4), "channels": (1, 130), "out_channels": (1, 70), "kernel_height": (1, 6), "kernel_width": (1, 6),
        "stride_height": (1, 3), "stride_width": (1, 3), "padding_height": (0, 6), "padding_width": (0, 6),
        "height": (1, 20), "width": (1, 40), "seed": (0, 9999),
    }  # fmt: skip
    case = {name: draw(st.integers(*bounds)) for name, bounds in sizes.items()}
    for side in ("height", "width"):  # the kernel has to fit on the padded image
        case[side] = max(case[side], case[f"kernel_{side}"] - 2 * case[f"padding_{side}"], 1)
    return case


@pytest.mark.parametrize("path", PATHS)
@given(convolutions(), st.booleans(), st.sampled_from([None, False, True]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_convolution_is_exact(path: Processor, case: dict[str, int], last: bool, out_last: bool | None) -> None:
    torch.manual_seed(case["seed"])
    x = values(case["batch"], case["channels"], case["height"], case["width"], channels_last=last)
    w = values(case["out_channels"], case["channels"], case["kernel_height"], case["kernel_width"])
    stride = (case["stride_height"], case["stride_width"])
    padding = (case["padding_height"], case["padding_width"])
    scale, bias = torch.rand(len(w)), torch.randn(len(w))
    packed = kernels.pack_weight(w, padding, path=path)
    expected = F.conv2d(sign(x), sign(w), stride=stride, padding=padding)
    got = kernels.binary_conv2d(x, packed, stride=stride, channels_last=out_last)
    assert torch.equal(got, expected)
    scaled = kernels.binary_conv2d(x, packed, scale=scale, bias=bias, stride=stride)
    assert torch.equal(scaled, expected * scale.view(-1, 1, 1) + bias.view(-1, 1, 1))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("batch", "channels", "out_channels", "size", "kernel", "padding", "stride"),
    [(512, 40, 24, 5, 3, 1, 1), (1, 256, 256, 14, 3, 1, 1), (1, 1024, 8, 20, 20, 10, 1), (2, 3, 500, 150, 1, 0, 2),
     (1, 5000, 17, 14, 14, 1, 1)],
)  # fmt: skip
def test_extreme_shapes_are_exact(
    path: Processor, batch: int, channels: int, out_channels: int, size: int, kernel: int, padding: int, stride: int
) -> None:
    """Large batches; sums beyond 65,535, where 16 bits overflow; rows longer than a band; kernels too wide for avx2."""
    x, w = values(batch, channels, size, size), values(out_channels, channels, kernel, kernel)
    got = kernels.binary_conv2d(x, kernels.pack_weight(w, padding, path=path), stride=stride)
    assert torch.equal(got, F.conv2d(sign(x), sign(w), stride=stride, padding=padding))


@pytest.mark.parametrize("path", PATHS)
def test_extreme_sums_are_exact(path: Processor) -> None:
    """All signs different: every popcount is as large as it can be."""
    x, w = torch.ones(1, 2048, 7, 7), -torch.ones(40, 2048, 7, 7)
    got = kernels.binary_conv2d(x, kernels.pack_weight(w, 3, path=path))
    assert torch.equal(got, F.conv2d(x, w, padding=3))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(1, 7), (300, 64), (2, 5, 1000)])
def test_linear_is_exact(path: Processor, shape: tuple[int, ...]) -> None:
    x, w, bias = values(*shape), values(19, shape[-1]), torch.randn(19)
    got = kernels.binary_linear(x, kernels.pack_weight(w, path=path), bias=bias)
    assert torch.equal(got, F.linear(sign(x), sign(w)) + bias)


SHAPES = [(1, 1, 1, 1), (2, 70, 5, 7), (3, 32, 9, 9), (4, 33, 1, 1), (2, 64, 40, 40), (1, 3, 1, 130)]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_equal_their_slow_twin(shape: tuple[int, int, int, int], channels_last: bool) -> None:
    x, grad = values(*shape, channels_last=channels_last), torch.randn(shape)
    signs, inside = kernels.pack_with_mask(x)
    assert torch.equal(kernels.pack_activations(x), signs)
    assert torch.equal(signs, reference.pack_activations(x))
    assert torch.equal(inside, reference.pack_with_mask(x)[1])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        unpacked = kernels.unpack_signs(signs, shape, dtype)
        assert torch.equal(unpacked, sign(x).to(dtype))
        assert torch.equal(unpacked, reference.unpack_signs(signs, shape, dtype))
    assert torch.equal(kernels.masked(grad, inside), torch.where(x.abs() <= 1, grad, 0.0))
    assert torch.equal(reference.masked(grad, inside), torch.where(x.abs() <= 1, grad, 0.0))


def test_slow_convolution_is_exact() -> None:
    x, w = values(2, 70, 6, 9), values(5, 70, 3, 2)
    expected = F.conv2d(sign(x), sign(w), stride=(2, 1), padding=(1, 2))
    assert torch.equal(reference.binary_conv2d(x, w, stride=(2, 1), padding=(1, 2)), expected)


def test_nan_is_outside_the_window() -> None:
    """A NaN lies in no window, so its gradient is masked as torch.where(|x| <= 1, g, 0) masks it."""
    x = torch.tensor([float("nan"), float("inf"), -1.0, 1.0]).view(1, 1, 2, 2)
    _, inside = kernels.pack_with_mask(x)
    assert inside.flatten().tolist() == [0, 0, 1, 1]


def test_nothing_in_nothing_out() -> None:
    weight = kernels.pack_weight(torch.randn(4, 8, 3, 3), 1)
    assert kernels.binary_conv2d(torch.randn(0, 8, 5, 4), weight, stride=2).shape == (0, 4, 3, 2)
    once, out = prepared(kernels.pack_activations(torch.randn(0, 8, 5, 4)), weight)
    once()
    assert out.shape == (0, 4, 5, 4)
    flat = kernels.pack_weight(torch.randn(4, 8))
    assert kernels.binary_linear(torch.randn(0, 8), flat).shape == (0, 4)
    assert kernels.binary_linear(torch.randn(2, 0, 8), flat).shape == (2, 0, 4)


def test_strided_and_shared_tensors() -> None:
    """Views are copied first; the packed bits of a view of a batch are the view of the packed bits."""
    x, w = values(6, 40, 9, 9), values(8, 40, 3, 3)
    view = x[::2, :, :, 1:8].transpose(2, 3)
    expected = F.conv2d(sign(view), sign(w), padding=1)
    assert torch.equal(kernels.binary_conv2d(view, kernels.pack_weight(w, 1)), expected)
    part = kernels.pack_activations(x)[2:4]
    expected = F.conv2d(sign(x[2:4]), sign(w), padding=1)
    assert torch.equal(kernels.conv2d_of_packed(part, kernels.pack_weight(w, 1)), expected)
    odd = kernels.pack_activations(x)[:, :, 1:8:2]
    expected = F.conv2d(sign(x[:, :, 1:8:2]), sign(w), padding=1)
    assert torch.equal(kernels.conv2d_of_packed(odd, kernels.pack_weight(w, 1)), expected)


@pytest.mark.parametrize("channels_last", [False, True])
def test_output_of_the_caller(channels_last: bool) -> None:
    x, w, out = values(2, 40, 9, 9), values(8, 40, 3, 3), torch.zeros(2, 8, 9, 9)
    out = out.to(memory_format=torch.channels_last) if channels_last else out
    assert kernels.binary_conv2d(x, kernels.pack_weight(w, 1), out=out) is out
    assert torch.equal(out, F.conv2d(sign(x), sign(w), padding=1))
    with pytest.raises(ValueError, match="dense float32"):
        kernels.binary_conv2d(x, kernels.pack_weight(w), out=out)


def test_several_threads_and_callers() -> None:
    """A team of OpenMP threads gives the same result, also when Python threads call at the same time."""
    torch.set_num_threads(2)
    x, w = values(4, 96, 17, 19), values(130, 96, 3, 3)
    expected, packed = F.conv2d(sign(x), sign(w), padding=1), kernels.pack_weight(w, 1)
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(5):
            if not torch.equal(kernels.binary_conv2d(x, packed), expected):
                wrong.append(number)

    callers = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


FORK = """
import os, torch
torch.set_num_threads(2)
from torch.nn import functional as F
from quant import kernels
x, w = torch.randn(8, 64, 16, 16), torch.randn(64, 64, 3, 3)
sign = lambda t: torch.where(t >= 0, 1.0, -1.0)
expected = F.conv2d(sign(x), sign(w), padding=1)
packed = kernels.pack_weight(w, 1)
assert torch.equal(kernels.binary_conv2d(x, packed), expected)
child = os.fork()
if child == 0:
    os._exit(0 if bool((kernels.binary_conv2d(x, packed).numpy() == expected.numpy()).all()) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(kernels.binary_conv2d(x, packed), expected)
"""

OTHER_PROCESSOR = """
import torch
from torch.nn import functional as F
from quant import kernels
x, w = torch.randn(2, 70, 9, 11), torch.randn(37, 70, 3, 3)
sign = lambda t: torch.where(t >= 0, 1.0, -1.0)
got = kernels.binary_conv2d(x, kernels.pack_weight(w, 1), stride=2)
assert torch.equal(got, F.conv2d(sign(x), sign(w), stride=2, padding=1))
signs, inside = kernels.pack_with_mask(x)
assert torch.equal(kernels.unpack_signs(signs, x.shape), sign(x))
assert torch.equal(kernels.masked(x, inside), torch.where(x.abs() <= 1, x, 0))
print(kernels.available())
"""


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_works_alone() -> None:
    run_python(FORK)


@pytest.mark.skipif("avx2" not in PATHS, reason="needs an x86 processor with AVX2")
@pytest.mark.parametrize(
    ("name", "features", "path"),
    [("haswell", "+avx2,+avx,+fma,+popcnt", "avx2"), ("x86-64", "+sse2", "portable")],
)
def test_code_for_older_processors(name: str, features: str, path: str) -> None:
    """Compiled without AVX-512, and without AVX: then LLVM has to spell out popcounts and masks."""
    assert run_python(OTHER_PROCESSOR, NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES=features) == path


def test_without_numba_the_reason_is_one_line() -> None:
    code = "import sys; sys.modules['numba'] = None\nfrom quant import kernels\nprint(kernels.why_not())"
    reason = run_python(code)
    assert "Numba" in reason
    assert "\n" not in reason


def test_a_folder_that_cannot_be_written_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the kernels compile in every process: cache_folder() is None."""
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert cache_folder.__wrapped__() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert str(cache_folder.__wrapped__()).startswith(str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["scale", "bias"])
@pytest.mark.parametrize("count", [1, 2, 4, 32, 40])
def test_one_number_for_each_output_channel_and_no_other_count(name: str, count: int) -> None:
    """What is missing would be a zero, and what is too much belongs to no channel."""
    packed, numbers = kernels.pack_weight(torch.randn(3, 40, 3, 3)), {name: torch.ones(count)}
    with pytest.raises(ValueError, match=f"{name} has {count} numbers; accepted: one for each of 3 channels"):
        kernels.binary_conv2d(torch.randn(1, 40, 5, 5), packed, **numbers)


@pytest.mark.parametrize(("given", "taken"), [(32, 3), (33, 64), (23, 24), (65, 40)])
def test_as_many_channels_as_the_weight_and_no_other_count(given: int, taken: int) -> None:
    """Also where both counts fill the same number of words."""
    both = rf"x has {given} channels; accepted: the {taken} of the weight"
    with pytest.raises(ValueError, match=both):
        kernels.binary_conv2d(torch.randn(1, given, 8, 8), kernels.pack_weight(torch.randn(16, taken, 3, 3), 1))
    with pytest.raises(ValueError, match=both):
        kernels.binary_linear(torch.randn(5, given), kernels.pack_weight(torch.randn(16, taken)))


def test_a_linear_layer_takes_no_window() -> None:
    """A kernel of 3 x 3 would add up neighbouring rows."""
    with pytest.raises(ValueError, match=r"kernel of \(3, 3\) and padding \(1, 1\)"):
        kernels.binary_linear(torch.randn(5, 24), kernels.pack_weight(torch.randn(16, 24, 3, 3), 1))


@pytest.mark.parametrize("padding", [-1, (-1, 1), (1, -2)])
def test_a_padding_below_zero_is_refused(padding: int | tuple[int, int]) -> None:
    """The kernel would read beside the image."""
    with pytest.raises(ValueError, match=r"padding: .*-\d.*, accepted: 0 or more"):
        kernels.pack_weight(torch.randn(40, 24, 3, 3), padding)


@pytest.mark.parametrize("stride", [0, -1, (1, 0)])
@pytest.mark.parametrize("images", [0, 2])
def test_a_stride_below_one_is_refused(stride: int | tuple[int, int], images: int) -> None:
    with pytest.raises(ValueError, match=r"stride: .*, accepted: 1 or more"):
        kernels.binary_conv2d(
            torch.randn(images, 24, 9, 9), kernels.pack_weight(torch.randn(40, 24, 3, 3)), stride=stride
        )


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    x, packed = torch.randn(1, 40, 5, 5), kernels.pack_weight(torch.randn(3, 40, 3, 3))
    with pytest.raises(ValueError, match="float32"):
        kernels.binary_conv2d(x.double(), packed)
    with pytest.raises(ValueError, match=r"accepted torch\.int32"):
        kernels.conv2d_of_packed(kernels.pack_activations(torch.randn(1, 64 + 1, 5, 5)), packed)
    with pytest.raises(ValueError, match="does not fit"):
        kernels.binary_conv2d(x[:, :, :2], packed)
    with pytest.raises(ValueError, match="shape"):
        kernels.pack_weight(torch.randn(3))
    with pytest.raises(ValueError, match="bfloat16"):
        kernels.unpack_signs(kernels.pack_activations(x), x.shape, torch.float64)
    monkeypatch.setenv(PATH_VARIABLE, "mmx")
    assert "accepted" in str(kernels.why_not())
