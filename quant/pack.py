"""Codes of 1, 2 or 4 bits, packed into bytes, and back.

A byte holds 8/bits codes. They are taken from as many planes: with n bytes in all, byte j holds codes j, j+n, j+2n, … from
its lowest bits up. Every plane is contiguous, so packing is a few whole-tensor additions and unpacking a few shifts, at memory
speed on any device and inside a compiled graph.

>>> pack(torch.tensor([1, 2, 3, 0, 2], dtype=torch.uint8), bits=2)  # bytes 1 + 4*3 + 16*2 and 2 + 4*0
tensor([45,  2], dtype=torch.uint8)
>>> unpack(_, 2, (5,))
tensor([1, 2, 3, 0, 2], dtype=torch.uint8)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

WIDTHS = (1, 2, 4, 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes of any shape, each below 2^bits -> uint8 (ceil(n bits / 8)).

    Raises ValueError for another width or dtype. A code that is too large spoils its neighbours: this is not checked.
    """
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, not {codes.dtype}")
    per_byte = codes_per_byte(bits)
    flat = codes.reshape(-1)
    if flat.numel() % per_byte:
        flat = F.pad(flat, (0, -flat.numel() % per_byte))
    *lower, packed = flat.view(per_byte, flat.numel() // per_byte).unbind()
    for plane in reversed(lower):
        packed = torch.add(plane, packed, alpha=1 << bits)
    return packed


def unpack(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """The uint8 codes that `pack` was given, in `shape`. Raises ValueError for another width."""
    per_byte, mask = codes_per_byte(bits), (1 << bits) - 1
    if per_byte == 1:
        return packed.view(tuple(shape))
    top = per_byte - 1
    planes = [packed & mask, *((packed >> bits * k) & mask for k in range(1, top)), packed >> bits * top]
    return torch.cat(planes)[: prod(shape)].view(tuple(shape))


def pack_bits(mask: Tensor) -> Tensor:
    """A bool tensor of any shape -> uint8 (ceil(n / 8)).

    >>> pack_bits(torch.tensor([True, False, True]))
    tensor([5], dtype=torch.uint8)
    """
    return pack(mask.view(torch.uint8), 1)


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool tensor that `pack_bits` was given, in `shape`."""
    return unpack(packed, 1, shape).view(torch.bool)


@dataclass(frozen=True)
class Layout:
    """The shape of a tensor and the order in which its values lie in memory: what is stored is packed in that order.

    >>> x = torch.tensor([[True, False, True]])
    >>> layout = Layout.of(x)
    >>> (layout.pack_flags(x).tolist(), layout.unpack_flags(layout.pack_flags(x)).tolist())
    ([5], [[True, False, True]])
    """

    shape: tuple[int, ...]
    channels_last: bool = False

    @classmethod
    def of(cls, x: Tensor) -> Self:
        last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        return cls(tuple(x.shape), last)

    @property
    def count(self) -> int:
        return prod(self.shape)

    def flat(self, x: Tensor) -> Tensor:
        """The values of `x` in memory order, without a copy where it is dense."""
        return (x.permute(0, 2, 3, 1) if self.channels_last else x).reshape(-1)

    def restore(self, flat: Tensor) -> Tensor:
        """The inverse of `flat`: a view with the shape and the strides of the tensor that this is the layout of."""
        if not self.channels_last:
            return flat.view(self.shape)
        batch, channels, height, width = self.shape
        return flat.view(batch, height, width, channels).permute(0, 3, 1, 2)

    def pack_flags(self, flags: Tensor) -> Tensor:
        """A bool tensor of this layout at 1 bit a value."""
        return pack_bits(self.flat(flags))

    def unpack_flags(self, packed: Tensor) -> Tensor:
        """The inverse of `pack_flags`."""
        return self.restore(unpack_bits(packed, (self.count,)))


def pack_slowly(codes: Tensor, bits: int) -> Tensor:
    """The definition of `pack`, one code after the other. Its twin in the tests; use `pack`."""
    flat: list[int] = codes.flatten().tolist()
    size = -(-len(flat) // codes_per_byte(bits))
    packed = [0] * size
    for i, code in enumerate(flat):
        packed[i % size] |= code << bits * (i // size)
    return torch.tensor(packed, dtype=torch.uint8)


def codes_per_byte(bits: int) -> int:
    """8/bits. Raises ValueError where a byte does not hold a whole number of codes."""
    if bits not in WIDTHS:
        raise ValueError(f"codes of {bits} bits cannot be packed; accepted: {', '.join(map(str, WIDTHS))}")
    return 8 // bits
