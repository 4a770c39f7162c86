"""Convolution and linear layers that choose what they remember for backward.

Plain autograd keeps the float input of every matrix product. A quantized layer needs less: signs, codes, or codes that are
an approximation. Here the layer says so by a `Codec`, and may quantize the gradient apart for its two uses:

    forward   y = x * w + b                     saved: codec.encode(x), w
    backward  dx = grad_input(g) * w^T          dw = grad_weight(g) * decode(saved)^T          db = sum g   (always exact)

Where w and what was saved are whole numbers times a unit, the two products may be made in bfloat16 (`rounded_products`).

>>> x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3, requires_grad=True)
>>> conv2d(x, w, None, Conv(padding=(1, 1))).sum().backward()
>>> v = w.detach().clone().requires_grad_()
>>> torch.nn.functional.conv2d(x, v, padding=1).sum().backward()
>>> torch.equal(w.grad, v.grad)
True
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

GradientMap = Callable[[Tensor], Tensor]


def rows(x: Tensor) -> Tensor:
    """A linear layer's input (*, N) as a matrix (M, N)."""
    return x.reshape(-1, x.shape[-1])


class Codec(Protocol):
    """What a layer keeps of its input: `decode(*encode(x))` is the tensor that the weight gradient is made from."""

    def encode(self, x: Tensor) -> tuple[Tensor, ...]: ...

    def decode(self, *saved: Tensor) -> Tensor: ...


class Scaled(NamedTuple):
    """A tensor as whole numbers of at most 256, which bfloat16 holds exactly, times a unit: one, or one for each `x[i]`."""

    numbers: Tensor
    unit: Tensor


class NumberCodec(Codec, Protocol):
    """A codec whose results are whole numbers times a unit."""

    def numbers(self, *saved: Tensor) -> Scaled: ...


class Whole:
    """Keep the input as it is: plain autograd."""

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x,)

    def decode(self, *saved: Tensor) -> Tensor:
        return saved[0]


@dataclass(frozen=True)
class Conv:
    """The geometry of a convolution."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    bf16: bool = False
    """Whether the gradients' products are to be computed in bfloat16, where operands allow it."""

    @classmethod
    def of(cls, layer: nn.Conv2d) -> Self:
        """The geometry of an existing layer. Raises ValueError for a padding that is not plain zeros given in pixels."""
        if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
            raise ValueError("padding must be given in pixels with padding_mode='zeros'")
        return cls(layer.stride, layer.padding, layer.dilation, layer.groups)

    def forward(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, w, bias, self.stride, self.padding, self.dilation, self.groups)

    def backward(
        self, g: Tensor, x: Tensor, w: Tensor, need_x: bool, need_w: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        if g.dim() == 3:  # one image, without a batch around it
            dx, dw = self.backward(g.unsqueeze(0), x.unsqueeze(0), w, need_x, need_w)
            return None if dx is None else dx.squeeze(0), dw
        dx, dw, _ = torch.ops.aten.convolution_backward(
            g, x, w, None, self.stride, self.padding, self.dilation, False, [0, 0], self.groups, [need_x, need_w, False]
        )
        return dx, dw


@dataclass(frozen=True)
class Linear:
    """The geometry of a linear layer: none."""

    bf16: bool = False

    def forward(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, w, bias)

    def backward(
        self, g: Tensor, x: Tensor, w: Tensor, need_x: bool, need_w: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        dx = g @ w if need_x else None
        dw = rows(g).mT @ rows(x) if need_w else None
        return dx, dw


def rounded_products(
    g_input: Tensor, g_weight: Tensor, x: Scaled | None, w: Scaled, size: torch.Size, shape: Conv | Linear, need_x: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dx (`size`) and dw (None without x) by products in bfloat16, whose sums are float32 (not on every processor).

    What is rounded to 8 bits of mantissa is g on its way in, multiplied by the units of w where these are several, and the
    result on its way out. Numbers need no rounding; single units come behind the product.
    """
    low, one, dx, dw = torch.bfloat16, w.unit.numel() == 1, None, None
    rounded = g_weight.to(low)
    if need_x:
        if not one:
            g_input = g_input * w.unit.view(-1, *[1] * (w.numbers.dim() - 2))
        scaled = rounded if g_input is g_weight else g_input.to(low)
        dx = shape.backward(scaled, scaled.new_empty(()).expand(size), w.numbers, True, False)[0]
        assert dx is not None
        dx = dx.to(g_input.dtype).mul_(w.unit.reshape(())) if one else dx.to(g_input.dtype)
    if x is not None:
        dw = shape.backward(rounded, x.numbers, w.numbers, False, True)[1]
        assert dw is not None
        dw = dw.to(g_weight.dtype).mul_(x.unit)
    return dx, dw


UNTOUCHED = (None,) * 5  # what follows x, w and bias has no gradient


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        shape: Conv | Linear,
        codec: Codec,
        unit: Tensor | None,
        grad_input: GradientMap | None,
        grad_weight: GradientMap | None,
    ) -> Tensor:
        ctx.save_for_backward(w, unit, *(codec.encode(x) if ctx.needs_input_grad[1] else ()))
        ctx.shape, ctx.codec, ctx.maps, ctx.x = shape, codec, (grad_input, grad_weight), (x.shape, x.dtype)
        return shape.forward(x, w, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        w, unit, *saved = ctx.saved_tensors
        size, dtype = ctx.x
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        g_input, g_weight = (rounded(g) if rounded else g for rounded in ctx.maps)
        if unit is not None:
            x = ctx.codec.numbers(*saved) if need_w else None
            w = Scaled((w / unit).to(torch.bfloat16), unit)
            dx, dw = rounded_products(g_input, g_weight, x, w, size, ctx.shape, need_x)
        else:
            x = ctx.codec.decode(*saved).to(g.dtype) if need_w else g.new_empty(()).expand(size)
            dx, dw = _products(g_input, g_weight, x, w.to(g.dtype), ctx.shape, need_x, need_w)
        db = bias_gradient(g, ctx.shape) if need_b else None
        return dx.to(dtype) if dx is not None else None, dw, db, *UNTOUCHED


def _products(
    g_input: Tensor, g_weight: Tensor, x: Tensor, w: Tensor, shape: Conv | Linear, need_x: bool, need_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    if g_input is g_weight:  # one call for both lets the library share its work
        return shape.backward(g_input, x, w, need_x, need_w)
    return shape.backward(g_input, x, w, need_x, False)[0], shape.backward(g_weight, x, w, False, need_w)[1]


def bias_gradient(g: Tensor, shape: Conv | Linear) -> Tensor:
    """The gradient of the bias: the sum over everything but the channels."""
    channel = g.dim() - (3 if isinstance(shape, Conv) else 1)
    others = [d for d in range(g.dim()) if d != channel]
    return g.sum(others) if others else g  # of no dimensions torch would sum all


def _product(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    shape: Conv | Linear,
    codec: Codec,
    unit: Tensor | None,
    *maps: GradientMap | None,
) -> Tensor:
    if not torch.is_grad_enabled():  # autograd would encode what nobody will ask for
        return shape.forward(x, w, bias)
    y: Tensor = _Matmul.apply(x, w, bias, shape, codec, unit if shape.bf16 else None, *maps)
    return y


def conv2d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    shape: Conv,
    codec: Codec | None = None,
    unit: Tensor | None = None,
    grad_input: GradientMap | None = None,
    grad_weight: GradientMap | None = None,
) -> Tensor:
    """x (B, C, H, W), w (O, C/groups, h, w), bias (O) or None -> (B, O, H', W').

    `unit`: what w is whole numbers of, one or (O, 1, 1, 1); with a NumberCodec it makes `shape.bf16` possible.
    """
    return _product(x, w, bias, shape, codec or Whole(), unit, grad_input, grad_weight)


def linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    codec: Codec | None = None,
    unit: Tensor | None = None,
    grad_input: GradientMap | None = None,
    grad_weight: GradientMap | None = None,
    shape: Linear | None = None,
) -> Tensor:
    """x (..., C), w (O, C), bias (O) or None -> (..., O). `unit` as in `conv2d`, one or (O, 1)."""
    return _product(x, w, bias, shape or Linear(), codec or Whole(), unit, grad_input, grad_weight)
