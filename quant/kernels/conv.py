"""Binary convolution and linear layer on packed bits: sum over channels and taps of sign(x) sign(w), exactly.

    x . w = n - 2 popcount(x ^ w)                       bit 1 stands for -1, bit 0 for +1
    out[n, o, y, x] = base[border class][o] - 2 popcount(...)

Zero padding costs nothing and is exact: bits in the padding are 0 (as if +1), and `base` puts right what that adds.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from quant.kernels.intrinsics import (
    address_of,
    clear,
    copy,
    copy_rows,
    get_word,
    least,
    most,
    put_half,
    record_at,
    spread_words,
    ticket,
    transpose,
)
from quant.kernels.machine import Processor, helper, inlined
from quant.kernels.tiles import avx2_tile, avx512_tile, portable_tile


class ConvJob(NamedTuple):
    """What a team of threads is asked to do. Addresses, and what they step by, are in bytes."""

    scratch_tickets: int  # counters that start at 0: which scratch memory a thread takes,
    task_tickets: int  # and which task
    scratch: int
    acts: int  # packed activations, unpadded
    weights: int
    base: int
    scale: int
    bias: int
    columns: int  # for each output column, where its border class begins in a row of `base`
    out: int
    channels_last: int
    tasks: int
    scratch_size: int  # of one thread
    sums_at: int  # where in the scratch, behind the image, a tile's raw sums lie,
    band_at: int  # and results of a band of pixels, until they are transposed
    act_image_words: int
    act_channel_words: int
    act_pixel_words: int
    images: int
    words: int  # channel words of a pixel
    height: int
    width: int
    block_size: int
    blocks: int
    blocks_per_task: int
    kernel_height: int
    kernel_width: int
    stride_height: int
    stride_width: int
    padding_height: int
    padding_width: int
    out_height: int
    out_width: int
    band: int  # pixels
    base_row_size: int
    out_channels: int


JOB = np.dtype([(name, np.int64) for name in ConvJob._fields])


class TileShape(NamedTuple):
    """A tile of `tiles.py`: its size, and how it wants its operands."""

    lanes: int  # output channels of a block
    blocks: int  # most blocks and pixels of a tile
    pixels: int
    steps: int  # of a word: 1, or 8 nibbles
    act_word: int  # bytes of an activation word in the scratch
    weight_word: int  # bytes of a weight word of all lanes


AVX512 = TileShape(lanes=16, blocks=2, pixels=7, steps=1, act_word=4, weight_word=64)
AVX2 = TileShape(lanes=32, blocks=2, pixels=4, steps=8, act_word=16, weight_word=256)
PORTABLE = TileShape(lanes=16, blocks=1, pixels=4, steps=1, act_word=4, weight_word=64)
SHAPES: dict[Processor, TileShape] = {"avx512": AVX512, "avx2": AVX2, "portable": PORTABLE}


@helper
def _fill_words(job: Any, image: int, scratch: int) -> None:
    """Copy the words of an image into the scratch, pixel after pixel, between the padding columns (which stay 0)."""
    size, width = 4 * job.words, job.width
    source = job.acts + 4 * image * job.act_image_words
    for y in range(job.height):
        row = scratch + (y * (width + 2 * job.padding_width) + job.padding_width) * size
        if job.act_pixel_words == job.words:
            copy(source + y * width * size, row, width * size)
        else:
            for c in range(job.words):
                first = c * job.act_channel_words + y * width * job.act_pixel_words
                spread_words(source + 4 * first, row + 4 * c, size, width)


@helper
def _fill_nibbles(job: Any, image: int, scratch: int) -> None:
    """The same for the avx2 tile: eight half words for each word, the offsets of its nibbles' tables."""
    words, width = job.words, job.width
    source = job.acts + 4 * image * job.act_image_words
    for y in range(job.height):
        row = (y * (width + 2 * job.padding_width) + job.padding_width) * words
        for c in range(words):
            for x in range(width):
                word = get_word(source, c * job.act_channel_words + (y * width + x) * job.act_pixel_words)
                for n in range(8):
                    put_half(scratch, 8 * (row + x * words + c) + n, ((word >> (4 * n)) & 15) << 5)


@inlined
def _band(
    job: Any, tile: Any, shape: Any, image: int, scratch: int, block: int, blocks: int, start: int, stop: int
) -> None:
    """Output pixels start..stop (in reading order) of some blocks of channels, tile by tile."""
    pixel_size, most_pixels = job.words * shape.act_word, shape.pixels
    row_size, window = (job.width + 2 * job.padding_width) * pixel_size, job.stride_width * pixel_size
    run = job.words * job.kernel_width * shape.steps
    kernel_row, block_size = job.words * job.kernel_width * shape.weight_word, job.block_size
    weights, columns = job.weights + block * block_size, job.columns
    channel, channels = block * shape.lanes, blocks * shape.lanes
    base, scale, bias = job.base + 4 * channel, job.scale + 4 * channel, job.bias + 4 * channel
    width, sums, base_row = job.out_width, scratch + job.sums_at, job.base_row_size
    direct = job.channels_last and channel + channels <= job.out_channels
    band = scratch + job.band_at
    out_step = 4 * job.out_channels if direct else 4 * channels
    pixels = job.out_height * width
    out = job.out + 4 * ((image * pixels + start) * job.out_channels + channel) if direct else band
    pixel = start
    while pixel < stop:
        y, x = pixel // width, pixel % width
        top = job.padding_height - y * job.stride_height
        first = least(most(top, 0), job.kernel_height)  # kernel rows that lie in the image; the others are skipped
        last = most(least(top + job.height, job.kernel_height), first)
        acts, rows = scratch + (first - top) * row_size, last - first
        row_weights, low, high = weights + first * kernel_row, base + first * base_row, base + last * base_row
        end = least(width, x + stop - pixel)
        while x < end:
            left = end - x
            count = most_pixels if left >= most_pixels and left != 8 else 4 if left >= 4 else 2 if left >= 2 else 1
            tile(
                count, blocks, acts + x * window, window, row_size, row_weights, block_size, rows, run,
                columns + 4 * x, low, high, scale, bias, sums, out, out_step,
            )  # fmt: skip
            out += count * out_step
            x += count
            pixel += count
    if not direct:
        _leave_band(job, band, image, channel, channels, start, stop)


@helper
def _leave_band(job: Any, band: int, image: int, channel: int, channels: int, start: int, stop: int) -> None:
    """From the band, pixel after pixel, to planes of channels, or to pixels whose last channels are missing."""
    pixels, count, step = job.out_height * job.out_width, stop - start, 4 * channels
    for c in range(channel, least(channel + channels, job.out_channels), 16):
        source, rest = band + 4 * (c - channel), job.out_channels - c
        if job.channels_last:
            target = job.out + 4 * ((image * pixels + start) * job.out_channels + c)
            copy_rows(source, step, target, 4 * job.out_channels, count, rest)
        else:
            plane = job.out + 4 * ((image * job.out_channels + c) * pixels + start)
            for p in range(0, count, 16):
                p = least(p, most(count - 16, 0))  # the last 16 pixels overlap those before: no tail
                transpose(source + p * step, step, plane + 4 * p, 4 * pixels, count - p, rest)


@inlined
def _work(jobs: Any, fill: Any, tile: Any, shape: Any) -> None:
    """Take tasks until none is left. A task is some blocks of channels of one image."""
    job, tickets = record_at(jobs), address_of(jobs)
    pixels = job.out_height * job.out_width
    scratch = job.scratch + ticket(tickets) * job.scratch_size
    clear(scratch, job.sums_at)
    present = -1
    task = ticket(tickets + 8)
    while task < job.tasks:
        part, image = task // job.images, task % job.images
        if image != present:
            fill(job, image, scratch)
            present = image
        last = least((part + 1) * job.blocks_per_task, job.blocks)
        for block in range(part * job.blocks_per_task, last, shape.blocks):
            blocks = least(shape.blocks, last - block)
            for start in range(0, pixels, job.band):
                _band(job, tile, shape, image, scratch, block, blocks, start, least(start + job.band, pixels))
        task = ticket(tickets + 8)


def conv_avx512(jobs: Any) -> None:
    _work(jobs, _fill_words, avx512_tile, AVX512)


def conv_avx2(jobs: Any) -> None:
    _work(jobs, _fill_nibbles, avx2_tile, AVX2)


def conv_portable(jobs: Any) -> None:
    _work(jobs, _fill_words, portable_tile, PORTABLE)


ENTRIES: dict[Processor, Callable[[Any], None]] = {
    "avx512": conv_avx512,
    "avx2": conv_avx2,
    "portable": conv_portable,
}
