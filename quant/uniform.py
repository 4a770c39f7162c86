"""Uniform quantization between a minimum and a maximum (the GEMMLOWP scheme of arXiv 1805.11046 and 1712.05877).

A grid has 2^bits equally spaced values, with codes from 0 to 2^bits - 1. There are two for the same range:

    zero_exact=False    code = clamp(round((x - min) / step))     x_q = code step + min        step = (max - min) / (2^bits - 1)
    zero_exact=True     code = clamp(round(x / step) + zero)      x_q = (code - zero) step     zero = ceil(-min / step)

The first has exact end points, and 0 is generally none of its values. On the second zero is exact: padding, ReLU zeros and
masked gradients stay zero, and an integer kernel needs no correction for them. Where 0 lies inside the range one of the
2^bits - 1 steps pays for it. Both cover the whole range, so stochastic rounding is unbiased on both: nothing is clipped.

    dL/dx = dL/dx_q                                                          straight through

also where x lies outside the grid: ranges here are measured, so hardly anything does, and an activation above the mean
range of its batch still learns. Half and bfloat16 are measured and rounded in float32. Ranges stay tensors: nothing waits
for the device.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from quant import fused
from quant.functional import stochastic_round, straight_through
from quant.matmul import Scaled


class Grid(NamedTuple):
    """x_q = (code - offset) step on a grid with an exact zero, else code step + offset. Both broadcast against x."""

    step: Tensor
    offset: Tensor
    zero_exact: bool


def grid(low: Tensor, high: Tensor, bits: int, zero_exact: bool = True) -> Grid:
    """The grid of 2^bits values that covers [low, high]; an empty range gives the smallest step, never a division by zero.

    >>> def values(g: Grid) -> list[float]:
    ...     return [round(v, 4) for v in decode(torch.arange(4, dtype=torch.uint8), g).tolist()]
    >>> values(grid(torch.tensor(-1.0), torch.tensor(1.4), 2, zero_exact=False))
    [-1.0, -0.2, 0.6, 1.4]
    >>> values(grid(torch.tensor(-1.0), torch.tensor(1.4), 2))
    [-1.2, 0.0, 1.2, 2.4]
    >>> values(grid(torch.tensor(0.0), torch.tensor(1.5), 2))
    [0.0, 0.5, 1.0, 1.5]
    """
    wide = torch.promote_types(low.dtype, torch.float32)
    low, high = low.to(wide), high.to(wide)
    top, tiny = 2**bits - 1, torch.finfo(wide).tiny
    if not zero_exact:
        return Grid((high / top - low / top).clamp_min(tiny), low, False)
    low, high = low.clamp_max(0), high.clamp_min(0)
    steps = top - ((low < 0) & (high > 0)).to(wide)
    step = (high / steps - low / steps).clamp_min(tiny)
    return Grid(step, torch.ceil(-low / step).clamp_max(top), True)


def round_to(x: Tensor, grid: Grid, bits: int, stochastic: bool = False) -> Tensor:
    """x_q in the dtype of x, nearest (ties to even) or stochastically, where E[x_q] = x inside the grid. No gradient."""
    if grid.step.numel() == 1 and fused.usable(x):
        from quant.kernels import elementwise

        low, zero = (0.0, grid.offset) if grid.zero_exact else (grid.offset, 0.0)
        seed = elementwise.new_seed() if stochastic else 0
        return elementwise.round_to_grid(x, grid.step, low, zero, 2**bits - 1, seed)
    return _value(_code(x, grid, bits, stochastic), grid).to(x.dtype)


def encode(x: Tensor, grid: Grid, bits: int) -> Tensor:
    """The codes of x, 0 .. 2^bits - 1: uint8 up to 8 bits, else int16 after subtracting 2^15."""
    if bits <= 8 and grid.zero_exact and grid.step.numel() == 1 and fused.usable(x):
        from quant.kernels import elementwise

        return elementwise.encode(x, grid.step, -grid.offset, 2**bits - 1 - grid.offset)[0]
    code = _code(x, grid, bits)
    return code.to(torch.uint8) if bits <= 8 else code.sub_(2**15).to(torch.int16)


def decode(codes: Tensor, grid: Grid) -> Tensor:
    """The values of codes, in the dtype of the step: bit for bit what `round_to` gave for float32 and float64.

    >>> g = grid(torch.tensor(-1.0), torch.tensor(1.8), 8)
    >>> x = torch.tensor([-1.0, 0.0, 0.3, 1.8])
    >>> torch.equal(decode(encode(x, g, 8), g), round_to(x, g, 8))
    True
    """
    if codes.dtype == torch.uint8 and grid.step.numel() == 1 and fused.usable(grid.step, size=codes.numel()):
        from quant.kernels import elementwise

        zero, low = (grid.offset, 0.0) if grid.zero_exact else (0.0, grid.offset)
        return elementwise.decode(codes, zero, grid.step, low)
    code = codes.to(grid.step.dtype)
    return _value(code.add_(2**15) if codes.dtype == torch.int16 else code, grid)


def _code(x: Tensor, grid: Grid, bits: int, stochastic: bool = False) -> Tensor:
    """Codes as floats, always in memory of their own."""
    x = x.to(grid.step.dtype)
    scaled = x / grid.step if grid.zero_exact else (x - grid.offset).div_(grid.step)
    code = stochastic_round(scaled) if stochastic else scaled.round_()
    if grid.zero_exact:
        code.add_(grid.offset)
    return code.clamp_(0, 2**bits - 1)


def _value(code: Tensor, grid: Grid) -> Tensor:
    if grid.zero_exact:
        return code.sub_(grid.offset).mul_(grid.step)
    return code.mul_(grid.step).add_(grid.offset)


def fake_quantize(x: Tensor, grid: Grid, bits: int) -> Tensor:
    """The value of x on the grid, with the gradient of the identity (arXiv 1805.11046, section 4: no range mask).

    >>> x = torch.tensor([-3.0, 0.1, 0.6], requires_grad=True)
    >>> y = fake_quantize(x, grid(torch.tensor(0.0), torch.tensor(3.0), 2), 2)
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([0.0, 0.0, 1.0], [1.0, 1.0, 1.0])
    """
    return straight_through(x, round_to(x.detach(), grid, bits))


def span(x: Tensor, bits: int, zero_exact: bool = True) -> Grid:
    """The grid of a whole tensor, between its minimum and its maximum; of nothing, between 0 and 0."""
    x = x.detach() if x.numel() else x.new_zeros(1)
    return grid(x.amin(), x.amax(), bits, zero_exact)


def row_limits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of every x[i], kept broadcastable: of a weight (O, ...) those of each output filter."""
    dims = tuple(range(1, x.dim()))
    x = x.detach()
    return x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)


def mean_sample_limits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of every sample of a batch (B, ...), averaged over the batch: an outlier moves them by 1/B only.

    Of nothing, 0 and 0.
    """
    low, high = row_limits(x if x.numel() else x.new_zeros(1, 1))
    wide = torch.promote_types(x.dtype, torch.float32)
    return low.mean(dtype=wide), high.mean(dtype=wide)


@dataclass(frozen=True)
class GridCodes:
    """What a matrix product keeps of an input that lies on a grid: its integer codes (a `quant.matmul.Codec`)."""

    grid: Grid
    bits: int

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return encode(x, self.grid, self.bits), self.grid.step, self.grid.offset

    def decode(self, *saved: Tensor) -> Tensor:
        codes, step, offset = saved
        return decode(codes, Grid(step, offset, self.grid.zero_exact))

    def numbers(self, *saved: Tensor) -> Scaled:
        """code - zero and the step, of at most 8 bits and with an exact zero."""
        codes, step, zero = saved
        return Scaled(codes.to(torch.bfloat16) - zero.to(torch.bfloat16), step)


@dataclass(frozen=True)
class GradientRounding:
    """Rounds a gradient between its own minimum and maximum over the whole tensor (arXiv 1805.11046, section 4.2).

    Stochastically by default, from torch's generator: E[result] = g, so the noise averages out over steps and elements.
    """

    bits: int
    zero_exact: bool = True
    stochastic: bool = True

    def __call__(self, g: Tensor) -> Tensor:
        return round_to(g, span(g, self.bits, self.zero_exact), self.bits, self.stochastic)


class RunningRange(nn.Module):
    """The grid of an activation: measured on the batch while training, from running ranges in eval.

    Running ranges follow torch's convention, run = (1 - momentum) * run + momentum * new, and begin as the plain mean of
    the first 1 / momentum batches instead of at zero. In eval before any batch was seen, the batch itself is measured.
    """

    low: Tensor
    high: Tensor
    batches: Tensor

    def __init__(self, bits: int, momentum: float, zero_exact: bool, like: Tensor | None = None) -> None:
        super().__init__()
        self.bits, self.momentum, self.zero_exact = bits, momentum, zero_exact
        for name in ("low", "high"):
            self.register_buffer(name, torch.zeros(()) if like is None else like.detach().new_zeros(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64, device=self.low.device))

    def forward(self, x: Tensor) -> Grid:
        low, high = mean_sample_limits(x)
        if self.training:
            if x.numel():
                self._remember(low, high)
        else:
            seen = self.batches > 0
            low, high = (
                torch.where(seen, self.low.to(low.dtype), low),
                torch.where(seen, self.high.to(high.dtype), high),
            )
        return grid(low, high, self.bits, self.zero_exact)

    def calibrate_(self, x: Tensor) -> None:
        """Begin anew with the ranges of x."""
        self.batches.zero_()
        if x.numel():
            self._remember(*mean_sample_limits(x))

    def health(self, x: Tensor) -> dict[str, float]:
        """`clip_ratio`: the share of x outside the mean range of its samples. `step_size`: the step of that range."""
        low, high = mean_sample_limits(x)
        outside = ((x < low) | (x > high)).float().mean()
        return {"clip_ratio": outside.item(), "step_size": grid(low, high, self.bits, self.zero_exact).step.item()}

    def _remember(self, low: Tensor, high: Tensor) -> None:
        with torch.no_grad():
            share = (1 / (self.batches + 1).to(self.low.dtype)).clamp_min(self.momentum)
            self.low.lerp_(low.to(self.low.dtype), share)
            self.high.lerp_(high.to(self.high.dtype), share)
            self.batches.add_(1)
