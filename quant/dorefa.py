"""DoReFa-Net: weights, activations and gradients of k bits each (Zhou et al. 2016, arXiv 1606.06160).

q_k(v) = round((2^k - 1) v) / (2^k - 1)  for v in [0, 1], straight through in backward                          eq. 5, 6
weights      k = 1:  E|W| sign(W), one scale for the whole layer, straight through                              eq. 7, 8
             k > 1:  2 q_k(tanh(W) / (2 max|tanh(W)|) + 1/2) - 1, in [-1, 1]                                    eq. 9
activations  q_k(clip(BN(x), 0, 1)): the paper's networks normalise in front of every quantizer                 eq. 11
gradients    2 m [q_k(dy / (2 m) + 1/2 + N) - 1/2], m = max|dy| of the sample, N = U(-1/2, 1/2) / (2^k - 1)     eq. 12
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Interval
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quant.base import FLOAT, Precision, QuantizedLayer, Quantizer, register
from quant.functional import sign, straight_through
from quant.layers import Conv2d, Linear, Matrix, rewrite
from quant.learned_step import StepCodes
from quant.pack import WIDTHS, Layout
from quant.uniform import grid, round_to


def unit_quantize(v: Tensor, bits: int) -> Tensor:
    """q_k: v in [0, 1] to 2^bits levels. Gradient: the identity. Half and bfloat16 are rounded in float32.

    >>> unit_quantize(torch.tensor([0.0, 0.3, 0.6, 1.0]), 2).tolist()
    [0.0, 0.3333333432674408, 0.6666666865348816, 1.0]
    """
    top, wide = 2**bits - 1, torch.promote_types(v.dtype, torch.float32)
    return straight_through(v, ((v.detach().to(wide) * top).round() * (1 / top)).to(v.dtype))


def quantize_weight(w: Tensor, bits: int) -> Tensor:
    """Eq. 7 and 9. The gradient of eq. 9 goes through tanh and its maximum, that of eq. 7 is the identity.

    >>> quantize_weight(torch.tensor([-2.0, -0.5, 0.5, 3.0]), 1)
    tensor([-1.5000, -1.5000,  1.5000,  1.5000])
    """
    if bits == 1:
        return straight_through(w, sign(w.detach()) * w.detach().abs().mean())
    t = w.tanh()
    peak = t.abs().amax()
    return 2 * unit_quantize(t / (2 * torch.where(peak > 0, peak, 1)) + 0.5, bits) - 1  # weights of zeros have no scale


class _QuantizedGradient(torch.autograd.Function):
    """y = x; dx as eq. 12, unbiased: E[dx] = dy. x (B, ...), rounded between -max and max of each sample."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        ctx.bits = bits
        return x.clone()  # no view: what follows may work in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        peak = g.abs().amax(list(range(1, g.dim())), keepdim=True)
        return round_to(g, grid(-peak, peak, ctx.bits, zero_exact=False), ctx.bits, stochastic=True), None


def quantize_gradient(x: Tensor, bits: int) -> Tensor:
    """x, whose gradient is rounded."""
    y: Tensor = _QuantizedGradient.apply(x, bits)
    return y


class _Dorefa(QuantizedLayer, Matrix):
    settings: "Dorefa"

    def prepare(self) -> None:
        s, w = self.settings, self.weight
        self.precision = Precision(s.weight_bits, s.act_bits, s.grad_bits or FLOAT)
        kind, channels = (nn.BatchNorm2d if w.dim() == 4 else nn.BatchNorm1d), w.shape[1] * getattr(self, "groups", 1)
        self.norm = kind(channels, device=w.device, dtype=w.dtype) if s.input_norm == "batch" else None
        if self.norm is not None:
            # A standard deviation to either side fills [0, 1]. With BN's own 1 and 0 two thirds would be clipped at first, and
            # gradients grow by half in every layer: to 1e9 in MobileNetV2.
            nn.init.constant_(self.norm.weight, 0.5)
            nn.init.constant_(self.norm.bias, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        bits = self.settings.act_bits
        if self.norm is not None:
            x = self.norm(self.by_channel(x)).view(x.shape)
        x = unit_quantize(x.clamp(0, 1), bits)
        step, zero = x.new_full((), 1 / (2**bits - 1)), x.new_zeros(())
        codec = StepCodes(Layout.of(x), min(width for width in WIDTHS if width >= bits), step, zero, None)
        y = self.product(x, quantize_weight(self.weight, self.settings.weight_bits), self.bias, codec)
        return y if self.settings.grad_bits is None else quantize_gradient(y, self.settings.grad_bits)

    @torch.no_grad()
    def weight_codes(self) -> Tensor:
        """-1 and +1 at 1 bit, odd numbers from -(2^k - 1) to 2^k - 1 above."""
        bits = self.settings.weight_bits
        if bits == 1:
            return sign(self.weight).to(torch.int8)
        return quantize_weight(self.weight, bits).mul(2**bits - 1).round().to(torch.int16)

    @torch.no_grad()
    def health(self, x: Tensor) -> dict[str, float]:
        """`clip_ratio`: the share of inputs outside [0, 1], normalised by the running figures."""
        if self.norm is not None:
            x = self.by_running_figures(x, self.norm)
        clipped = ((x < 0) | (x > 1)).float().mean()
        return {"clip_ratio": clipped.item(), "step_size": 1 / (2**self.settings.act_bits - 1)}


class DorefaConv2d(_Dorefa, Conv2d):
    """y = conv(q(x), q(W)) + b.   x (B, C, H, W) -> (B, O, H', W')"""


class DorefaLinear(_Dorefa, Linear):
    """y = q(x) q(W)^T + b.   x (..., C) -> (..., O)"""


@register("dorefa")
@dataclass(frozen=True, kw_only=True)
class Dorefa(Quantizer):
    """Settings of DoReFa-Net; conf/quant/dorefa.yaml says what each one means."""

    weight_bits: Annotated[int, Interval(ge=1, le=8)] = 4
    act_bits: Annotated[int, Interval(ge=1, le=8)] = 4
    grad_bits: Annotated[int, Interval(ge=1, le=8)] | None = None
    input_norm: Literal["batch", "none"] = "batch"

    def layer(self, module: nn.Module) -> nn.Module:
        return rewrite(module, self, DorefaConv2d, DorefaLinear)
