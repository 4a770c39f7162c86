"""Convolution of codes: int8 and float kernel agree to the last bit, with each other and with exact arithmetic."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quant import integer, kernels
from quant.base import find
from quant.lsq import Lsq
from quant.matmul import Conv
from quant.saved import saved_bytes

GEOMETRIES = [
    (48, 64, 3, Conv(padding=(1, 1))),
    (3, 32, 3, Conv(padding=(1, 1))),
    (16, 24, 1, Conv(stride=(2, 2))),
    (20, 9, 5, Conv(stride=(2, 1), padding=(2, 2))),
    (8, 8, 3, Conv(padding=(1, 1), groups=2)),
    (5, 4, 3, Conv(padding=(2, 2), dilation=(2, 2))),
]


@pytest.mark.parametrize(("channels", "filters", "size", "shape"), GEOMETRIES)
@pytest.mark.parametrize("zero", [0, 8, 128])
def test_both_kernels_are_exact(channels: int, filters: int, size: int, shape: Conv, zero: int) -> None:
    torch.manual_seed(0)
    weight = torch.randint(-128, 128, (filters, channels // shape.groups, size, size), dtype=torch.int8)
    assert integer.fits(weight, 255, 128)
    scale = torch.tensor([0.0371])
    for codes in (
        torch.randint(0, 256, (3, channels, 13, 11), dtype=torch.uint8),
        torch.full((1, channels, 9, 9), 255, dtype=torch.uint8),
    ):
        for x in (codes, codes.to(memory_format=torch.channels_last)):
            geometry = (shape.stride, shape.padding, shape.dilation, shape.groups)
            want = F.conv2d(x.double() - zero, weight.double(), None, *geometry).float() * scale
            auto, floats = (integer.conv2d(x, zero, weight, scale, shape, kernel) for kernel in ("auto", "float"))
            assert torch.equal(auto, want)
            assert torch.equal(floats, want)
            assert auto.stride() == floats.stride()


def test_sums_that_floats_cannot_hold_are_refused() -> None:
    assert integer.fits(torch.empty(1, 512, 3, 3), 15, 8)
    assert not integer.fits(torch.empty(1, 512, 3, 3), 255, 128)


pytestmark = pytest.mark.skipif(kernels.why_not() is not None, reason=str(kernels.why_not()))


def layer_of(kernel: str, x: torch.Tensor, **settings: object) -> Any:
    torch.manual_seed(3)
    layer: Any = Lsq(kernel=kernel, **settings).layer(nn.Conv2d(8, 16, 3, stride=2, padding=1))  # type: ignore[arg-type]
    layer.calibrate_(x)
    return layer


def result_and_gradients(layer: Any, x: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y.backward(g)
    return [y.detach(), leaf.grad, *(p.grad for p in layer.parameters())]


def layer_and_gradients(kernel: str, x: torch.Tensor, **settings: object) -> list[torch.Tensor]:
    layer = layer_of(kernel, x, **settings)
    size = layer(x).shape
    return result_and_gradients(layer, x, torch.linspace(-1, 1, size.numel()).view(size))


@pytest.mark.parametrize(
    "settings",
    [{}, {"act_bits": 2, "weight_bits": 3}, {"act_bits": 8}, {"weight_ste": "passthrough"}, {"preset": "v1"}],
)
@pytest.mark.parametrize("signed", [False, True])
def test_a_layer_of_codes_is_the_layer_of_floats(
    settings: dict[str, object], signed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8, 15, 14)
    for image in (x if signed else x.relu(), (x if signed else x.relu()).to(memory_format=torch.channels_last)):
        auto, floats = (layer_and_gradients(kernel, image, **settings) for kernel in ("auto", "float"))
        assert all(map(torch.equal, auto, floats))
        monkeypatch.setattr("quant.lsq_product.obstacle", lambda x, w: "asked for")
        chain = layer_and_gradients("auto", image, **settings)
        monkeypatch.undo()
        for got, want in zip(auto, chain, strict=True):
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_the_product_as_exact_as_it_is(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8, 15, 14).to(dtype)
    plain, cast = (layer_of("auto", x.float()) for _ in range(2))
    g = torch.randn(plain(x.float()).shape)
    want = result_and_gradients(plain, x.float(), g)
    with torch.autocast("cpu", torch.bfloat16):
        got = result_and_gradients(cast, x, g)
    assert got[0].dtype == torch.float32
    assert got[1].dtype == dtype
    want[1] = want[1].to(dtype)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("rounded", [False, True])
def test_steps_of_frozen_weights_learn(rounded: bool) -> None:
    torch.manual_seed(0)
    x, found = torch.rand(4, 8, 15, 14), []
    for frozen in (False, True):
        layer = layer_of("auto", x)
        layer.weight.requires_grad_(not frozen)
        assert not rounded or layer.backward_in_bf16_()
        found.append(result_and_gradients(layer, x, torch.ones_like(layer(x))))
    (y, dx, dw, *others), (frozen_y, frozen_dx, frozen_dw, *frozen_others) = found
    assert dw is not None
    assert frozen_dw is None
    assert all(map(torch.equal, [y, dx, *others], [frozen_y, frozen_dx, *frozen_others]))


@pytest.mark.parametrize("where", ["input", "weight"])
def test_what_is_no_number_reaches_the_loss(where: str) -> None:
    layer, x = Lsq().layer(nn.Conv2d(8, 8, 3, padding=1)), torch.rand(4, 8, 32, 32)
    layer.calibrate_(x)
    with torch.no_grad():
        (x if where == "input" else layer.weight)[1, 2, 0, 1] = torch.nan
    assert layer(x).sum().isnan()


def test_codes_are_what_is_kept() -> None:
    layer = find("lsq")(act_bits=2).layer(nn.Conv2d(8, 8, 3, padding=1))
    x = torch.rand(4, 8, 32, 32, requires_grad=True)
    layer.calibrate_(x.detach())
    assert saved_bytes(lambda: layer(x).sum(), [*layer.parameters(), x]) <= x.numel() // 4 + 64
    with torch.no_grad():
        evaluated = layer(x)
    assert torch.equal(evaluated, layer(x))
