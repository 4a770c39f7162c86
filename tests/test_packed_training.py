"""Binary layers on packed bits against the same layers in floats: equal to the last bit, with less kept for backward."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Runner
from safetensors.torch import load_file
from torch import Tensor, nn

from quant import kernels, packed
from quant.saved import saved_bytes
from quant.surgery import quantize_
from quant.xnor import Xnor
from runner.config import IRRELEVANT

CONVS: list[tuple[tuple[int, ...], dict[str, Any]]] = [  # input, arguments of the convolution
    ((2, 32, 8, 8), {"kernel_size": 3, "padding": 1, "bias": False}),
    ((3, 33, 7, 9), {"kernel_size": 3, "stride": 2, "padding": 1}),
    (
        (2, 8, 6, 6),
        {"kernel_size": 1, "stride": 2, "bias": False},
    ),  # not 5: torch 2.15's own, channels last, corrupts memory on AVX2
    ((2, 70, 9, 6), {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0)}),
    ((1, 40, 5, 5), {"kernel_size": 5, "padding": 4}),
    ((2, 2, 6, 6), {"kernel_size": 3, "padding": 1}),
    ((4, 64, 2, 1), {"kernel_size": 1}),
    ((4, 16, 4, 4), {"kernel_size": 4}),
]
LINEARS: list[tuple[int, ...]] = [(16, 40), (3, 5, 33), (1, 64), (7, 1)]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"gradient": "binop", "centre": "graph", "input_scale": True},
    {"gradient": "paper", "input_norm": "none"},
    {"gradient": "ste"},
]


def both(module: nn.Module, **settings: Any) -> tuple[Any, Any]:
    """The same layer on packed bits and in floats."""
    layers = [Xnor(kernel=k, **settings).layer(copy.deepcopy(module)) for k in ("packed", "float")]  # type: ignore[arg-type]
    return layers[0], layers[1]


def facts(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradients and state of one step, and the output of evaluation behind it."""
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(leaf)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y))
    assert leaf.grad is not None
    gradients = [p.grad for p in layer.parameters() if p.grad is not None]
    with torch.no_grad():
        after = layer.eval()(x)
    return [y.detach(), leaf.grad, *gradients, *layer.state_dict().values(), after]


def same(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    for mine, other in zip(facts(ours, x), facts(theirs, x), strict=True):
        assert torch.equal(mine, other)
        assert mine.dim() != 4 or min(mine.shape[1:]) == 1 or mine.stride() == other.stride()


def ordinary(*size: int) -> Tensor:
    """Values on both sides of every threshold, and on it."""
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 1.5
    x.view(-1)[:4] = torch.tensor([0.0, -0.0, 1.0, -1.0])
    return x


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("size", "arguments"), CONVS, ids=str)
def test_a_convolution_is_the_float_one_to_the_last_bit(
    size: tuple[int, ...], arguments: dict[str, Any], settings: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    same(*both(nn.Conv2d(size[1], 20, **arguments), **settings), ordinary(*size))


@pytest.mark.parametrize(("size", "arguments"), CONVS, ids=str)
@pytest.mark.parametrize("whole", [True, False])
def test_so_it_is_in_channels_last(size: tuple[int, ...], arguments: dict[str, Any], whole: bool) -> None:
    """The whole network, or its images only: what a layer answers decides how the next one computes."""
    torch.manual_seed(0)
    module = nn.Conv2d(size[1], 20, **arguments)
    ours, theirs = both(module.to(memory_format=torch.channels_last) if whole else module)
    same(ours, theirs, ordinary(*size).to(memory_format=torch.channels_last))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("size", LINEARS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_the_float_one(size: tuple[int, ...], settings: dict[str, Any], bias: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = both(nn.Linear(size[-1], 20, bias=bias), **settings)
    if size[0] == 1:  # a batch of one cannot be normalised
        ours.norm, theirs.norm = None, None
    same(ours, theirs, ordinary(*size))


@pytest.mark.parametrize("frozen", ["input", "weight"])
def test_what_needs_no_gradient_gets_none_and_keeps_nothing(frozen: str) -> None:
    x, layers = ordinary(2, 32, 8, 8), both(nn.Conv2d(32, 8, 3), input_norm="none")
    grads, kept = [], []
    for layer in layers:
        leaf = x.clone().requires_grad_(frozen != "input")
        layer.weight.requires_grad_(frozen != "weight")
        kept.append(saved_bytes(lambda layer=layer, leaf=leaf: layer(leaf), layer.parameters()))
        layer(leaf).square().sum().backward()
        grads.append(leaf.grad if frozen == "weight" else layer.weight.grad)
        assert (leaf.grad is None, layer.weight.grad is None) == (frozen == "input", frozen == "weight")
    assert torch.equal(*grads)
    assert kept[0] == x.numel() // 8 + 8 * 4  # one bit a value, and alpha
    assert kept[0] < kept[1]


def test_weights_of_zero_are_plus_one() -> None:
    ours, theirs = both(nn.Conv2d(8, 4, 3), input_norm="none")
    for layer in (ours, theirs):
        with torch.no_grad():
            layer.weight[0] = 0
            layer.weight[1, 0] = -0.0
    same(ours, theirs, ordinary(2, 8, 6, 6))


def test_two_bits_a_value_are_kept_and_no_second_weight() -> None:
    x = ordinary(4, 64, 8, 8).requires_grad_()
    ours, theirs = both(nn.Conv2d(64, 64, 3, padding=1), input_norm="none")
    kept, before = (saved_bytes(lambda m=m: m(x), m.parameters()) for m in (ours, theirs))
    assert kept == 2 * x.numel() // 8 + 64 * 4
    assert before == 2 * x.numel() // 8 + 4 * ours.weight.numel()


# ---- where floats stay


@pytest.mark.parametrize(
    ("module", "settings", "reason"),
    [
        (nn.Conv2d(8, 8, 3, groups=2), {}, "groups 2"),
        (nn.Conv2d(8, 8, 3, dilation=(1, 2)), {}, "dilation 1 x 2"),
        (nn.Linear(8, 8), {"ste": "bireal"}, "ste bireal"),
        (nn.Linear(8, 8), {"binary_activations": False}, "activations are float"),
    ],
)
def test_what_a_layer_forbids_is_said_or_refused(module: nn.Module, settings: dict[str, Any], reason: str) -> None:
    (row,) = quantize_(nn.Sequential(copy.deepcopy(module)), Xnor(**settings))
    assert row.why == (f"float kernel: {reason}" if settings.get("binary_activations", True) else "")
    with pytest.raises(ValueError, match=f"{reason}.*accepted: auto, float"):
        Xnor(kernel="packed", **settings).layer(module)


def test_the_table_says_what_runs_packed() -> None:
    for kernel, said in (("auto", "packed bits (float32 on a CPU)"), ("float", "float kernel: as set")):
        (row,) = quantize_(nn.Sequential(nn.Conv2d(8, 8, 3)), Xnor(kernel=kernel))  # type: ignore[arg-type]
        assert row.why == said


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The outputs of the packed function, as they are made."""
    outputs: list[Tensor] = []
    real = packed.product_of_signs
    monkeypatch.setattr(packed, "product_of_signs", lambda *a: outputs.append(real(*a)) or outputs[-1])
    return outputs


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_fall_back(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, conv = counted(monkeypatch), nn.Conv2d(8, 4, 3)
    Xnor().layer(copy.deepcopy(conv))(ordinary(2, 8, 5, 5))
    assert len(outputs) == 1
    x = ordinary(2, 8, 5, 5).to(dtype)
    auto, plain = (Xnor(kernel=k).layer(copy.deepcopy(conv).to(dtype)) for k in ("auto", "float"))  # type: ignore[arg-type]
    assert torch.equal(auto(x), plain(x))
    with pytest.raises(ValueError, match=f"tensors of {dtype} on cpu"):
        Xnor(kernel="packed").layer(conv.to(dtype))(x)
    assert len(outputs) == 1


def test_autocast_leaves_the_product_as_exact_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, layer = counted(monkeypatch), Xnor(input_norm="none").layer(nn.Conv2d(8, 4, 3))
    for x in (ordinary(2, 8, 5, 5), ordinary(2, 8, 5, 5).bfloat16()):
        want = layer(x.float())
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.float32
        assert torch.equal(y, want)
    assert len(outputs) == 4


def test_empty_batches_and_meta_tensors_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, layer = counted(monkeypatch), Xnor(input_norm="none").layer(nn.Conv2d(8, 4, 3))
    assert layer(torch.empty(0, 8, 5, 5)).shape == (0, 4, 3, 3)
    assert layer(ordinary(8, 5, 5)).shape == (4, 3, 3)
    assert layer.to("meta")(torch.empty(2, 8, 5, 5, device="meta")).shape == (2, 4, 3, 3)
    assert not outputs


UNCLEAR = [
    (ordinary(2, 1, 6, 6), False),
    (ordinary(4, 8, 1, 1), False),
    (ordinary(2, 8, 6, 12)[..., ::2], False),
    (ordinary(2, 8, 6, 6), True),
]


@pytest.mark.parametrize(("x", "weight_last"), UNCLEAR)
def test_a_memory_format_that_is_not_clear_falls_back(
    x: Tensor, weight_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There floats would order their sums otherwise behind the packed kernel than behind their own."""
    outputs, conv = counted(monkeypatch), nn.Conv2d(x.shape[1], 4, 1)
    if weight_last:
        conv = conv.to(memory_format=torch.channels_last)
    settings: list[Any] = [{"kernel": kernel, "input_norm": "none"} for kernel in ("auto", "float")]
    auto, plain = (Xnor(**s).layer(copy.deepcopy(conv)) for s in settings)
    assert torch.equal(auto(x), plain(x))
    assert not outputs


def test_a_compiled_or_exported_layer_is_one_graph_of_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, layer, x = counted(monkeypatch), Xnor(input_norm="none").layer(nn.Conv2d(8, 4, 3)), ordinary(2, 8, 5, 5)
    graph = torch.compile(layer, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(layer.eval(), (x,)).module()
    answers = [graph(x), exported(x)]
    assert not outputs
    assert all(torch.equal(answer, layer(x)) for answer in answers)
    assert len(outputs) == 2


def test_without_numba_floats_stay(tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text("raise ImportError('no Numba in this test')\n")
    code = (
        "import torch; from torch import nn; from quant.xnor import Xnor; l = Xnor().layer(nn.Linear(4, 2));"
        "print(l.remark, l(torch.ones(3, 4)).shape)"
    )
    paths = os.pathsep.join([str(tmp_path), str(Path(kernels.__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=True
    )
    assert "float kernel: the packed kernels need Numba" in done.stdout
    assert "[3, 2]" in done.stdout


# ---- a whole run


def test_a_run_writes_the_same_numbers(runner: Runner, tmp_path: Path) -> None:
    """metrics.csv is the same to the byte, the weights to the last bit, and the run has one name."""
    assert "kernel" in IRRELEVANT["quant.arguments"]
    runs = []
    for kernel in ("packed", "float"):
        words = ["model=resnet", "dataset.limit=64", "epochs=2", "trainer.threads=1", "trainer.dashboard=none"]
        done = runner(*words, f"quant.kernel={kernel}", f"outputs={tmp_path / kernel}", timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        (run,) = (tmp_path / kernel / "runs").iterdir()
        runs.append(run)
    assert runs[0].name == runs[1].name
    assert (runs[0] / "metrics.csv").read_bytes() == (runs[1] / "metrics.csv").read_bytes()
    first, second = (load_file(run / "weights.safetensors") for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first | second)
    assert (runs[0] / "metrics.csv").read_text().count("\n") == 3
    assert "packed bits" in (runs[0] / "layers.csv").read_text()


@pytest.mark.parametrize("module", [nn.Linear(32, 4), nn.Conv2d(32, 4, 1)])
def test_what_follows_may_work_in_place(module: nn.Module) -> None:
    x = torch.randn(2, 32) if isinstance(module, nn.Linear) else torch.randn(2, 32, 3, 3)
    results = []
    for inplace in (True, False):
        net = nn.Sequential(Xnor().layer(copy.deepcopy(module)), nn.ReLU(inplace))
        net(x).sum().backward()
        results.append(net[0].weight.grad)
    assert torch.equal(*results)
