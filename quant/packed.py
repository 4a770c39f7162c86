"""The product of signs on packed bits, for training and evaluation on a CPU: one function from floats to floats.

    forward   y = (sign(x) * sign(W)) alpha + b      popcounts: a whole number first, alpha once behind it
    backward  dx = 1_{|x| <= 1} (g * alpha sign(W)^T)    dW~ = g * sign(x)^T,  dW by `functional.scaled_sign_gradient`

To the last bit what `ste_sign`, `scaled_sign` and a float product give one after the other, but for NaN: its sign is not
defined, -1 in floats and whatever its bits make of it here. Kept for backward: two bits a value of x, and W as it is, which is
a parameter. No float copy of x or of alpha sign(W) outlives the pass that needs it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quant import exact, kernels, matmul
from quant.functional import Ste, WeightGradient, filter_mean, scaled_sign_gradient, sign
from quant.sign_gradients import Shape, gradients, obstacle_of_geometry


def obstacle_of_layer(shape: Shape, ste: Ste) -> str | None:
    """Why a layer can never be computed on packed bits here, in a few words; None if it can.

    >>> obstacle_of_layer(matmul.Conv(groups=2), "clip")
    'groups 2'
    """
    if ste != "clip":
        return f"ste {ste}"
    return obstacle_of_geometry(shape) or kernels.why_not()


def obstacle_of_input(x: Tensor, w: Tensor, bias: Tensor | None) -> str | None:
    """Why this call must be computed in floats; None if it need not. Asks for nothing that breaks a compiled graph."""
    if torch.compiler.is_compiling():
        return "a graph is being traced"
    if type(x) is not Tensor:
        return f"the input is a {type(x).__name__}"
    if obstacle := exact.obstacle_of_type(x, w, *(() if bias is None else (bias,))):
        return obstacle
    if x.numel() == 0 or (w.dim() == 4 and x.dim() != 4):
        return f"an input of shape {tuple(x.shape)}"
    return _obstacle_of_format(x, w) if w.dim() == 4 else None


def _obstacle_of_format(x: Tensor, w: Tensor) -> str | None:
    """How torch orders its sums, and so their last bit, depends on the memory format: it must be clear which one that is."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    if x.is_contiguous() == channels_last:  # true of both for one channel or one pixel
        return "an input whose memory format is not clear"
    weight_is_channels_last = w.stride(1) == 1 != w.stride(3)
    if weight_is_channels_last and not channels_last:
        return "a weight in channels_last and an input that is not"
    return None


def product_of_signs(
    x: Tensor, w: Tensor, bias: Tensor | None, shape: Shape, form: WeightGradient, bound: Tensor | None = None
) -> Tensor:
    """x (B, C, H, W) and w (O, C, h, w) -> (B, O, H', W'); or x (..., C) and w (O, C) -> (..., O). Clipped identity as `ste`.

    `w` is the latent weight; `form` and `bound` are those of `scaled_sign`.

    >>> x = torch.tensor([[-2.0, 0.5, 0.0]], requires_grad=True)
    >>> y = product_of_signs(x, torch.tensor([[0.5, -1.0, 1.5]]), None, matmul.Linear(), "exact")
    >>> y.backward(); (y.tolist(), x.grad.tolist())  # (-1 - 1 + 1) alpha, alpha = 1
    ([[-1.0]], [[0.0, -1.0, 1.0]])
    """
    y: Tensor = _ProductOfSigns.apply(x, w, bias, shape, form, bound)
    return y


@dataclass(frozen=True)
class _Bits:
    """sign(x) as the forward pass has packed it."""

    packed: Tensor
    size: torch.Size
    shape: Shape

    def bits(self) -> Tensor:
        return self.packed

    def floats(self, dtype: torch.dtype) -> Tensor:
        rows = (1, self.size[-1], 1, self.size[:-1].numel())
        images = tuple(self.size) if isinstance(self.shape, matmul.Conv) else rows
        return _from_image(kernels.unpack_signs(self.packed, images, dtype), self.size, self.shape)


class _ProductOfSigns(torch.autograd.Function):
    @staticmethod
    @exact.in_float32
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        shape: Shape,
        form: WeightGradient,
        bound: Tensor | None,
    ) -> Tensor:
        need_x, need_w = ctx.needs_input_grad[:2]
        image, inside = _as_image(x, shape), None
        if need_x:
            signs, inside = kernels.pack_with_mask(image)
        else:
            signs = kernels.pack_activations(image)
        alpha = filter_mean(w.abs())
        ctx.save_for_backward(w, alpha, signs if need_w else None, inside, bound)
        ctx.shape, ctx.form, ctx.size = shape, form, x.shape
        conv = shape if isinstance(shape, matmul.Conv) else matmul.Conv()
        weight = kernels.pack_weight(w, _pair(conv.padding))
        y = kernels.conv2d_of_packed(signs, weight, scale=alpha, bias=bias, stride=_pair(conv.stride))
        if isinstance(shape, matmul.Conv):
            return y
        return _from_image(y, (*x.shape[:-1], len(w)), shape).clone()  # no view: what follows may work in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        w, alpha, signs, inside, bound = ctx.saved_tensors
        shape, size = ctx.shape, ctx.size
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        bits = _Bits(signs, size, shape) if need_w else None
        dx, dw = gradients(g, w, alpha, bits, size, shape, need_x)
        if dx is not None:
            dx = _from_image(kernels.masked(_as_image(dx, shape), inside), size, shape)
        if dw is not None:
            dw = scaled_sign_gradient(w, sign(w), alpha, dw, ctx.form, bound)
        db = matmul.bias_gradient(g, shape) if need_b else None
        return dx, dw, db, None, None, None


def _as_image(x: Tensor, shape: Shape) -> Tensor:
    """The rows of a linear layer are the pixels of one image whose channels lie side by side: a view."""
    return x if isinstance(shape, matmul.Conv) else x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)


def _from_image(image: Tensor, size: tuple[int, ...], shape: Shape) -> Tensor:
    return image if isinstance(shape, matmul.Conv) else image.permute(0, 2, 3, 1).reshape(size)


def _pair(size: tuple[int, ...]) -> tuple[int, int]:
    return size[0], size[1]
