"""A convolution of two tensors with learned steps as one function, for float32 on a CPU: LSQ as its hardware would do it.

    forward   y = (code_x * code_w) s_x s_w + b          whole numbers; s_x s_w once behind them (LSQ, arXiv 1902.08153, figure 1)
    backward  dx_q = g * w_q^T     dw_q = g * x_q^T      x_q = s_x code_x, w_q = s_w code_w, as ever
              and from these dx, ds_x, dw, ds_w          by `quant.learned_step`, one pass each

Where the geometry says `bf16`, the codes are multiplied in bfloat16, and the steps come behind: `matmul.rounded_products`.

Kept for backward: x, which the ReLU in front of it keeps anyway, and its codes, 8 bits a value, packed to 4 or 2 where they fit.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quant import exact, integer, kernels
from quant.matmul import Conv, Scaled, bias_gradient, rounded_products
from quant.pack import WIDTHS, Layout, pack, unpack


@dataclass(frozen=True)
class StepSpec:
    """What is known of one tensor's quantizer besides its step: levels, factor of the step's gradient, gradient outside."""

    low: Tensor
    high: Tensor
    scale: Tensor | float
    bits: int
    passthrough: bool = False


def obstacle(x: Tensor, w: Tensor) -> str | None:
    """Why this call must be computed in floats; None if it need not."""
    if torch.compiler.is_compiling():
        return "a graph is being traced"
    if x.dim() != 4 or x.numel() == 0 or type(x) is not Tensor:
        return f"an input of shape {tuple(x.shape)}"
    return exact.obstacle_of_type(x, w) or kernels.why_not()


def conv2d(
    x: Tensor, step_x: Tensor, w: Tensor, step_w: Tensor, bias: Tensor | None,
    of_x: StepSpec, of_w: StepSpec, shape: Conv, kernel: str = "auto",
) -> Tensor:  # fmt: skip
    """x (B, C, H, W), w (O, C/groups, h, w), a step for each -> (B, O, H', W'), in the memory format of x."""
    y: Tensor = _Product.apply(_dense(x), step_x, _dense(w), step_w, bias, of_x, of_w, shape, kernel)
    return y


def _dense(x: Tensor) -> Tensor:
    return x if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


class _Product(torch.autograd.Function):
    @staticmethod
    @exact.in_float32
    def forward(
        ctx: Any, x: Tensor, step_x: Tensor, w: Tensor, step_w: Tensor, bias: Tensor | None,
        of_x: StepSpec, of_w: StepSpec, shape: Conv, kernel: str,
    ) -> Tensor:  # fmt: skip
        from quant.kernels import elementwise

        code_x, bad_x = elementwise.encode(x, step_x, of_x.low, of_x.high)
        code_w, bad_w = elementwise.encode(w, step_w, of_w.low, of_w.high)
        ctx.layout, ctx.width = Layout.of(x), next(width for width in WIDTHS if width >= of_x.bits)
        ctx.needs_codes = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        kept = pack(ctx.layout.flat(code_x), ctx.width) if ctx.needs_codes else None
        ctx.save_for_backward(x, step_x, w, step_w, bias, kept)
        ctx.of, ctx.shape, ctx.kernel = (of_x, of_w), shape, kernel
        y = _product(ctx, code_x, code_w, step_x * step_w + (bad_x + bad_w), bias)
        ctx.version = y._version
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, step_x, w, step_w, *_ = _saved(ctx)
        (of_x, of_w), need = ctx.of, ctx.needs_input_grad
        dx, dw = (_in_bf16 if ctx.shape.bf16 else _in_float32)(ctx, g, need[0] or need[1])
        ctx.codes = ctx.unpacked = None
        dx, dstep_x = _gradients(x, dx, step_x, of_x)
        dw, dstep_w = _gradients(w, dw, step_w, of_w)
        db = bias_gradient(g, ctx.shape) if need[4] else None
        return dx, dstep_x, dw, dstep_w, db, None, None, None, None

    @staticmethod
    def can_again(ctx: Any, y: Tensor) -> bool:
        """Whether y is still the result of forward, and its codes are kept."""
        return bool(ctx.needs_codes) and y._version == ctx.version

    @staticmethod
    def again(ctx: Any) -> Tensor:
        """The result of forward, from what is kept for backward: the same to the last bit."""
        _, step_x, _, step_w, bias, _ = _saved(ctx)
        ctx.codes = code_x, code_w = _codes(ctx)
        assert code_x is not None
        return _product(ctx, code_x, code_w, step_x * step_w, bias)


def _product(ctx: Any, code_x: Tensor, code_w: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    of_x, of_w = ctx.of
    signed = code_w + of_w.low.to(torch.int8)  # bytes wrap round: 255 is -1
    y = integer.conv2d(code_x, -int(of_x.low), signed.view(torch.int8), scale, ctx.shape, ctx.kernel)
    return y if bias is None else y.add_(bias.view(-1, 1, 1))


def _saved(ctx: Any) -> tuple[Any, ...]:
    """What forward saved. Asked for once, though used twice: what a checkpoint computes again can be had only once."""
    if getattr(ctx, "unpacked", None) is None:
        ctx.unpacked = ctx.saved_tensors
    found: tuple[Any, ...] = ctx.unpacked
    return found


def _codes(ctx: Any) -> tuple[Tensor | None, Tensor]:
    """Those of x and w, from what is kept; or from `again`, which had to make them a moment ago."""
    from quant.kernels import elementwise

    if getattr(ctx, "codes", None) is not None:
        found: tuple[Tensor | None, Tensor] = ctx.codes
        return found
    _, _, w, step_w, _, kept = _saved(ctx)
    code_x = None if kept is None else ctx.layout.restore(unpack(kept, ctx.width, (ctx.layout.count,)))
    return code_x, elementwise.encode(w, step_w, ctx.of[1].low, ctx.of[1].high)[0]


def _in_float32(ctx: Any, g: Tensor, need_x: bool) -> tuple[Tensor | None, Tensor | None]:
    """dx_q and dw_q in float32."""
    from quant.kernels import elementwise

    x, step_x, _, step_w, *_ = _saved(ctx)
    of_x, of_w = ctx.of
    code_x, code_w = _codes(ctx)
    ctx.codes = None  # floats take the place of the bytes before the products take memory
    x_q = g.new_empty(()).expand(x.shape) if code_x is None else elementwise.decode(code_x, -of_x.low, step_x)
    del code_x
    products: tuple[Tensor | None, Tensor | None] = ctx.shape.backward(
        g, x_q, elementwise.decode(code_w, -of_w.low, step_w), need_x, ctx.needs_codes
    )
    return products


def _in_bf16(ctx: Any, g: Tensor, need_x: bool) -> tuple[Tensor | None, Tensor | None]:
    """The same in bfloat16."""
    x, step_x, _, step_w, *_ = _saved(ctx)
    (of_x, of_w), low = ctx.of, torch.bfloat16
    code_x, code_w = _codes(ctx)
    ctx.codes = None
    numbers_x = None if code_x is None else Scaled(code_x.to(low).add_(of_x.low), step_x)
    del code_x
    numbers_w = Scaled(code_w.to(low).add_(of_w.low), step_w)
    return rounded_products(g, g, numbers_x, numbers_w, x.shape, ctx.shape, need_x)


def _gradients(v: Tensor, g: Tensor | None, step: Tensor, of: StepSpec) -> tuple[Tensor | None, Tensor | None]:
    """Of v and of its step, from the gradient of what it was quantized to."""
    from quant.kernels import elementwise

    if g is None:
        return None, None
    whole = g.clone() if of.passthrough else None
    dv, slope = elementwise.step_gradient(v, g, step, of.low, of.high)
    return dv if whole is None else whole, (slope * of.scale).to(step.dtype).view_as(step)
