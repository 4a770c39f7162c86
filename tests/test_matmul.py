"""Matrix products with a memory of their own: the same as plain autograd where nothing is quantized."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from quant.matmul import Conv, conv2d, linear

GEOMETRIES = [Conv(), Conv(stride=(2, 1), padding=(1, 2)), Conv(dilation=(2, 2), padding=(2, 2)), Conv(groups=2)]


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


@pytest.mark.parametrize("shape", GEOMETRIES)
def test_a_convolution_is_autograds_own(shape: Conv) -> None:
    x, w, b = tensors((2, 4, 7, 6), (6, 4 // shape.groups, 3, 3), (6,))
    ours = conv2d(x, w, b, shape)
    plain = F.conv2d(x, w, b, shape.stride, shape.padding, shape.dilation, shape.groups)
    assert torch.equal(ours, plain)
    g = torch.randn_like(plain)
    for a, c in zip(torch.autograd.grad(ours, (x, w, b), g), torch.autograd.grad(plain, (x, w, b), g), strict=True):
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lead", [(5,), (2, 3), ()])
def test_a_linear_layer_is_autograds_own(lead: tuple[int, ...]) -> None:
    x, w, b = tensors((*lead, 4), (3, 4), (3,))
    if not lead:
        x = x[None]
    g = torch.randn(*x.shape[:-1], 3, dtype=torch.float64)
    ours = torch.autograd.grad(linear(x, w, b), (x, w, b), g)
    plain = torch.autograd.grad(F.linear(x, w, b), (x, w, b), g)
    for a, c in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-12)


def test_the_gradient_may_differ_for_its_two_uses() -> None:
    x, w, b = tensors((2, 3, 5, 5), (4, 3, 3, 3), (4,))
    y = conv2d(x, w, b, Conv(), grad_input=lambda g: 2 * g, grad_weight=lambda g: 3 * g)
    g = torch.randn_like(y)
    dx, dw, db = torch.autograd.grad(y, (x, w, b), g)
    px, pw, pb = torch.autograd.grad(F.conv2d(x, w, b), (x, w, b), g)
    torch.testing.assert_close(dx, 2 * px)
    torch.testing.assert_close(dw, 3 * pw)
    torch.testing.assert_close(db, pb)


class Halves:
    """Keeps float16, gives back what that says."""

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x.half(),)

    def decode(self, *saved: Tensor) -> Tensor:
        return saved[0]


def test_the_weight_gradient_comes_from_what_was_kept_and_the_input_gradient_does_not() -> None:
    x, w = tensors((2, 3, 5, 5), (4, 3, 3, 3))
    y = conv2d(x, w, None, Conv(), Halves())
    g = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, w), g)
    px, pw = torch.autograd.grad(F.conv2d(x.half().double().detach().requires_grad_(), w), (w,), g)[0], None
    assert pw is None
    torch.testing.assert_close(dw, px)
    torch.testing.assert_close(dx, torch.autograd.grad(F.conv2d(x, w), x, g)[0])


def test_nothing_is_kept_for_a_weight_that_needs_no_gradient() -> None:
    kept: list[int] = []
    x, w = tensors((2, 3, 5, 5), (4, 3, 3, 3))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        conv2d(x, w.detach(), None, Conv())
    assert kept == [w.numel()]


def test_nothing_is_encoded_where_no_gradient_will_be_asked_for() -> None:
    class Never(Halves):
        def encode(self, x: Tensor) -> tuple[Tensor, ...]:
            raise AssertionError("encoded in vain")

    x, w = tensors((2, 3, 5, 5), (4, 3, 3, 3))
    with torch.no_grad():
        assert torch.equal(conv2d(x, w, None, Conv(), Never()), F.conv2d(x, w))
