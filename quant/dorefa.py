"""DoReFa-Net: weights, activations and gradients of k bits each (Zhou et al. 2016, arXiv 1606.06160).

q_k(v) = round((2^k - 1) v) / (2^k - 1)  for v in [0, 1], straight through in backward                          eq. 5, 6
weights      k = 1:  E|W| sign(W), one scale for the whole layer, straight through                              eq. 7, 8
             k > 1:  2 q_k(tanh(W) / (2 max|tanh(W)|) + 1/2) - 1, in [-1, 1]                                    eq. 9
activations  q_k(clip(x, 0, 1)): the input must be at home in [0, 1], as behind BN and ReLU                     eq. 11
gradients    2 m [q_k(dy / (2 m) + 1/2 + N) - 1/2], m = max|dy| of the sample, N = U(-1/2, 1/2) / (2^k - 1)     eq. 12
"""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Interval
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quant.base import FLOAT, Precision, QuantizedLayer, Quantizer, register
from quant.codecs import Layout
from quant.functional import sign, stochastic_round, straight_through
from quant.layers import Conv2d, Linear, Matrix, rewrite
from quant.learned_step import StepCodes
from quant.pack import WIDTHS


def unit_quantize(v: Tensor, bits: int) -> Tensor:
    """q_k: v in [0, 1] to 2^bits levels. Gradient: the identity. Half and bfloat16 are rounded in float32.

    >>> unit_quantize(torch.tensor([0.0, 0.3, 0.6, 1.0]), 2).tolist()
    [0.0, 0.3333333432674408, 0.6666666865348816, 1.0]
    """
    top = 2**bits - 1
    codes = (v.detach().to(torch.promote_types(v.dtype, torch.float32)) * top).round()
    return straight_through(v, (codes * (1 / top)).to(v.dtype))


def quantize_weight(w: Tensor, bits: int) -> Tensor:
    """Eq. 7 and 9. The gradient of eq. 9 goes through tanh and its maximum, that of eq. 7 is the identity.

    >>> quantize_weight(torch.tensor([-2.0, -0.5, 0.5, 3.0]), 1)
    tensor([-1.5000, -1.5000,  1.5000,  1.5000])
    """
    if bits == 1:
        return straight_through(w, sign(w.detach()) * w.detach().abs().mean())
    t = w.tanh()
    peak = t.abs().amax().clamp_min(torch.finfo(t.dtype).tiny)
    return 2 * unit_quantize(t / (2 * peak) + 0.5, bits) - 1


class _QuantizedGradient(torch.autograd.Function):
    """y = x; dx as eq. 12, unbiased: E[dx] = dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        ctx.top = 2**bits - 1
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        wide = g.to(torch.promote_types(g.dtype, torch.float32))
        peak = wide.abs().amax(list(range(1, g.dim())), keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)
        codes = stochastic_round((wide / peak + 1) * (ctx.top / 2)).clamp_max(ctx.top)
        return ((codes * (2 / ctx.top) - 1) * peak).to(g.dtype), None


def quantize_gradient(x: Tensor, bits: int) -> Tensor:
    """x, whose gradient is rounded to 2^bits levels between -max and max of its sample. x (B, ...)"""
    y: Tensor = _QuantizedGradient.apply(x, bits)
    return y


class _Dorefa(QuantizedLayer, Matrix):
    settings: "Dorefa"

    def prepare(self) -> None:
        s = self.settings
        self.precision = Precision(s.weight_bits, s.act_bits, s.grad_bits or FLOAT)

    def forward(self, x: Tensor) -> Tensor:
        bits = self.settings.act_bits
        x = unit_quantize(x.clamp(0, 1), bits)
        step, zero = x.new_full((), 1 / (2**bits - 1)), x.new_zeros(())
        codec = StepCodes(Layout.of(x), min(width for width in WIDTHS if width >= bits), step, zero, None)
        y = self.product(x, quantize_weight(self.weight, self.settings.weight_bits), self.bias, codec)
        return y if self.settings.grad_bits is None else quantize_gradient(y, self.settings.grad_bits)

    @torch.no_grad()
    def weight_codes(self) -> Tensor:
        """-1 and +1 at 1 bit, odd numbers from -(2^k - 1) to 2^k - 1 above."""
        if self.settings.weight_bits == 1:
            return sign(self.weight).to(torch.int8)
        top = 2**self.settings.weight_bits - 1
        return quantize_weight(self.weight, self.settings.weight_bits).mul(top).round().to(torch.int16)

    def health(self, x: Tensor) -> dict[str, float]:
        return {
            "clip_ratio": ((x < 0) | (x > 1)).float().mean().item(),
            "step_size": 1 / (2**self.settings.act_bits - 1),
        }


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

    def layer(self, module: nn.Module) -> nn.Module:
        return rewrite(module, self, DorefaConv2d, DorefaLinear)
