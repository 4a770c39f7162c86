"""Floats to packed bits and back, at the speed of memory: signs, the mask |x| <= 1, +-1 again, masked gradients.

Packed bits are an int32 tensor (N, ceil(C / 32), H, W) in the memory format of the tensor they came from: an image whose
channels are words. Channel c stands in bit c % 32 of word c // 32; in signs, a set bit means -1; unused bits are 0.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from quant.kernels.bits import (
    SPAN,
    mask_pixel,
    mask_span,
    pack_pixel,
    pack_pixel_and_mask,
    pack_span,
    pack_span_and_mask,
    unpack_pixel,
    unpack_pixel_half,
    unpack_span,
    unpack_span_half,
)
from quant.kernels.intrinsics import LANES, address_of, least, record_at, ticket
from quant.kernels.machine import compiled, inlined, run, threads_for

HALF_TYPES = {torch.bfloat16: 0x3F80, torch.float16: 0x3C00}  # the bits of +1
SPAN_PIXELS = LANES * SPAN
PIXELS_PER_TASK = 1024
SMALL = 1 << 15  # floats that one thread packs sooner than a team starts


class PackJob(NamedTuple):
    """One pass over a tensor of floats and its bits. `second` is another tensor of bits, or of floats, or 0."""

    unused: int
    tickets: int  # a counter that starts at 0: the next task
    floats: int
    bits: int
    second: int
    tasks: int
    float_size: int
    second_per_float: int  # bytes by which `second` moves with each float, or with each word
    second_per_word: int
    images: int
    channels: int
    pixels: int
    channels_last: int
    one: int  # the bits of +1 in a type of 16 bits


JOB = np.dtype([(name, np.int64) for name in PackJob._fields])


@inlined
def _work(jobs: Any, on_span: Any, on_pixel: Any) -> None:
    """Take pieces of the tensor until none is left: spans of pixels of a contiguous tensor, pixels of a channels_last one."""
    job, tickets = record_at(jobs), address_of(jobs)
    parts = (job.pixels + PIXELS_PER_TASK - 1) // PIXELS_PER_TASK
    task = ticket(tickets + 8)
    while task < job.tasks:
        first = task % parts * PIXELS_PER_TASK
        last = least(first + PIXELS_PER_TASK, job.pixels)
        if job.channels_last:
            _pixels(job, on_pixel, task // parts, first, last)
        else:
            _spans(job, on_span, task // parts, first, last)
        task = ticket(tickets + 8)


@inlined
def _pixels(job: Any, on_pixel: Any, image: int, first: int, last: int) -> None:
    channels, words = job.channels, (job.channels + 31) // 32
    floats, bits, second, one = job.floats, job.bits, job.second, job.one
    float_size, per_float, per_word = job.float_size, job.second_per_float, job.second_per_word
    for pixel in range(image * job.pixels + first, image * job.pixels + last):
        for w in range(words):
            at, word = pixel * channels + 32 * w, pixel * words + w
            other = second + per_float * at + per_word * word
            on_pixel(floats + float_size * at, bits + 4 * word, other, least(channels - 32 * w, 32), one)


@inlined
def _spans(job: Any, on_span: Any, plane: int, first: int, last: int) -> None:
    pixels, words = job.pixels, (job.channels + 31) // 32
    image, w = plane // words, plane % words
    channels, step = least(job.channels - 32 * w, 32), job.float_size * pixels
    for pixel in range(first, last, SPAN_PIXELS):
        at, word = (image * job.channels + 32 * w) * pixels + pixel, plane * pixels + pixel
        second = job.second + job.second_per_float * at + job.second_per_word * word
        on_span(
            job.floats + job.float_size * at,
            job.bits + 4 * word,
            second,
            step,
            channels,
            last - pixel,
            job.one,
        )


def pack_signs_entry(jobs: Any) -> None:
    _work(jobs, pack_span, pack_pixel)


def pack_both_entry(jobs: Any) -> None:
    _work(jobs, pack_span_and_mask, pack_pixel_and_mask)


def unpack_entry(jobs: Any) -> None:
    _work(jobs, unpack_span, unpack_pixel)


def unpack_half_entry(jobs: Any) -> None:
    _work(jobs, unpack_span_half, unpack_pixel_half)


def mask_entry(jobs: Any) -> None:
    _work(jobs, mask_span, mask_pixel)


@functools.cache
def _entry(function: Callable[[Any], None]) -> int:
    return compiled(function, JOB)


@functools.lru_cache(4096)
def _plan(shape: torch.Size, channels_last: bool, dtype: torch.dtype, second: torch.dtype | None) -> tuple[bytes, int]:
    """The job but for its addresses, and the number of its tasks."""
    images, channels, height, width = shape
    pixels = height * width
    tasks = images * -(-pixels // PIXELS_PER_TASK) * (1 if channels_last else -(-channels // 32))
    job = PackJob(
        unused=0, tickets=0, floats=0, bits=0, second=0, tasks=tasks, float_size=dtype.itemsize,
        second_per_float=4 if second == torch.float32 else 0, second_per_word=4 if second == torch.int32 else 0,
        images=images, channels=channels, pixels=pixels, channels_last=channels_last, one=HALF_TYPES.get(dtype, 0),
    )  # fmt: skip
    return np.array(job, np.int64).tobytes(), tasks if shape.numel() > SMALL else 1


def _run(entry: Callable[[Any], None], floats: Tensor, last: bool, bits: Tensor, second: Tensor | None = None) -> None:
    plan, tasks = _plan(floats.shape, last, floats.dtype, None if second is None else second.dtype)
    now = (0, 0, floats.data_ptr(), bits.data_ptr(), 0 if second is None else second.data_ptr())
    run(_entry(entry), plan, now, threads_for(tasks))


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a (N, C, H, W) tensor lie next to one another in memory; so they do where H = W = 1."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        return False
    return not x.is_contiguous() or x.shape[2] * x.shape[3] == 1


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def dense_bits(packed: Tensor) -> tuple[Tensor, bool]:
    """Packed bits without gaps, and whether they are channels_last: strides say so even for a single word."""
    last = packed.stride(1) == 1
    return packed.contiguous(memory_format=memory_format(last)), last


def _dense(x: Tensor) -> tuple[Tensor, bool]:
    """x in one of the two memory formats, and whether that is channels_last; ValueError for what the kernels do not take."""
    if x.dtype != torch.float32 or x.ndim != 4 or x.device.type != "cpu":
        raise ValueError(
            f"packed kernels take float32 (N, C, H, W) on the CPU, not {x.dtype} {tuple(x.shape)} on {x.device.type}"
        )
    last = is_channels_last(x)
    return x if last else x.contiguous(), last


def _bits_for(x: Tensor, channels_last: bool) -> Tensor:
    images, channels, height, width = x.shape
    shape = (images, -(-channels // 32), height, width)
    return torch.empty(shape, dtype=torch.int32, memory_format=memory_format(channels_last))


def pack_activations(x: Tensor) -> Tensor:
    """Signs of a float32 tensor (N, C, H, W): int32 (N, ceil(C / 32), H, W), a set bit for every x < 0."""
    x, last = _dense(x)
    signs = _bits_for(x, last)
    _run(pack_signs_entry, x, last, signs)
    return signs


def pack_with_mask(x: Tensor) -> tuple[Tensor, Tensor]:
    """Signs of x, and the mask |x| <= 1 (a set bit inside the window), from one read of x."""
    x, last = _dense(x)
    signs, inside = _bits_for(x, last), _bits_for(x, last)
    _run(pack_both_entry, x, last, signs, inside)
    return signs, inside


def unpack_signs(packed: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """+1 and -1 in `shape`, in the memory format of the packed bits; dtype float32, bfloat16 or float16."""
    if dtype != torch.float32 and dtype not in HALF_TYPES:
        raise ValueError(f"signs unpack to float32, bfloat16 or float16, not {dtype}")
    packed, last = dense_bits(packed)
    out = torch.empty(tuple(shape), dtype=dtype, memory_format=memory_format(last))
    _run(unpack_entry if dtype == torch.float32 else unpack_half_entry, out, last, packed)
    return out


def masked(grad: Tensor, packed_mask: Tensor) -> Tensor:
    """grad (float32) where the mask's bit is set, else 0; in the memory format of the mask."""
    packed_mask, last = dense_bits(packed_mask)
    grad = grad.contiguous(memory_format=memory_format(last))
    out = torch.empty_like(grad)
    _run(mask_entry, grad, last, packed_mask, out)
    return out
