"""Ternary Weight Networks: weights of -alpha, 0, +alpha, activations float (Li, Zhang, Liu 2016, arXiv 1605.04711).

    W~ = alpha t,   t = sign(W) where |W| > delta, else 0                                                      sec. 2
    delta = 0.7 mean|W|,   alpha = mean of |W| where |W| > delta: the best scale for that t

Both for each filter or for the whole layer (the paper has one for the layer). The gradient passes straight through to W.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Gt
from torch import Tensor, nn

from quant.base import Precision, QuantizedLayer, Quantizer, register
from quant.functional import sign, straight_through
from quant.layers import Conv2d, Linear, Matrix, rewrite

ScaleOf = Literal["filter", "layer"]


def ternary_codes(w: Tensor, threshold: float, scale: ScaleOf) -> tuple[Tensor, Tensor]:
    """(t, alpha); alpha broadcasts against t, and is 0 where no weight passes the threshold.

    >>> ternary_codes(torch.tensor([[-3.0, 0.5, 0.5, 4.0]]), 0.7, "filter")
    (tensor([[-1.,  0.,  0.,  1.]]), tensor([[3.5000]]))
    """
    dims = list(range(1 if scale == "filter" else 0, w.dim()))
    size = w.abs().to(torch.promote_types(w.dtype, torch.float32))  # a float16 counts to 65,504 only
    passed = (size > threshold * size.mean(dims, keepdim=True)).to(size.dtype)
    alpha = (size * passed).sum(dims, keepdim=True) / passed.sum(dims, keepdim=True).clamp_min(1)
    return sign(w) * passed.to(w.dtype), alpha.to(w.dtype)


class _Ternary(QuantizedLayer, Matrix):
    precision = Precision(weight=2)
    settings: "Ternary"

    def _ternary(self) -> tuple[Tensor, Tensor]:
        return ternary_codes(self.weight.detach(), self.settings.threshold, self.settings.scale)

    def forward(self, x: Tensor) -> Tensor:
        codes, alpha = self._ternary()
        return self.product(x, straight_through(self.weight, alpha * codes), self.bias)

    def weight_codes(self) -> Tensor:
        return self._ternary()[0].to(torch.int8)

    def health(self, x: Tensor) -> dict[str, float]:
        return {"step_size": self._ternary()[1].mean().item()}


class TernaryConv2d(_Ternary, Conv2d):
    """y = conv(x, alpha t) + b.   x (B, C, H, W) -> (B, O, H', W')"""


class TernaryLinear(_Ternary, Linear):
    """y = x (alpha t)^T + b.   x (..., C) -> (..., O)"""


@register("ternary")
@dataclass(frozen=True, kw_only=True)
class Ternary(Quantizer):
    """Settings of Ternary Weight Networks; conf/quant/ternary.yaml says what each one means."""

    threshold: Annotated[float, Gt(0)] = 0.7
    scale: ScaleOf = "filter"

    def layer(self, module: nn.Module) -> nn.Module:
        return rewrite(module, self, TernaryConv2d, TernaryLinear)
