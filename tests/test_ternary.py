"""Ternary weights against their definition, and against every other ternary filter."""

from typing import Any

import pytest
import torch
from test_functional import weight
from torch import nn
from torch.nn import functional as F

from quant.ternary import ScaleOf, Ternary, ternary_codes


@pytest.mark.parametrize("scale", ["filter", "layer"])
def test_codes_and_scale_are_their_definition_value_by_value(scale: str) -> None:
    w = weight((3, 2, 3, 3))
    codes, alpha = ternary_codes(w, 0.7, scale)
    parts = list(w) if scale == "filter" else [w]
    for part, found, factor in zip(parts, codes if scale == "filter" else [codes], alpha.flatten(), strict=True):
        values = part.flatten().tolist()
        delta = 0.7 * sum(abs(v) for v in values) / len(values)
        large = [abs(v) for v in values if abs(v) > delta]
        assert found.flatten().tolist() == [0 if abs(v) <= delta else (1 if v > 0 else -1) for v in values]
        assert factor.item() == pytest.approx(sum(large) / len(large), abs=1e-14)


def test_alpha_is_the_best_scale_for_its_codes() -> None:
    w = weight((1, 40))
    codes, alpha = ternary_codes(w, 0.7, "filter")
    scales = torch.linspace(0, 3, 3001, dtype=torch.float64)[:, None]
    errors = (w - scales * codes).square().sum(1)
    assert errors.min() >= (w - alpha * codes).square().sum() - 1e-12


def test_the_threshold_of_0_7_is_near_the_best_for_a_gaussian() -> None:
    w = weight((1, 100_000))

    def error(threshold: float) -> float:
        codes, alpha = ternary_codes(w, threshold, "layer")
        return ((w - alpha * codes).square().sum() / w.square().sum()).item()

    assert error(0.7) < min(error(threshold) for threshold in (0.3, 0.5, 1.0)) < 0.363  # and better than two levels
    assert error(0.7) < 1.01 * min(error(threshold / 100) for threshold in range(60, 95, 5))


@pytest.mark.parametrize(
    "old", [nn.Conv2d(4, 6, 3, padding=1, dtype=torch.float64), nn.Linear(4, 6, dtype=torch.float64)]
)
def test_a_layer_is_its_definition_and_the_gradient_passes_straight_through(old: Any) -> None:
    layer: Any = Ternary().layer(old)
    x = weight((2, 4, 5, 5) if isinstance(old, nn.Conv2d) else (7, 4))
    codes, alpha = ternary_codes(old.weight.detach(), 0.7, "filter")
    w = (codes * alpha).requires_grad_()
    expected = F.conv2d(x, w, old.bias, padding=1) if x.dim() == 4 else F.linear(x, w, old.bias)
    g = weight(tuple(expected.shape), seed=1)
    expected.backward(g)
    y = layer(x)
    old.zero_grad()
    y.backward(g)
    assert torch.allclose(y, expected, rtol=0, atol=1e-12)
    assert torch.allclose(layer.weight.grad, w.grad, rtol=0, atol=1e-12)
    assert torch.equal(layer.weight_codes(), codes.to(torch.int8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [0.0, 0.5, -3.0])
def test_constant_weights_stay_finite(dtype: torch.dtype, value: float) -> None:
    layer: Any = Ternary().layer(nn.Linear(4, 3).to(dtype))
    nn.init.constant_(layer.weight, value)
    y = layer(torch.ones(2, 4, dtype=dtype))
    y.sum().backward()
    assert y.isfinite().all()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("scale", ["filter", "layer"])
def test_a_large_layer_in_half_has_the_scale_of_float(scale: ScaleOf) -> None:
    """More weights pass than float16 can count, and their sum is beyond its numbers."""
    w = weight((2, 200_000)).half()
    codes, alpha = ternary_codes(w, 0.7, scale)
    wide, want = ternary_codes(w.float(), 0.7, scale)
    assert (codes.dtype, alpha.dtype) == (torch.float16, torch.float16)
    assert torch.equal(codes.float(), wide)
    torch.testing.assert_close(alpha.float(), want, rtol=1e-3, atol=0)


def test_compiles_to_one_graph() -> None:
    layer = Ternary().layer(nn.Linear(12, 2))
    x = torch.randn(3, 12)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    y.sum().backward()
    assert torch.allclose(y, layer(x), atol=1e-6)


def test_other_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="ternary rewrites Conv2d and Linear"):
        Ternary().layer(nn.ReLU())
