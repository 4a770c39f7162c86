"""Packed weights: signs in the order in which a tile reads them, and the table that makes zero padding exact."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from quant.kernels.conv import SHAPES
from quant.kernels.machine import Processor, processor
from quant.kernels.packing import pack_activations
from quant.kernels.reference import popcount

# 16 bits must hold the popcount of a kernel row; beyond that the portable path, which sums in 32 bits, takes over.
MOST_BITS_OF_AVX2_ROW = 65504


@dataclass(frozen=True)
class PackedWeight:
    """Signs of a weight (O, C, KH, KW), 1 bit each, for one code path of the processor.

    words   int32 (blocks, KH, KW ceil(C / 32), 16 channels); on the avx2 path uint8 (blocks, KH, KW ceil(C / 32) 8, 32),
            a nibble in every byte; memory starts at a multiple of 64 bytes (torch sees to that)
    base    int32 (KH + 1, border classes of columns, channels padded): sums over the first 0..KH kernel rows of
            C (taps in the image) + 2 (negative weights outside), so that rows first..last give base[last] - base[first]
    """

    words: Tensor
    base: Tensor
    ones: Tensor
    zeros: Tensor
    out_channels: int
    in_channels: int
    kernel_size: tuple[int, int]
    padding: tuple[int, int]
    processor: Processor

    @property
    def nbytes(self) -> int:
        """Memory of the packed signs."""
        return self.words.nbytes


def pack_weight(w: Tensor, padding: int | tuple[int, int] = 0, *, path: Processor | None = None) -> PackedWeight:
    """Pack the signs of w (O, C, KH, KW) of a convolution with this zero padding, or of w (O, C) of a linear layer.

    A weight (O, C) is a kernel of 1 x 1: `binary_linear` takes its rows as (..., C), `binary_conv2d` as (N, C, 1, 1).
    `path` forces a code path (for tests); the default is the fastest that this processor has. Raises ValueError for other
    shapes and for a padding below 0.
    """
    if w.ndim not in (2, 4) or min(w.shape) == 0:
        raise ValueError(f"a weight to pack has the shape (O, C, KH, KW) or (O, C), not {tuple(w.shape)}")
    sides = (padding, padding) if isinstance(padding, int) else padding
    if min(sides) < 0:
        raise ValueError(f"padding: {padding}, accepted: 0 or more")  # the kernel would read beside the image
    w = w.detach().reshape(*w.shape[:2], *(w.shape[2:] or (1, 1)))
    out_channels, in_channels, height, width = w.shape
    chosen = path or processor()
    if chosen == "avx2" and width * in_channels > MOST_BITS_OF_AVX2_ROW:
        chosen = "portable"
    lanes = SHAPES[chosen].lanes
    signs = F.pad(pack_activations(w.contiguous()), (0, 0, 0, 0, 0, 0, 0, -out_channels % lanes))
    return PackedWeight(
        words=_in_reading_order(signs, lanes),
        base=_border_table(signs, in_channels, sides[1]),
        ones=torch.ones(len(signs)),
        zeros=torch.zeros(len(signs)),
        out_channels=out_channels,
        in_channels=in_channels,
        kernel_size=(height, width),
        padding=sides,
        processor=chosen,
    )


def _in_reading_order(signs: Tensor, lanes: int) -> Tensor:
    """(O, words, KH, KW) -> (blocks, KH, KW words, lanes); for 32 lanes every word becomes 8 bytes, a nibble in each.

    There channels i and 16 + i lie side by side: the tile adds up even bytes, then odd ones.
    """
    blocks = signs.view(-1, lanes, *signs.shape[1:]).permute(0, 3, 4, 2, 1)
    if lanes == 32:
        shifts = torch.arange(0, 32, 4, dtype=torch.int32).view(8, 1)
        blocks = ((blocks.unsqueeze(-2) >> shifts) & 15).to(torch.uint8).flatten(3, 4)
        blocks = blocks.view(*blocks.shape[:-1], 2, 16).transpose(-1, -2).flatten(-2)
    return blocks.flatten(2, 3).contiguous()


def _border_table(signs: Tensor, channels: int, padding: int) -> Tensor:
    """`base` of PackedWeight. A class of columns is how many kernel columns stick out of the image, left and right."""
    kernel = signs.shape[3]
    side = min(padding, kernel) + 1
    first = torch.arange(side).repeat_interleave(side)
    last = torch.maximum(kernel - torch.arange(side).repeat(side), first)
    negative = popcount(signs).sum(1, dtype=torch.int32)  # (O, KH, KW)
    up_to = F.pad(negative.cumsum(2, dtype=torch.int32), (1, 0))
    outside = up_to[:, :, -1:] - up_to[:, :, last] + up_to[:, :, first]
    rows = channels * (last - first).to(torch.int32) + 2 * outside  # (O, KH, classes)
    return F.pad(rows.cumsum(1, dtype=torch.int32), (0, 0, 1, 0)).permute(1, 2, 0).contiguous()
