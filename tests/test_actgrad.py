"""Weight gradients from quantized activations: what is exact is exact, what is approximate is what the formulas say."""

import copy
import dataclasses
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from quant.actgrad import ActGrad, CodedConv2d, PlacedMaxPool2d
from quant.base import find
from quant.codecs import PowerOfTwo, Uniform
from quant.frugal import Window, max_pool2d, relu
from quant.saved import saved_bytes_per_sample
from quant.surgery import Rule, quantize_

GOLDEN = np.load(Path(__file__).parent / "golden" / "weight_gradient_from_quantized_activations.npz")
SCHEMES = [(s, b, r) for s, b, r in product(("uniform", "power_of_two"), (1, 2, 4, 8), ("nearest", "stochastic"))
           if (s, b) != ("power_of_two", 1)]  # fmt: skip


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def network(*, norm: bool = False, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Every layer that the method handles: strides, dilation, groups, padding, overlapping windows, without and with a bias."""
    torch.manual_seed(1)
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    layers += [nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
    layers += [nn.Conv2d(8, 6, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 5)]
    if norm:
        layers = [
            x for m in layers for x in ((m, nn.BatchNorm2d(m.out_channels)) if isinstance(m, nn.Conv2d) else (m,))
        ]
    return nn.Sequential(*layers).to(dtype)


def step(net: nn.Module, x: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, error of the input, gradients of the parameters."""
    torch.manual_seed(seed)
    net.zero_grad()
    x = x.detach().requires_grad_()
    y = net(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad, {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def quantized(net: nn.Module, **fields: object) -> nn.Module:
    net = copy.deepcopy(net)
    quantize_(net, ActGrad(**fields))  # type: ignore[arg-type]
    return net


# ------------------------------------------------------------------ the method


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_golden(bits: int) -> None:
    layer = nn.Conv2d(3, 5, 3, padding=2, bias=False).double()
    layer.weight.data = torch.tensor(GOLDEN["weight"])
    layer = CodedConv2d(layer, ActGrad(bits=bits, rounding="nearest", group=None))  # type: ignore[arg-type]
    x = torch.tensor(GOLDEN["x"], requires_grad=True)
    y = layer(x)
    y.backward(torch.tensor(GOLDEN["grad_output"]))
    codec = layer.settings.codec(x)
    for measured, name in [(y, "y"), (x.grad, "grad_x"), (layer.weight.grad, f"grad_weight_{bits}"),
                           (codec.decode(*codec.encode(x.detach())), f"x_quantized_{bits}")]:  # fmt: skip
        np.testing.assert_allclose(measured.detach().numpy(), GOLDEN[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("scheme", "bits", "rounding"), SCHEMES)
def test_forward_error_and_bias_gradients_are_those_of_float_training(scheme: str, bits: int, rounding: str) -> None:
    plain, x = network(), seeded(4, 3, 19, 19)
    coded = quantized(plain, scheme=scheme, bits=bits, rounding=rounding, group=16)
    (y, dx, grads), (y_plain, dx_plain, grads_plain) = step(coded, x), step(plain, x)
    assert torch.equal(y, y_plain)
    assert torch.equal(dx, dx_plain)
    for name, grad in grads_plain.items():
        if name.endswith("bias"):
            torch.testing.assert_close(grads[name], grad, rtol=1e-12, atol=1e-12)
        else:
            assert not torch.equal(grads[name], grad), "weight gradients are made from the codes"


@pytest.mark.parametrize("scheme", ["uniform", "power_of_two"])
def test_weight_gradients_are_the_error_times_the_quantized_input(scheme: str) -> None:
    """The definition by hooks: record the input and the error of each layer, quantize the input, multiply."""
    plain, x = network(), seeded(4, 3, 19, 19)
    coded = quantized(plain, scheme=scheme, bits=4, rounding="nearest", group=32)
    settings_, expected = ActGrad(scheme=scheme, rounding="nearest", group=32), {}  # type: ignore[arg-type]

    def record(name: str, layer: nn.Conv2d | nn.Linear, y: Tensor, output: Tensor) -> None:
        codec = settings_.codec(y)
        q = codec.decode(*codec.encode(y.detach())).requires_grad_(False)

        def multiply(delta: Tensor) -> None:
            w = layer.weight.detach().requires_grad_()
            with torch.enable_grad():
                same = F.linear(q, w) if isinstance(layer, nn.Linear) else layer._conv_forward(q, w, None)
            expected[f"{name}.weight"] = torch.autograd.grad(same, w, delta)[0]

        output.register_hook(multiply)

    for name, layer in plain.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(lambda layer, x, y, name=name: record(name, layer, x[0], y))
    step(plain, x)
    gradients = step(coded, x)[2]
    assert len(expected) == 5
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("scheme", "bits"), [("uniform", 1), ("uniform", 2), ("uniform", 4), ("power_of_two", 4)])
def test_the_mean_of_stochastic_weight_gradients_is_the_exact_one(scheme: str, bits: int) -> None:
    plain, x, draws = nn.Sequential(nn.Conv2d(4, 8, 3, padding=2, groups=2).double()), seeded(4, 4, 9, 9).abs(), 300
    exact = step(plain, x)[2]["0.weight"]
    coded = quantized(plain, scheme=scheme, bits=bits, group=100)
    samples = torch.stack([step(coded, x, seed)[2]["0.weight"] for seed in range(draws)])
    deviation = (samples.mean(0) - exact) / (samples.std(0) / draws**0.5)
    assert deviation.abs().max() < 4.5, "in standard errors, over 144 weights"
    assert (samples.mean(0) - exact).norm() < 0.12 * (samples[0] - exact).norm()


def test_variance_of_the_weight_gradient_stays_below_its_bound() -> None:
    """Var(dW_ji) <= step^2 / 4 sum_n delta_jn^2, for a linear layer."""
    x, delta, draws = seeded(64, 10), seeded(64, 3, seed=1), 400
    layer = quantized(nn.Sequential(nn.Linear(10, 3).double()), bits=2, group=None)
    samples = []
    for seed in range(draws):
        torch.manual_seed(seed)
        layer.zero_grad()
        layer(x).backward(delta)
        samples.append(layer[0].weight.grad.clone())  # type: ignore[index, union-attr]
    bound = ((x.max() - x.min()) / 3) ** 2 / 4 * delta.square().sum(0)
    variance = torch.stack(samples).var(0)
    assert (variance <= 1.25 * bound.unsqueeze(1)).all(), "a quarter above it for 400 draws"
    assert variance.mean() > 0.2 * bound.mean()


# ------------------------------------------------------------------ codecs


@given(st.integers(0, 999), st.sampled_from([1, 2, 4, 8]), st.sampled_from([None, 1, 3, 16, 1000]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_uniform_codes_are_within_a_step_and_keep_both_ends(
    seed: int, bits: int, group: int | None, random: bool
) -> None:
    x = seeded(3, 7, 2, 5, seed=seed)
    codec = Uniform.of(x, bits, stochastic=random, group=group)
    packed, lo, widths = codec.encode(x)
    q = codec.decode(packed, lo, widths)
    size = x.numel() if group is None else min(group, x.numel())
    assert packed.numel() <= -(-(-(-x.numel() // size) * size) * bits // 8)
    for i, (a, b) in enumerate(zip(x.flatten().split(size), q.flatten().split(size), strict=True)):
        width = (a.max() - a.min()) / (2**bits - 1)
        assert (a - b).abs().max() <= width * (1 if random else 0.5) + 1e-12
        torch.testing.assert_close(b[a.argmin()], a.min(), rtol=0, atol=1e-12)
        torch.testing.assert_close(b[a.argmax()], a.max(), rtol=0, atol=1e-12)
        torch.testing.assert_close(widths[i, 0], width, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("bits", "smallest"), [(2, -1), (4, -13), (8, -60)])
def test_powers_of_two_by_their_formula(bits: int, smallest: int) -> None:
    """sign(y) 2^round(log2 |y|) where the exponent is among the highest, zero below; the sign costs half of the exponents."""
    magnitude = torch.exp2(seeded(2000).abs() * -6)
    signed = seeded(2000, seed=3).sign() * magnitude
    for y, highest in ((magnitude, 2**bits - 1), (signed, 2 ** (bits - 1) - 1)):
        exponent = y.abs().log2().round()
        lowest = exponent.max() - highest + 1
        expected = torch.where(exponent < lowest, 0.0, y.sign() * torch.exp2(exponent))
        codec = PowerOfTwo.of(y, bits)
        assert torch.equal(codec.decode(*codec.encode(y)), expected)
        assert (expected == 0).any() == (exponent.min() < lowest)


@pytest.mark.parametrize("kind", [Uniform, PowerOfTwo])
@pytest.mark.parametrize("sign", [False, True])
def test_the_expectation_of_stochastic_codes_is_the_value(kind: type[Uniform] | type[PowerOfTwo], sign: bool) -> None:
    y = seeded(50) if sign else seeded(50).abs()
    draws = y.expand(20_000, 50).contiguous()
    torch.manual_seed(0)
    codec = kind.of(draws, 2, stochastic=True, group=50)
    q = codec.decode(*codec.encode(draws))
    assert ((q.mean(0) - y) / (q.std(0) / 20_000**0.5 + 1e-9)).abs().max() < 4.5
    assert len(q.unique()) > 2


@pytest.mark.parametrize("kind", [Uniform, PowerOfTwo])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_extremes_stay_finite(kind: type[Uniform] | type[PowerOfTwo], dtype: torch.dtype) -> None:
    numbers = torch.finfo(dtype)
    for values in ([0.0], [7.0], [-7.0], [numbers.max], [-numbers.max, numbers.max], [numbers.tiny, 0.0],
                   [numbers.smallest_normal / 2, -numbers.tiny], [numbers.max, numbers.tiny, 0.0]):  # fmt: skip
        x = torch.tensor(values * 10, dtype=dtype)
        for bits, random, group in product((2, 8), (False, True), (None, 3)):
            codec = kind.of(x, bits, stochastic=random, group=group)
            q = codec.decode(*codec.encode(x))
            assert q.isfinite().all()
            if values in ([0.0], [7.0], [-7.0]) and kind is Uniform:
                assert torch.equal(q, x.to(q.dtype))


@pytest.mark.parametrize("kind", [Uniform, PowerOfTwo])
def test_codes_do_not_depend_on_how_a_tensor_lies_in_memory(kind: type[Uniform] | type[PowerOfTwo]) -> None:
    x = seeded(2, 6, 4, 4)
    expected = (codec := kind.of(x, 4)).decode(*codec.encode(x))
    for view in (
        x.to(memory_format=torch.channels_last),
        x.transpose(1, 3).contiguous().transpose(1, 3),
        x.mT.clone().mT,
    ):
        codec = kind.of(view, 4)
        assert torch.equal(codec.decode(*codec.encode(view)), expected)


# ------------------------------------------------------------------ ReLU, max pool, batch norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["plain", "channels_last", "strided"])
def test_relu_is_torchs(dtype: torch.dtype, form: str) -> None:
    x = seeded(2, 3, 5, 7, dtype=dtype)
    x[x.abs() < 0.3] = 0.0
    x[0, 0, 0, :3] = torch.tensor([-0.0, float("inf"), float("-inf")])
    x = {"plain": x, "channels_last": x.to(memory_format=torch.channels_last), "strided": x[..., ::2]}[form]
    g = seeded(*x.shape, seed=1, dtype=dtype)
    a, b = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    ours, torchs = relu(a), F.relu(b)
    ours.backward(g)
    torchs.backward(g)
    assert torch.equal(ours, torchs)
    assert torch.equal(a.grad, b.grad)


KERNEL = st.tuples(st.integers(1, 4), st.integers(1, 4))


@given(
    KERNEL,
    KERNEL,
    KERNEL,
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_max_pool_is_torchs(kernel, stride, padding, dilation, ceil_mode: bool, last: bool, seed: int) -> None:
    """Whole numbers from -2 to 2 so that most windows hold ties; overlapping windows, padding, dilation, both memory orders."""
    padding = tuple(min(p - 1, k // 2) for p, k in zip(padding, kernel, strict=True))
    size = (9, 6)
    assume(all(s + 2 * p > d * (k - 1) for s, p, d, k in zip(size, padding, dilation, kernel, strict=True)))
    pool = nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil_mode)
    x = seeded(2, 3, *size, seed=seed).round().clamp(-2, 2)
    x = x.to(memory_format=torch.channels_last) if last else x
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, torchs = max_pool2d(a, Window.of(pool)), pool(b)
    g = seeded(*torchs.shape, seed=seed)
    ours.backward(g)
    torchs.backward(g)
    assert torch.equal(ours, torchs)
    assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize(
    ("kernel", "bits"), [(1, 1), (2, 2), (3, 4), ((4, 4), 4), ((2, 1), 1), (5, 8), (16, 8), (17, None)]
)
def test_bits_of_a_place(kernel: int | tuple[int, int], bits: int | None) -> None:
    pool = nn.MaxPool2d(kernel)
    assert Window.of(pool).bits == bits
    assert isinstance(ActGrad().layer(pool), PlacedMaxPool2d) == (bits is not None)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 3, 8, 8)])
def test_max_pool_takes_one_image_or_a_batch(shape: tuple[int, ...]) -> None:
    x = seeded(*shape).requires_grad_()
    layer = PlacedMaxPool2d(nn.MaxPool2d(2, padding=1))
    layer(x).square().sum().backward()
    assert torch.equal(x.grad, torch.autograd.grad(F.max_pool2d(x, 2, padding=1).square().sum(), x)[0])


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(16, 5, 6, 6), (16, 5), (16, 5, 7)])
def test_quantized_norm_follows_its_formula(shape: tuple[int, ...], affine: bool) -> None:
    x, g = seeded(*shape).mul(3).add(1).requires_grad_(), seeded(*shape, seed=1)
    plain = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(5, affine=affine).double()
    gain = seeded(5, seed=2) if affine else torch.ones(5).double()
    if affine:
        plain.weight.data.copy_(gain)
    coded = ActGrad(norm="quantized", bits=2, rounding="nearest", group=None).layer(copy.deepcopy(plain))
    assert coded is not None
    y = coded(x)
    y.backward(g)
    assert torch.equal(y, plain(x))
    assert all(torch.equal(ours, torchs) for ours, torchs in zip(coded.buffers(), plain.buffers(), strict=True))
    dims, wide = [d for d in range(len(shape)) if d != 1], (-1, *[1] * (len(shape) - 2))
    sigma = (x.var(dims, correction=0) + plain.eps).sqrt().view(wide)
    normal = ((x - x.mean(dims, keepdim=True)) / sigma).detach()
    codec = coded.settings.codec(normal)
    q = codec.decode(*codec.encode(normal))
    expected = gain.view(wide) / sigma * (g - g.mean(dims, keepdim=True) - q * (g * q).mean(dims, keepdim=True))
    torch.testing.assert_close(x.grad, expected.detach(), rtol=1e-10, atol=1e-10)
    if affine:
        torch.testing.assert_close(coded.weight.grad, (g * q).sum(dims), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(coded.bias.grad, g.sum(dims), rtol=1e-10, atol=1e-10)


def test_quantized_norm_comes_close_to_the_exact_error() -> None:
    plain, x = network(norm=True), seeded(8, 3, 19, 19)
    exact = step(plain, x)[1]
    errors = [
        ((step(quantized(plain, norm="quantized", bits=b), x)[1] - exact).norm() / exact.norm()).item()
        for b in (2, 4, 8)
    ]
    assert errors[2] < 0.01 < errors[1] < errors[0] < 1
    torch.testing.assert_close(step(quantized(plain, bits=2), x)[1], exact, rtol=1e-12, atol=1e-12)


def test_quantized_norm_in_eval_mode_and_with_one_value() -> None:
    plain = network(norm=True)
    step(plain, seeded(8, 3, 19, 19))
    coded = quantized(plain, norm="quantized")
    coded.eval(), plain.eval()
    assert torch.equal(coded(seeded(2, 3, 19, 19)), plain(seeded(2, 3, 19, 19)))
    norm = ActGrad(norm="quantized").layer(nn.BatchNorm1d(4))
    assert norm is not None
    with pytest.raises(ValueError, match="more than one value"):
        norm(torch.ones(1, 4))


# ------------------------------------------------------------------ conduct


@pytest.mark.parametrize("scheme", ["uniform", "power_of_two"])
def test_compiles_to_one_graph_with_the_same_gradients(scheme: str) -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5)]
    net = quantized(nn.Sequential(*layers), scheme=scheme, norm="quantized")
    x = seeded(4, 3, 8, 8, dtype=torch.float32)
    y, dx, grads = step(net, x)
    torch._dynamo.reset()
    y_compiled, dx_compiled, grads_compiled = step(torch.compile(net, backend="aot_eager", fullgraph=True), x)
    assert torch.equal(y, y_compiled)
    assert torch.equal(dx, dx_compiled)
    assert all(torch.equal(grads[n], g) for n, g in zip(grads, grads_compiled.values(), strict=True))


@pytest.mark.parametrize("norm", ["exact", "quantized"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, norm: str) -> None:
    plain, x = network(norm=True, dtype=dtype), seeded(4, 3, 19, 19, dtype=dtype)
    y, dx, grads = step(quantized(plain, bits=8, norm=norm), x)
    assert torch.equal(y, step(plain, x)[0])
    assert dx.dtype == dtype
    assert all(g.dtype == dtype and g.isfinite().all() for g in grads.values())


@pytest.mark.parametrize("norm", ["exact", "quantized"])
def test_autocast_keeps_the_values_of_float_layers(norm: str) -> None:
    plain, x = network(norm=True, dtype=torch.float32), seeded(4, 3, 19, 19, dtype=torch.float32)
    coded = quantized(plain, bits=8, norm=norm)
    with torch.autocast("cpu", torch.bfloat16):
        (y, _, grads), (y_plain, _, grads_plain) = step(coded, x), step(plain, x)
    assert torch.equal(y, y_plain)
    for name, grad in grads_plain.items():
        assert grads[name].dtype == grad.dtype
        assert (grads[name] - grad).norm() <= 0.1 * grad.norm() + 1e-2


def test_channels_last_and_non_contiguous_inputs() -> None:
    net = quantized(network(), rounding="nearest", group=None)
    x = seeded(4, 3, 19, 19)
    expected = step(net, x)
    for view in (x.to(memory_format=torch.channels_last), x.mT.clone().mT):
        y, dx, grads = step(net, view)
        torch.testing.assert_close(y, expected[0])
        torch.testing.assert_close(dx, expected[1])
        assert all(torch.allclose(grads[n], g) for n, g in expected[2].items())


def test_evaluation_is_that_of_the_float_network_and_draws_no_random_numbers() -> None:
    plain, x = network(norm=True), seeded(4, 3, 19, 19)
    coded = quantized(plain, norm="quantized").eval()
    state = torch.get_rng_state()
    with torch.no_grad():
        assert torch.equal(coded(x), plain.eval()(x))
    assert torch.equal(torch.get_rng_state(), state)


def test_parameters_are_the_old_ones_by_object_and_name() -> None:
    net = network(norm=True)
    names, parameters = list(net.state_dict()), list(net.parameters())
    old = net[0]
    quantize_(net, ActGrad(norm="quantized"))
    assert list(net.state_dict()) == names
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert type(old) is nn.Conv2d
    assert copy.deepcopy(net)[0].settings == ActGrad(norm="quantized")


def test_frozen_weights_store_nothing_and_frozen_inputs_get_no_error() -> None:
    layer = CodedConv2d(nn.Conv2d(3, 4, 3), ActGrad())
    layer.weight.requires_grad_(False)
    x = seeded(2, 3, 8, 8, dtype=torch.float32).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None
    assert layer.bias is not None
    assert layer.bias.grad is not None


def test_layers_of_another_method_keep_their_own_memory() -> None:
    class Other(nn.Conv2d):
        """A layer that some other method built."""

    net = nn.Sequential(Other(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    rows = quantize_(net, ActGrad())
    assert [(row.layer, row.becomes) for row in rows] == [("0", "kept"), ("2", "MaskedReLU"), ("3", "PlacedMaxPool2d")]


def test_switches_leave_layers_alone() -> None:
    settings_ = ActGrad(relu_mask=False, pool_index=False)
    for module in (nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(3)):
        assert settings_.layer(module) is None
    for module in (
        nn.MaxPool2d(2, return_indices=True),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.BatchNorm2d(3, momentum=None),
    ):
        assert ActGrad(norm="quantized").layer(module) is None


def test_one_bit_powers_of_two_are_refused() -> None:
    with pytest.raises(ValueError, match="2, 4 or 8"):
        ActGrad(scheme="power_of_two", bits=1)


def test_the_yaml_has_every_field_with_its_default() -> None:
    text = (Path(__file__).parent.parent / "conf/quant/actgrad.yaml").read_text()
    keys = yaml.safe_load(text)
    assert keys.pop("name") == "actgrad"
    assert keys.pop("rules") == []
    assert keys == {field.name: field.default for field in dataclasses.fields(ActGrad)}


def test_under_another_quantizer_relus_and_pools_are_the_exact_ones_and_keep_less() -> None:
    """`quantize_` with ActGrad after XNOR: binary layers are left alone, outputs and gradients are the same bits."""
    torch.manual_seed(0)
    make = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten()]
    alone = nn.Sequential(*make, nn.Linear(32 * 5 * 5, 10))
    quantize_(alone, find("xnor")(), [Rule(match=["first", "last"], keep=True)])
    both = copy.deepcopy(alone)
    rows = quantize_(both, ActGrad(), [Rule(match=["Conv2d", "Linear"], keep=True)])
    assert type(both[3]) is type(alone[3])
    assert {row.becomes for row in rows} == {"kept", "MaskedReLU", "PlacedMaxPool2d"}
    x, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    for model in (alone, both):
        F.cross_entropy(model(x), labels).backward()
    for mine, other in zip(both.parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)  # type: ignore[arg-type]
    less, more = (saved_bytes_per_sample(model, x, labels) for model in (both, alone))
    assert less < 0.7 * more
