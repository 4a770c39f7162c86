"""Codes of four signs for the lookup products: bit i of a code is the sign bit of the i-th of four images, or filters.

One code is a 32-bit lane, 16 channels a vector: VPERMPS takes it as it lies in memory.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from quant.kernels.intrinsics import address_of, get_word, least, record_at, ticket
from quant.kernels.machine import compiled, helper, run, threads_for
from quant.kernels.packing import dense_bits
from quant.kernels.tables import GROUP, store_codes


class CodesJob(NamedTuple):
    """Sign words (N, words, H, W) to codes: four images, or four filters, side by side. Addresses and steps are in bytes."""

    unused: int
    tickets: int
    words: int
    codes: int
    places: int  # where the codes of a pixel lie in its group
    tasks: int  # groups
    images: int
    pixels: int
    channels: int
    image_step: int
    channel_step: int  # of 32 channels
    pixel_step: int
    group_step: int
    tile_step: int  # of 64 channels


JOB = np.dtype([(name, np.int64) for name in CodesJob._fields])


@helper
def members(start: int, first: int, count: int, step: int) -> tuple[int, int, int, int]:
    """Addresses of four neighbours; behind the last one it stands again (and its factor is 0)."""
    last = count - 1
    return (
        start + first * step,
        start + least(first + 1, last) * step,
        start + least(first + 2, last) * step,
        start + least(first + 3, last) * step,
    )


def codes_entry(jobs: Any) -> None:
    """A task is a group of four images."""
    job, tickets = record_at(jobs), address_of(jobs)
    task = ticket(tickets + 8)
    while task < job.tasks:
        a, b, c, d = members(job.words, GROUP * task, job.images, job.image_step)
        for word in range((job.channels + 31) // 32):
            low = job.codes + task * job.group_step + word // 2 * job.tile_step + word % 2 * 128
            for pixel in range(job.pixels):
                at = word * job.channel_step + pixel * job.pixel_step
                place = low + get_word(job.places, pixel)
                store_codes(a + at, b + at, c + at, d + at, place, place + 64, job.channels - 32 * word)
        task = ticket(tickets + 8)


@functools.cache
def _entry() -> int:
    return compiled(codes_entry, JOB)


def codes_of(signs: Tensor, channels: int, places: Tensor, size: int, group_step: int, tile_step: int) -> Tensor:
    """Codes, `size` bytes, of four neighbours of the first dimension of packed signs."""
    signs, last = dense_bits(signs)
    images, words, height, width = signs.shape
    pixels, groups = height * width, -(-images // GROUP)
    codes = torch.empty(size, dtype=torch.uint8)
    job = CodesJob(
        unused=0, tickets=0, words=signs.data_ptr(), codes=codes.data_ptr(), places=places.data_ptr(), tasks=groups,
        images=images, pixels=pixels, channels=channels, image_step=4 * words * pixels,
        channel_step=4 if last else 4 * pixels, pixel_step=4 * words if last else 4, group_step=group_step,
        tile_step=tile_step,
    )  # fmt: skip
    run(_entry(), np.array(job, np.int64).tobytes(), (0, 0), threads_for(groups))
    return codes
