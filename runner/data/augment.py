"""Augmentation of whole batches, with randomness that is a pure function of (seed, epoch, purpose, sample).

Each fast function has a slow twin of the same meaning beside it, written per image; tests hold them equal.
Shapes: N images, C channels, H x W pixels, S = side of a square output; pixels is uint8 (N, C, H, W), x float32 (N, C, H, W).
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number; int64 arithmetic wraps as uint64 does
_MIX_1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX_2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
_CROP_TRIES = 10  # as torchvision's RandomResizedCrop: then the centre of the image is taken


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical shift: torch's >> on int64 copies the sign bit down."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def splitmix64(key: int, counter: Tensor) -> Tensor:
    """Output number `counter` of the generator SplitMix64 with state `key` (Steele et al., OOPSLA 2014), as int64.

    >>> [hex(v & 0xFFFFFFFFFFFFFFFF) for v in splitmix64(1234567, torch.arange(2)).tolist()]
    ['0x599ed017fb08fc85', '0x2c73f08458540fa5']
    """
    bits = (counter + 1) * _GOLDEN + key
    bits = (bits ^ _shift_right(bits, 30)) * _MIX_1
    bits = (bits ^ _shift_right(bits, 27)) * _MIX_2
    return bits ^ _shift_right(bits, 31)


@dataclass(frozen=True)
class Draw:
    """The random numbers of one epoch. No state: any sample can be asked for alone, on any device, in any order."""

    seed: int
    epoch: int

    def bits(self, purpose: str, samples: Tensor) -> Tensor:
        """64 random bits for each sample."""
        digest = hashlib.sha256(f"{self.seed} {self.epoch} {purpose}".encode()).digest()
        return splitmix64(int.from_bytes(digest[:8], "little", signed=True), samples)

    def uniform(self, purpose: str, samples: Tensor) -> Tensor:
        """float64 in [0, 1)."""
        return _shift_right(self.bits(purpose, samples), 11).double() * 2.0**-53

    def integers(self, purpose: str, samples: Tensor, bound: int) -> Tensor:
        """int64 in [0, bound), for bounds below 2**31."""
        return (_shift_right(self.bits(purpose, samples), 32) * bound) >> 32

    def order(self, samples: int) -> Tensor:
        """A permutation of range(samples)."""
        return torch.argsort(self.bits("order", torch.arange(samples)), stable=True)


def crop_flip(pixels: Tensor, top: Tensor, left: Tensor, flip: Tensor, padding: int) -> Tensor:
    """Crop H x W out of the zero-padded image at (top, left), then mirror it where flip is 1.

    All crops and flips are one gather: row `flip` of an offset table, moved by the corner of the crop.
    """
    n, channels, height, width = pixels.shape
    wide = width + 2 * padding
    padded = F.pad(pixels, (padding,) * 4) if padding else pixels
    columns = torch.arange(width, device=pixels.device)
    rows = torch.arange(height, device=pixels.device)[:, None] * wide
    table = torch.stack([rows + columns, rows + columns.flip(0)]).view(2, -1)
    offsets = table.index_select(0, flip).add_((top * wide + left)[:, None])
    flat = padded.reshape(n, channels, -1)
    return flat.gather(2, offsets[:, None].expand(-1, channels, -1)).view(n, channels, height, width)


def crop_flip_slow(pixels: Tensor, top: Tensor, left: Tensor, flip: Tensor, padding: int) -> Tensor:
    _, _, height, width = pixels.shape
    images = []
    for image, y, x, mirrored in zip(pixels, top.tolist(), left.tolist(), flip.tolist(), strict=True):
        crop = F.pad(image, (padding,) * 4)[:, y : y + height, x : x + width]
        images.append(crop.flip(2) if mirrored else crop)
    return torch.stack(images)


@dataclass(frozen=True)
class Normalise:
    """(pixel / 255 - mean) / std as one multiplication and one addition."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, mean: Sequence[float], std: Sequence[float], device: torch.device) -> "Normalise":
        scale = [1 / (255 * s) for s in std]
        shift = [-m / s for m, s in zip(mean, std, strict=True)]
        return cls(torch.tensor(scale, device=device).view(-1, 1, 1), torch.tensor(shift, device=device).view(-1, 1, 1))

    def __call__(self, pixels: Tensor) -> Tensor:
        return pixels.to(torch.float32).mul_(self.scale).add_(self.shift)

    def slow(self, pixels: Tensor) -> Tensor:
        scale, shift = self.scale.flatten().tolist(), self.shift.flatten().tolist()
        images = [
            torch.stack([plane.float() * a + b for plane, a, b in zip(image, scale, shift, strict=True)])
            for image in pixels
        ]
        return torch.stack(images)


def cutout_(x: Tensor, centre_y: Tensor, centre_x: Tensor, side: int) -> Tensor:
    """Set a square around the centre to 0, the mean pixel (DeVries & Taylor, arXiv:1708.04552); in place."""
    top, left = (centre_y - side // 2)[:, None], (centre_x - side // 2)[:, None]
    rows = torch.arange(x.shape[2], device=x.device)
    columns = torch.arange(x.shape[3], device=x.device)
    in_rows = (rows >= top) & (rows < top + side)
    in_columns = (columns >= left) & (columns < left + side)
    outside = ~(in_rows[:, :, None] & in_columns[:, None, :])
    return x.mul_(outside[:, None].float())


def cutout_slow(x: Tensor, centre_y: Tensor, centre_x: Tensor, side: int) -> Tensor:
    images = x.clone()
    for image, y, x in zip(images, centre_y.tolist(), centre_x.tolist(), strict=True):
        top, left = y - side // 2, x - side // 2
        image[:, max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = 0.0
    return images


def resize(x: Tensor, size: int) -> Tensor:
    """Bilinear, antialiased where it shrinks."""
    if x.shape[2:] == (size, size):
        return x
    return F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)


def resize_slow(x: Tensor, size: int) -> Tensor:
    return torch.cat([resize(image[None], size) for image in x])


def crop_boxes(draw: Draw, samples: Tensor, height: int, width: int, scale: Sequence[float]) -> Tensor:
    """Random boxes (top, left, height, width) of the Inception recipe (arXiv:1409.4842, section 6), int64 (N, 4).

    The area is a uniform share in `scale`, the aspect ratio log-uniform in 3/4 … 4/3; the first of ten tries that
    fits is taken, else the whole image is cut to the nearest allowed aspect ratio.
    """
    tries = samples[:, None] * _CROP_TRIES + torch.arange(_CROP_TRIES)
    area = (draw.uniform("crop area", tries) * (scale[1] - scale[0]) + scale[0]) * (height * width)
    aspect = torch.exp((draw.uniform("crop aspect", tries) * 2 - 1) * math.log(4 / 3))
    widths, heights = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    first = fits.int().argmax(1, keepdim=True)
    found = fits.any(1)
    box_width = torch.where(found, widths.gather(1, first)[:, 0], min(width, round(height * 4 / 3)))
    box_height = torch.where(found, heights.gather(1, first)[:, 0], min(height, round(width * 4 / 3)))
    top = draw.uniform("crop top", samples) * (height - box_height + 1)
    left = draw.uniform("crop left", samples) * (width - box_width + 1)
    top = torch.where(found, top.long(), (height - box_height) // 2)
    left = torch.where(found, left.long(), (width - box_width) // 2)
    return torch.stack([top, left, box_height, box_width], 1)


def resized_crop(pixels: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut each image's own box out and resize it to size x size: two batched matrix products, uint8 in and out."""
    n, channels, height, width = pixels.shape
    boxes = boxes.to(pixels.device)
    down = _resampling(boxes[:, 0], boxes[:, 2], height, size)
    across = _resampling(boxes[:, 1], boxes[:, 3], width, size)
    x = torch.bmm(pixels.float().view(n, channels * height, width), across.transpose(1, 2))
    x = torch.matmul(down[:, None], x.view(n, channels, height, size))
    return x.round_().clamp_(0, 255).to(torch.uint8)


def resized_crop_slow(pixels: Tensor, boxes: Tensor, size: int) -> Tensor:
    images = []
    for image, (top, left, height, width) in zip(pixels, boxes.tolist(), strict=True):
        crop = image[None, :, top : top + height, left : left + width].float()
        images.append(resize(crop, size).round().clamp(0, 255).to(torch.uint8))
    return torch.cat(images)


def _resampling(start: Tensor, length: Tensor, pixels: int, size: int) -> Tensor:
    """Weights (N, size, pixels) of the antialiased bilinear filter over [start, start + length)."""
    step = (length.float() / size)[:, None, None]
    outputs = torch.arange(size, device=start.device)[None, :, None]
    inputs = torch.arange(pixels, device=start.device)[None, None, :]
    first, last = start[:, None, None], (start + length)[:, None, None]
    centre = first + (outputs + 0.5) * step
    weights = (1 - (inputs + 0.5 - centre).abs() / step.clamp(min=1)).clamp_(min=0)
    weights = weights * ((inputs >= first) & (inputs < last))
    return weights / weights.sum(2, keepdim=True)


@dataclass(frozen=True)
class Augment:
    """What happens to a training image; the keys of `dataset.augment`."""

    crop: int = 0
    flip: bool = False
    cutout: int = 0
    scale: tuple[float, float] | None = None

    def pixels(self, pixels: Tensor, samples: Tensor, draw: Draw) -> Tensor:
        """Crop and flip, on uint8."""
        if not self.crop and not self.flip:
            return pixels
        corners = 2 * self.crop + 1
        place = draw.integers("crop and flip", samples, corners * corners * 2)
        corner, flip = place >> 1, place & 1
        if not self.flip:
            flip = torch.zeros_like(flip)
        return crop_flip(pixels, corner // corners, corner % corners, flip, self.crop)

    def erase_(self, x: Tensor, samples: Tensor, draw: Draw) -> Tensor:
        """Cutout, on normalised images."""
        if not self.cutout:
            return x
        centre_y = draw.integers("cutout y", samples, x.shape[2])
        centre_x = draw.integers("cutout x", samples, x.shape[3])
        return cutout_(x, centre_y, centre_x, self.cutout)
