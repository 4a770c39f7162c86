"""DoReFa-Net against its equations, written down here a second time."""

from typing import Any

import pytest
import torch
from test_functional import weight
from torch import Tensor, nn
from torch.nn import functional as F

from quant.dorefa import Dorefa, quantize_gradient, quantize_weight, unit_quantize

BITS = [1, 2, 3, 4, 8]


def rounded(v: Tensor, bits: int) -> Tensor:
    """Eq. 5 and 6 by plain autograd."""
    top = 2**bits - 1
    return v + ((v * top).round() / top - v).detach()


def expected_weight(w: Tensor, bits: int) -> Tensor:
    if bits == 1:
        return w + (((w >= 0).to(w) * 2 - 1) * w.abs().mean() - w).detach()
    return 2 * rounded(w.tanh() / (2 * w.tanh().abs().max()) + 0.5, bits) - 1


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_equally_spaced_from_0_to_1(bits: int) -> None:
    v = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    levels = unit_quantize(v, bits).unique()
    assert torch.allclose(levels, torch.linspace(0, 1, 2**bits, dtype=torch.float64), atol=1e-12)
    assert (unit_quantize(v, bits) - v).abs().max() <= 0.5 / (2**bits - 1) + 1e-12


@pytest.mark.parametrize("bits", BITS)
def test_weight_and_its_gradient_are_the_equations(bits: int) -> None:
    g = weight((4, 3, 3, 3), seed=1)
    results = []
    for quantize in (quantize_weight, expected_weight):
        w = weight((4, 3, 3, 3)).requires_grad_()
        y = quantize(w, bits)
        y.backward(g)
        results.append((y.detach(), w.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_the_gradient_of_the_weight_is_that_of_the_smooth_part() -> None:
    """Straight through the rounding, so finite differences of 2 (tanh(W) / (2 max|tanh W|) + 1/2) - 1 must agree."""
    g = weight((2, 5), seed=1)
    w = weight((2, 5)).requires_grad_()
    quantize_weight(w, 4).backward(g)
    smooth = w.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: v.tanh() / v.tanh().abs().max(), smooth)
    (smooth.tanh() / smooth.tanh().abs().max()).backward(g)
    assert torch.allclose(w.grad, smooth.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_rounded_gradients_lie_on_their_levels_and_are_right_on_average(bits: int) -> None:
    torch.manual_seed(0)
    g = weight((3, 4, 5)) * torch.tensor([1.0, 1e-3, 0.0]).view(3, 1, 1)
    total, draws, top = torch.zeros_like(g), 2000, 2**bits - 1
    for _ in range(draws):
        x = torch.zeros_like(g).requires_grad_()
        quantize_gradient(x, bits).backward(g)
        total += x.grad
    peak = g.abs().amax((1, 2), keepdim=True)
    codes = (x.grad[:2] / peak[:2] + 1) * top / 2
    assert torch.allclose(codes, codes.round(), atol=1e-9)
    assert codes.min() >= -1e-9
    assert codes.max() <= top + 1e-9
    assert (total[2].abs() < 1e-30).all()
    spread = (
        peak / top / draws**0.5
    )  # of the mean: rounding up or down over a step of 2 peak / top has half of it at most
    assert ((total / draws - g).abs() <= 5 * spread + 1e-30).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "old", [nn.Conv2d(4, 6, 3, padding=1, dtype=torch.float64), nn.Linear(4, 6, dtype=torch.float64)]
)
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_a_layer_is_its_definition_and_remembers_codes(old: Any, bits: int, norm: Any) -> None:
    layer: Any = Dorefa(weight_bits=bits, act_bits=bits, input_norm=norm).layer(old)
    x = weight((2, 4, 5, 5) if isinstance(old, nn.Conv2d) else (7, 4))

    def expected(v: Tensor) -> Tensor:
        dims = [d for d in range(v.dim()) if d != 1]
        if norm == "batch":
            centred = v - v.mean(dims, keepdim=True)
            v = 0.5 * centred / (centred.square().mean(dims, keepdim=True) + 1e-5).sqrt() + 0.5
        q = rounded(v.clamp(0, 1), bits)
        w = expected_weight(layer.weight, bits)
        return F.conv2d(q, w, layer.bias, padding=1) if v.dim() == 4 else F.linear(q, w, layer.bias)

    results = []
    for forward in (layer, expected):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        y = forward(leaf)
        y.backward(weight(tuple(y.shape), seed=1))
        results.append((y.detach(), leaf.grad, layer.weight.grad.clone(), layer.bias.grad.clone()))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-11)


def test_health_counts_what_is_clipped_and_changes_nothing() -> None:
    layer: Any = Dorefa().layer(nn.Linear(4, 3))
    before = layer.norm.running_mean.clone()
    assert layer.health(torch.tensor([[-1.5, 0.5, 0.5, 1.5]]))["clip_ratio"] == 0.5
    assert torch.equal(layer.norm.running_mean, before)


@pytest.mark.parametrize("bits", BITS)
def test_codes_give_back_the_weights(bits: int) -> None:
    layer: Any = Dorefa(weight_bits=bits).layer(nn.Conv2d(3, 4, 3, dtype=torch.float64))
    scale = layer.weight.abs().mean() if bits == 1 else 1 / (2**bits - 1)
    assert torch.allclose(layer.weight_codes().double() * scale, quantize_weight(layer.weight, bits), atol=1e-12)


def test_gradient_bits_reach_the_gradients() -> None:
    torch.manual_seed(0)
    layer: Any = Dorefa(grad_bits=2).layer(nn.Linear(4, 3, dtype=torch.float64))
    assert layer.precision.grad == 2
    g = weight((8, 3))
    layer(weight((8, 4))).backward(g)
    codes = layer.bias.grad  # a sum of values on the levels -1, -1/3, 1/3, 1 times the peak of each sample
    assert not torch.allclose(codes, g.sum(0))
    assert (codes - g.sum(0)).abs().max() <= (g.abs().amax(1) * 2 / 3).sum()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [0.0, 1e-20, 1e4])
def test_constant_input_and_zero_weights_stay_finite(dtype: torch.dtype, value: float) -> None:
    layer: Any = Dorefa(grad_bits=4).layer(nn.Linear(4, 3).to(dtype))
    nn.init.zeros_(layer.weight)
    layer(torch.full((2, 4), value, dtype=dtype)).sum().backward()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("bits", [2, 8])
def test_weights_of_zeros_get_the_gradient_of_unit_scale(bits: int) -> None:
    w, g = torch.zeros(3, 4, requires_grad=True), torch.randn(3, 4)
    quantize_weight(w, bits).backward(g)
    assert w.grad is not None
    assert torch.equal(w.grad, g)


def test_compiles_to_one_graph() -> None:
    layer = Dorefa(grad_bits=8).layer(nn.Linear(12, 2))
    x = torch.randn(3, 12)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    y.sum().backward()
    assert torch.allclose(y, layer(x), atol=1e-6)


def test_other_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="dorefa rewrites Conv2d and Linear"):
        Dorefa().layer(nn.ReLU())


def test_what_follows_may_work_in_place() -> None:
    layer = Dorefa(grad_bits=6).layer(nn.Conv2d(3, 4, 3))
    x = torch.rand(2, 3, 6, 6, requires_grad=True)
    F.relu(layer(x), inplace=True).sum().backward()
    assert x.grad is not None
