"""8-bit training with gradient bifurcation and Range BN (Banner, Hubara, Hoffer, Soudry 2018, arXiv 1805.11046).

    forward     y = Q8(x) * Q8(w) + Q16(b)             x: mean min and max of the samples, w: min and max of each filter
    backward    dx = SR8(g) * Q8(w)^T                  the gradient that goes on to the layer before: 8 bits, stochastic
                dw = SR16(g) * Q8(x)^T                 a better copy for the weights (8, 16 or 32 bits)
                db = sum g
    all Q are straight through: dL/dx = dL/dQ(x), without a range mask                                        section 4

One forward product serves both gradients (`quant.matmul`); the reference code computes it twice to get two graphs. What is
kept for backward are the codes of x, a byte a value. Batch normalisation becomes Range BN (`quant.range_bn`).
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Interval, Le
from torch import Tensor, nn

from quant.base import FLOAT, Precision, QuantizedLayer, Quantizer, register
from quant.frugal import MaskedReLU
from quant.layers import Conv2d, Linear, Matrix, rewrite
from quant.matmul import GradientMap
from quant.range_bn import RangeBatchNorm1d, RangeBatchNorm2d, Scale
from quant.uniform import GradientRounding, Grid, GridCodes, RunningRange, encode, fake_quantize, grid, row_limits, span


class _EightBit(QuantizedLayer, Matrix):
    """What convolution and linear layer share."""

    settings: "EightBit"
    geometry: Any  # matmul.Conv or matmul.Linear

    def prepare(self) -> None:
        of = self.settings
        self.precision = Precision(of.weight_bits, of.act_bits, of.grad_in_bits)
        self.input_range = of.running_range(self.weight)
        self.maps: dict[str, GradientMap] = {"grad_input": of.gradient(of.grad_in_bits)}
        if of.grad_weight_bits != FLOAT:
            self.maps["grad_weight"] = of.gradient(of.grad_weight_bits)

    def forward(self, x: Tensor) -> Tensor:
        of = self.settings
        x_grid = self.input_range(x)
        x = fake_quantize(x, x_grid, of.act_bits)
        w_grid = self._weight_grid()
        w = fake_quantize(self.weight, w_grid, of.weight_bits)
        bias = self.bias
        if bias is not None:
            bias = fake_quantize(bias, span(bias, of.bias_bits, of.zero_exact), of.bias_bits)
        return self.product(x, w, bias, GridCodes(x_grid, of.act_bits), w_grid.step, **self.maps)

    def _weight_grid(self) -> Grid:
        return grid(*row_limits(self.weight), self.settings.weight_bits, self.settings.zero_exact)

    def backward_in_bf16_(self) -> bool:
        """Codes of at most 8 bits lose nothing in bfloat16, if their zero is one of them."""
        of = self.settings
        whole = of.zero_exact and max(of.weight_bits, of.act_bits) <= 8
        if whole:
            self.geometry = replace(self.geometry, bf16=True)
        return whole

    @torch.no_grad()
    def calibrate_(self, x: Tensor) -> None:
        self.input_range.calibrate_(x)

    @torch.no_grad()
    def weight_codes(self) -> Tensor:
        """Codes 0 .. 2^bits - 1 of the weights, shifted down by half of that: int8 up to 8 bits, else int16."""
        bits = self.settings.weight_bits
        codes = encode(self.weight, self._weight_grid(), bits)
        if bits > 8:
            return codes.add_(2**15 - 2 ** (bits - 1))
        return codes.to(torch.int16).sub_(2 ** (bits - 1)).to(torch.int8)

    @torch.no_grad()
    def health(self, x: Tensor) -> dict[str, float]:
        return self.input_range.health(x)


class EightBitConv2d(_EightBit, Conv2d):
    """y = conv(Q(x), Q(w)) + Q(b).   x (B, C, H, W) -> (B, O, H', W')"""


class EightBitLinear(_EightBit, Linear):
    """y = Q(x) Q(w)^T + Q(b).   x (B, ..., C) -> (B, ..., O)"""


@register("8bit-rangebn")
@dataclass(frozen=True, kw_only=True)
class EightBit(Quantizer):
    """Settings of 8-bit training; conf/quant/8bit-rangebn.yaml says what each one means.

    The gradient that reaches the layer before comes from 8 bits, that of the weights from a better copy:

    >>> layer = EightBit(grad_rounding="nearest").layer(nn.Linear(3, 2))
    >>> x, g = torch.randn(4, 3, requires_grad=True), torch.randn(4, 2)
    >>> layer(x).backward(g)
    >>> bool((g.T @ fake_quantize(x, layer.input_range(x), 8) - layer.weight.grad).abs().max() < 1e-5)
    True
    >>> g8 = GradientRounding(8, stochastic=False)(g)
    >>> w8 = fake_quantize(layer.weight, grid(*row_limits(layer.weight), 8), 8)
    >>> torch.allclose(x.grad, g8 @ w8)
    True
    """

    handles = (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.ReLU)

    weight_bits: Annotated[int, Interval(ge=2, le=16)] = 8
    act_bits: Annotated[int, Interval(ge=2, le=16)] = 8
    bias_bits: Annotated[int, Interval(ge=2, le=16)] = 16
    grad_in_bits: Annotated[int, Interval(ge=2, le=16)] = 8
    grad_weight_bits: Literal[8, 16, 32] = 32
    grad_rounding: Literal["stochastic", "nearest"] = "stochastic"
    zero_exact: bool = True
    momentum: Annotated[float, Gt(0), Le(1)] = 0.1
    range_bn: bool = True
    scale: Scale = "d2"
    chunks: Annotated[int, Ge(1)] = 16
    quantize_bn: bool = True

    def layer(self, module: nn.Module) -> nn.Module | None:
        if isinstance(module, nn.ReLU):
            return MaskedReLU()  # the layer behind it keeps codes, so that nobody needs its float output
        if not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            return rewrite(module, self, EightBitConv2d, EightBitLinear)
        if not self.range_bn:
            return None
        new = RangeBatchNorm2d(module) if isinstance(module, nn.BatchNorm2d) else RangeBatchNorm1d(module)
        new.chunks, new.scale = self.chunks, self.scale
        if self.quantize_bn:
            like = module.running_mean if module.running_mean is not None else module.weight
            new.quantize(self.running_range(like), self.gradient(self.grad_in_bits))
        return new

    def running_range(self, like: Tensor | None) -> RunningRange:
        """The grid of an activation, its buffers on the device of `like`."""
        return RunningRange(self.act_bits, self.momentum, self.zero_exact, like)

    def gradient(self, bits: int) -> GradientRounding:
        """The rounding of a gradient."""
        return GradientRounding(bits, self.zero_exact, self.grad_rounding == "stochastic")
