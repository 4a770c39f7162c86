"""Copies of k bits of a tensor, kept for backward: the codecs (`quant.matmul.Codec`) of `quant.actgrad`.

    y -> packed codes, and a few numbers for each group of values -> Q(y)

`Uniform` has equally spaced values from the smallest to the largest of a group (Chakrabarti, Moseley, arXiv 1901.07988, store
activations so; the range of each group is ActNN's, arXiv 2104.14129). `PowerOfTwo` has the levels of arXiv 1510.03009.
With stochastic rounding E[Q(y)] = y in both (to 2^-17 of a step), and for `Uniform` Var[Q(y)] <= step^2 / 4.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from quant import fused
from quant.pack import Layout, pack, unpack

ZERO_EXPONENT = -(1 << 14)  # stands for log2(0): below every exponent that a float has


@dataclass(frozen=True)
class GroupCodes(ABC):
    """`bits` a value, and a range for each `group` of values that are neighbours in memory (None: one for the tensor)."""

    layout: Layout
    dtype: torch.dtype
    bits: int
    stochastic: bool
    group: int | None

    @classmethod
    def of(cls, x: Tensor, bits: int, *, stochastic: bool = False, group: int | None = None) -> Self:
        """The codec for tensors like `x`. Half and bfloat16 are coded by way of float32."""
        return cls(Layout.of(x), torch.promote_types(x.dtype, torch.float32), bits, stochastic, group)

    @abstractmethod
    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """x -> packed codes, and what describes the groups: all that is kept."""

    @abstractmethod
    def decode(self, *saved: Tensor) -> Tensor:
        """What `encode` gave -> Q(x), with the shape and the strides of x."""

    @property
    def group_size(self) -> int:
        return max(self.layout.count if self.group is None else min(self.group, self.layout.count), 1)

    def rows(self, x: Tensor) -> Tensor:
        """x -> (groups, group_size); the last value is repeated until the last group is full."""
        flat = self.layout.flat(x).to(self.dtype)
        missing = -flat.numel() % self.group_size
        if missing:
            flat = torch.cat([flat, flat[-1:].expand(missing)])
        return flat.view(-1, self.group_size)

    def unpacked(self, packed: Tensor, groups: int) -> Tensor:
        return unpack(packed, self.bits, (groups, self.group_size))

    def tensor(self, rows: Tensor) -> Tensor:
        """The inverse of `rows`."""
        return self.layout.restore(rows.view(-1)[: self.layout.count])


class Uniform(GroupCodes):
    """2^bits equally spaced values from the smallest to the largest of a group: Q(y) = lo + c step, c = round((y - lo) / step).

    >>> y = torch.tensor([0.0, 0.2, 0.7, 3.0])
    >>> codec = Uniform.of(y, bits=2)
    >>> codec.decode(*codec.encode(y))
    tensor([0., 0., 1., 3.])
    """

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        rows, top, numbers = self.rows(x), (1 << self.bits) - 1, torch.finfo(self.dtype)
        if fused.usable(rows):
            from quant.kernels import elementwise

            codes, lo, step = elementwise.encode_groups(rows, top, elementwise.new_seed() if self.stochastic else 0)
            return pack(codes, self.bits), lo, step
        widest = numbers.max / 4  # so that hi - lo is a number, also when rounded; values beyond are clipped
        lo = rows.amin(1, keepdim=True).clamp(-widest, widest)
        hi = rows.amax(1, keepdim=True).clamp(-widest, widest)
        step = (hi - lo) / top
        inverse = torch.where(step < numbers.tiny, 0.0, 1 / step)  # a constant group has code 0 only
        codes = (rows - lo).mul_(inverse)
        codes = _round_to_either_(codes) if self.stochastic else codes.round_()
        return pack(codes.clamp_(0, top).to(torch.uint8), self.bits), lo, step

    def decode(self, *saved: Tensor) -> Tensor:
        packed, lo, step = saved
        if fused.usable(step, size=self.layout.count):
            from quant.kernels import elementwise

            return self.tensor(elementwise.decode_groups(self.unpacked(packed, len(lo)), lo, step))
        return self.tensor(self.unpacked(packed, len(lo)).to(self.dtype).mul_(step).add_(lo))


class PowerOfTwo(GroupCodes):
    """Q(y) = sign(y) 2^e, e = round(log2 |y|), for the highest exponents of a group; smaller values become zero.

    A code is e counted from below, 0 for the value 0. A group that holds a negative value spends a bit on the sign: it has
    2^(bits-1) - 1 exponents, the others have 2^bits - 1. `stochastic` rounds to one of the two neighbouring powers (or to
    zero below the lowest) with the odds that make the expectation y.

    >>> y = torch.tensor([0.0, 0.6, -0.8, 3.0])
    >>> codec = PowerOfTwo.of(y, bits=4)
    >>> codec.decode(*codec.encode(y))
    tensor([ 0.0000,  0.5000, -1.0000,  4.0000])
    """

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        rows = self.rows(x)
        negative, exponent = rows < 0, self.round_exponent(rows)
        top, signed = exponent.amax(1, keepdim=True), negative.any(1, keepdim=True)
        code = exponent - top + self.exponents(signed)
        if self.stochastic:  # a power below the lowest becomes the lowest with odds 2^(code - 1), else zero
            odds = torch.ldexp(torch.ones_like(rows), code - 1)
            code = torch.where((code < 1) & (torch.rand_like(rows) < odds), 1, code)
        code = code.clamp(min=0) + (negative.int() << self.bits - 1)
        return pack(code.to(torch.uint8), self.bits), top.to(torch.int16), signed

    def round_exponent(self, y: Tensor) -> Tensor:
        """e of the power that |y| is rounded to. Exact: |y| = m 2^e with m in [1/2, 1) is read off the float, no logarithm."""
        mantissa, exponent = torch.frexp(y.abs())
        up = torch.rand_like(y) < 2 * mantissa - 1 if self.stochastic else mantissa >= 0.5**0.5
        largest = math.frexp(torch.finfo(self.dtype).max)[1] - 1
        return (exponent - (~up).int()).clamp(max=largest).masked_fill(y == 0, ZERO_EXPONENT)

    def decode(self, *saved: Tensor) -> Tensor:
        packed, top, signed = saved
        code, half = self.unpacked(packed, len(top)).int(), 1 << self.bits - 1
        negative = signed & (code >= half)
        code = torch.where(negative, code - half, code)
        sign = 1 - 2 * negative.to(self.dtype)
        power = torch.ldexp(sign, code + top - self.exponents(signed))
        return self.tensor(power.masked_fill(code == 0, 0.0))

    def exponents(self, signed: Tensor) -> Tensor:
        return torch.where(signed, (1 << self.bits - 1) - 1, (1 << self.bits) - 1).int()


def _round_to_either_(x: Tensor) -> Tensor:
    """round(x + U), U uniform in [-1/2, 1/2): as `quant.functional.stochastic_round`, in place, with U of 16 random bits.

    A quarter of the random numbers: on a CPU they cost more than all the rest of a codec. E[result] is x to 2^-17.
    """
    noise = torch.randint(-(1 << 63), (1 << 63) - 1, (-(-x.numel() // 4),), device=x.device).view(torch.int16)
    return x.add_(noise[: x.numel()].view(x.shape), alpha=2.0**-16).round_()
