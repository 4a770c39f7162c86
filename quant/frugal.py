"""ReLU, max pool and batch norm that remember less for backward than autograd does.

             autograd keeps                           kept here                                      gradient
ReLU         the output, 32 bits a value              its sign, 1 bit a value                        the same
max pool     the input, and 64 bits a maximum         the place in the window, 2 bits at 2x2         the same
batch norm   the input, 32 bits a value               Q of the normalised input, k bits a value      approximate
"""

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from quant import fused
from quant.base import QuantizedLayer
from quant.codecs import GroupCodes
from quant.pack import WIDTHS, Layout, pack, unpack

Pair = tuple[int, int]
aten = torch.ops.aten


class _MaskedReLU(torch.autograd.Function):
    """y = max(x, 0), dx = g [y > 0]. Saved: one bit a value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.layout = Layout.of(x)
        ctx.save_for_backward(ctx.layout.pack_flags(x > 0))
        return F.relu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (mask,) = ctx.saved_tensors
        like = ctx.layout.restore(g.new_empty(ctx.layout.count))
        if fused.usable(like):
            from quant.kernels import elementwise

            return elementwise.keep(mask, elementwise.dense_like(g, like))
        flags = ctx.layout.unpack_flags(mask).view(torch.int8)  # floats by floats: on a CPU, by bools is slow
        dx: Tensor = flags.to(g.dtype).mul(g)
        return dx


def relu(x: Tensor) -> Tensor:
    """The gradient of torch's ReLU, also in 0, from one bit a value.

    >>> x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    >>> relu(x).sum().backward(); x.grad
    tensor([0., 0., 1.])
    """
    y: Tensor = _MaskedReLU.apply(x)
    return y


class MaskedReLU(QuantizedLayer, nn.ReLU):
    """ReLU that remembers a bit a value. Never in place: its input is nobody's to keep, so nothing is gained by it."""

    def forward(self, x: Tensor) -> Tensor:
        return relu(x) if torch.is_grad_enabled() else F.relu(x)


@dataclass(frozen=True)
class Window:
    """The geometry of a max pool, and how a maximum is written down: its place in the window, row by row."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    ceil_mode: bool

    @classmethod
    def of(cls, pool: nn.MaxPool2d) -> Self:
        pairs = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
        kernel, stride, padding, dilation = ((p, p) if isinstance(p, int) else (p[0], p[1]) for p in pairs)
        return cls(kernel, stride, padding, dilation, pool.ceil_mode)

    @property
    def bits(self) -> int | None:
        """Bits of a place: 2 for 2x2 windows, 4 up to 4x4, 8 up to 16x16, None beyond."""
        return next((b for b in WIDTHS if math.prod(self.kernel) <= 1 << b), None)

    def place(self, index: Tensor, width: int) -> Tensor:
        """Index of a maximum in its plane (rows of `width` values) -> its place in the window, uint8."""
        index = index.int()  # half the memory traffic of int64, and a plane has fewer than 2^31 values
        row = torch.div(index, width, rounding_mode="floor")
        top, left = self._corners(index)
        down = torch.div(row - top, self.dilation[0], rounding_mode="floor")
        right = torch.div(index - row * width - left, self.dilation[1], rounding_mode="floor")
        return (down * self.kernel[1] + right).to(torch.uint8)

    def index(self, place: Tensor, width: int) -> Tensor:
        """The inverse of `place`, int64."""
        place = place.long()
        down = torch.div(place, self.kernel[1], rounding_mode="floor")
        top, left = self._corners(place)
        row = top + down * self.dilation[0]
        return row * width + left + (place - down * self.kernel[1]) * self.dilation[1]

    def _corners(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        height, width = pooled.shape[-2:]
        rows = torch.arange(height, device=pooled.device, dtype=pooled.dtype) * self.stride[0] - self.padding[0]
        columns = torch.arange(width, device=pooled.device, dtype=pooled.dtype) * self.stride[1] - self.padding[1]
        return rows.unsqueeze(1), columns


class _PlacedMaxPool(torch.autograd.Function):
    """Max pool; the gradient goes to the first maximum of a window. Saved: the place in the window."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: Window) -> Tensor:
        y: Tensor
        y, index = aten.max_pool2d_with_indices(
            x, window.kernel, window.stride, window.padding, window.dilation, window.ceil_mode
        )
        ctx.window, ctx.layouts = window, (Layout.of(x), Layout.of(index))
        assert window.bits is not None
        ctx.save_for_backward(pack(ctx.layouts[1].flat(window.place(index, x.shape[-1])), window.bits))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (packed,) = ctx.saved_tensors
        window, (inputs, pooled) = ctx.window, ctx.layouts
        place = pooled.restore(unpack(packed, window.bits, (pooled.count,)))
        index = window.index(place, inputs.shape[-1])
        like = inputs.restore(g.new_empty(inputs.count))  # read for its shape and strides only
        geometry = (window.kernel, window.stride, window.padding, window.dilation, window.ceil_mode)
        dx: Tensor = aten.max_pool2d_with_indices_backward(g, like, *geometry, index)
        return dx, None


def max_pool2d(x: Tensor, window: Window) -> Tensor:
    """The max pool of torch and its gradient, from `window.bits` a maximum. x (..., H, W) -> (..., H', W')."""
    y: Tensor = _PlacedMaxPool.apply(x, window)
    return y


class _QuantizedNorm(torch.autograd.Function):
    """y = gamma xh + beta, xh = (x - mean) / sigma over the batch; exact. With xq = Q(xh), all that is saved of x:

    dx = gamma / sigma (g - mean(g) - xq mean(g xq)),   dgamma = sum g xq,   dbeta = sum g (exact)
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor | None,
        b: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
        codec: GroupCodes,
    ) -> tuple[Tensor, ...]:
        y, mean, scale, *running = aten._native_batch_norm_legit_functional(
            x, w, b, running_mean, running_var, True, momentum, eps
        )
        channels = (-1, *[1] * (x.dim() - 2))
        normal = (x.to(codec.dtype) - mean.view(channels)) * scale.view(channels)
        ctx.codec = codec
        ctx.save_for_backward(w, scale, *codec.encode(normal))
        ctx.mark_non_differentiable(*running)
        return y, *running

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Any, ...]:
        w, scale, *saved = ctx.saved_tensors
        normal = ctx.codec.decode(*saved).to(g.dtype)
        zero, one = torch.zeros_like(scale), torch.ones_like(scale)  # mean and 1/sigma of a normalised input
        gain, wanted = scale if w is None else w * scale, list(ctx.needs_input_grad[:3])
        dx, dw, db = aten.native_batch_norm_backward(g, normal, gain, None, None, zero, one, True, 0.0, wanted)
        return dx, dw, db, None, None, None, None, None


def batch_norm(x: Tensor, norm: nn.modules.batchnorm._BatchNorm, codec: GroupCodes) -> Tensor:
    """Batch norm of a training step: exact forward, running statistics updated. x (B, C, ...) -> the same.

    Raises ValueError where a channel has a single value: it has no variance.
    """
    if x.numel() == x.shape[1]:
        raise ValueError(f"batch norm in training needs more than one value a channel, got input {tuple(x.shape)}")
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    y: Tensor
    y, new_mean, new_var = _QuantizedNorm.apply(x, norm.weight, norm.bias, mean, var, norm.momentum, norm.eps, codec)
    mean.copy_(new_mean)
    var.copy_(new_var)
    return y
