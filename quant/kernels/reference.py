"""What the packed kernels compute, in plain torch and straight from the definition: slow, for any machine, and their test."""

import torch
from torch import Tensor
from torch.nn import functional as F

_SHIFTS = torch.arange(32, dtype=torch.int32)


def _words(bits: Tensor) -> Tensor:
    """bool (N, C, H, W) -> int32 (N, ceil(C / 32), H, W): channel c in bit c % 32 of word c // 32."""
    padded = F.pad(bits.to(torch.int32), (0, 0, 0, 0, 0, -bits.shape[1] % 32))
    images, channels, height, width = padded.shape
    shifted = padded.view(images, channels // 32, 32, height, width) << _SHIFTS.view(32, 1, 1)
    return shifted.sum(2, dtype=torch.int32)


def _bits(words: Tensor, channels: int) -> Tensor:
    """The inverse: bool (N, channels, H, W)."""
    spread = words.unsqueeze(2) >> _SHIFTS.view(32, 1, 1)
    return (spread.flatten(1, 2)[:, :channels] & 1).bool()


def pack_activations(x: Tensor) -> Tensor:
    """A set bit for every x < 0 (so that -0.0 counts as +1).

    >>> pack_activations(torch.tensor([1.0, -2.0, -0.0, -0.5]).view(1, 4, 1, 1)).item()  # bits 1 and 3
    10
    """
    return _words(x < 0)


def pack_with_mask(x: Tensor) -> tuple[Tensor, Tensor]:
    """Signs, and a set bit for every |x| <= 1."""
    return pack_activations(x), _words(x.abs() <= 1)


def unpack_signs(packed: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return (1 - 2 * _bits(packed, shape[1]).to(dtype)).view(shape)


def masked(grad: Tensor, packed_mask: Tensor) -> Tensor:
    return grad * _bits(packed_mask, grad.shape[1])


def popcount(words: Tensor) -> Tensor:
    """Set bits of every int32 word: sums of neighbouring 1, 2, then 4 bits, and of the four bytes by a product.

    >>> popcount(torch.tensor([0, 1, 10, -1], dtype=torch.int32))
    tensor([ 0,  1,  2, 32], dtype=torch.int32)
    """
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return (words * 0x01010101) >> 24


def binary_conv2d(
    x: Tensor, w: Tensor, *, stride: tuple[int, int] = (1, 1), padding: tuple[int, int] = (0, 0)
) -> Tensor:
    """conv2d(sign(x), sign(w)) with zero padding: over the taps that lie in the image, sum of C - 2 popcount(x ^ w)."""
    sides = (padding[1], padding[1], padding[0], padding[0])

    def windows(image: Tensor) -> Tensor:  # (N, words, H', W', KH, KW)
        padded = F.pad(image, sides)
        return padded.unfold(2, w.shape[2], stride[0]).unfold(3, w.shape[3], stride[1])

    words, filters = windows(pack_activations(x)), pack_activations(w)
    inside = windows(torch.ones(1, 1, *x.shape[2:], dtype=torch.int32))
    sums = []
    for filter_words in filters:
        different = popcount(words ^ filter_words[:, None, None])
        agreement = x.shape[1] * inside - 2 * (different * inside).sum(1, keepdim=True)
        sums.append(agreement.sum((1, 4, 5)))
    return torch.stack(sums, 1).to(torch.float32)
