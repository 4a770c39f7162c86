"""Binary convolution and linear layer on packed bits: sum over channels and taps of sign(x) sign(w), exactly.

    x . w = n - 2 popcount(x ^ w)                       bit 1 stands for -1, bit 0 for +1
    out[n, o, y, x] = base[border class][o] - 2 popcount(...)

Zero padding costs nothing and is exact: bits in the padding are 0 (as if +1), and `base` puts right what that adds.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba.np.numpy_support import carray

from quant.kernels.intrinsics import clear, finish, get_word, put_half, put_word, ticket, transpose
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
    out: int
    channels_last: int
    tasks: int
    scratch_size: int  # of one thread
    columns_at: int  # where in the scratch the border classes of the columns lie
    sums_at: int  # and the raw popcounts of a band of pixels
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
    channels_padded: int
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
def _fill_image(job: Any, image: int, scratch: int, nibbles: bool) -> None:
    """Copy the words of an image into the scratch, pixel after pixel, between the padding columns (which stay 0)."""
    words, width = job.words, job.width
    padded = width + 2 * job.padding_width
    source = job.acts + 4 * image * job.act_image_words
    channel_step, pixel_step = job.act_channel_words, job.act_pixel_words
    for y in range(job.height):
        row = (y * padded + job.padding_width) * words
        for c in range(words):
            first = c * channel_step + y * width * pixel_step
            for x in range(width):
                word, place = get_word(source, first + x * pixel_step), row + x * words + c
                if nibbles:
                    for n in range(8):  # the offset of a nibble's table, which has 32 bytes
                        put_half(scratch, 8 * place + n, ((word >> (4 * n)) & 15) << 5)
                else:
                    put_word(scratch, place, word)


@helper
def _column_classes(job: Any, columns: int) -> None:
    """Which columns of the kernel lie in the image, for each output column: its row in `base`."""
    kernel, padding = job.kernel_width, job.padding_width
    side = min(padding, kernel) + 1
    for x in range(job.out_width):
        left = padding - x * job.stride_width
        first = min(max(left, 0), kernel)
        last = max(min(left + job.width, kernel), first)
        put_word(columns, x, (first * side + kernel - last) * job.channels_padded * 4)


@helper
def _kernel_rows(job: Any, y: int) -> tuple[int, int]:
    """First and last kernel row that lie in the image; the others are skipped."""
    top = job.padding_height - y * job.stride_height
    first = min(max(top, 0), job.kernel_height)
    return first, max(min(top + job.height, job.kernel_height), first)


@inlined
def _count_band(job: Any, tile: Any, shape: Any, scratch: int, block: int, blocks: int, start: int, stop: int) -> None:
    """Raw popcounts of the output pixels start..stop (in reading order) for some blocks of channels."""
    lanes, most_pixels = shape.lanes, shape.pixels
    pixel_size = job.words * shape.act_word
    row_size = (job.width + 2 * job.padding_width) * pixel_size
    run = job.words * job.kernel_width * shape.steps
    kernel_row = job.words * job.kernel_width * shape.weight_word
    weights, block_size, sums = job.weights + block * job.block_size, job.block_size, scratch + job.sums_at
    stride_height, stride_width, padding, width = (
        job.stride_height,
        job.stride_width,
        job.padding_height,
        job.out_width,
    )
    pixel = start
    while pixel < stop:
        y, x = pixel // width, pixel % width
        first, last = _kernel_rows(job, y)
        row = scratch + (y * stride_height + first - padding) * row_size
        end = min(width, x + stop - pixel)
        while x < end:
            tiles = (end - x + most_pixels - 1) // most_pixels
            pixels = (end - x + tiles - 1) // tiles
            tile(
                pixels, blocks, row + x * stride_width * pixel_size, stride_width * pixel_size, row_size,
                weights + first * kernel_row, block_size, last - first, run, sums,
            )  # fmt: skip
            sums += pixels * blocks * lanes * 4
            x += pixels
            pixel += pixels


@helper
def _finish_band(
    job: Any, lanes: int, image: int, scratch: int, block: int, blocks: int, start: int, stop: int
) -> None:
    """From popcounts to (base - 2 popcount) scale + bias: channels_last at once, else in place and then transposed."""
    channel, step, sums = block * lanes, blocks * lanes * 4, scratch + job.sums_at
    width, channels, columns = job.out_width, job.out_channels, scratch + job.columns_at
    scale, bias, base = job.scale + 4 * channel, job.bias + 4 * channel, job.base + 4 * channel
    pixels = job.out_height * width
    out = job.out + 4 * image * pixels * channels
    pixel = start
    while pixel < stop:
        y, x = pixel // width, pixel % width
        first, last = _kernel_rows(job, y)
        column = get_word(columns, x)
        end = min(pixel + width - x, stop)
        same = pixel + 1
        while same < end and get_word(columns, x + same - pixel) == column:
            same += 1
        low, high = base + first * job.base_row_size + column, base + last * job.base_row_size + column
        for v in range(0, step, 64):
            source, rest = sums + (pixel - start) * step + v, channels - channel - v // 4
            target, target_step = source, step
            if job.channels_last:
                target, target_step = out + 4 * (pixel * channels + channel) + v, 4 * channels
            count = same - pixel
            finish(
                source, step, count, low + v, high + v, scale + v, bias + v,
                target, target_step, rest if job.channels_last else 16,
            )  # fmt: skip
        pixel = same
    if not job.channels_last:
        _transpose_band(sums, step, out + 4 * channel * pixels, start, stop, pixels, channels - channel)


@helper
def _transpose_band(sums: int, step: int, out: int, start: int, stop: int, pixels: int, channels: int) -> None:
    """Pixels start..stop, channels innermost, to as many planes as there are channels."""
    for v in range(0, step, 64):
        planes = out + v * pixels
        for pixel in range(start, stop, 16):
            source = sums + (pixel - start) * step + v
            transpose(source, step, planes + 4 * pixel, pixels * 4, stop - pixel, channels - v // 4)


@inlined
def _work(jobs: Any, tile: Any, shape: Any) -> None:
    """Take tasks until none is left. A task is some blocks of channels of one image."""
    records = carray(jobs, 1)
    job, tickets = records[0], records.ctypes.data
    pixels = job.out_height * job.out_width
    scratch = job.scratch + ticket(tickets) * job.scratch_size
    clear(scratch, job.columns_at)
    _column_classes(job, scratch + job.columns_at)
    present = -1
    task = ticket(tickets + 8)
    while task < job.tasks:
        part, image = task // job.images, task % job.images
        if image != present:
            _fill_image(job, image, scratch, shape.lanes == 32)
            present = image
        last = min((part + 1) * job.blocks_per_task, job.blocks)
        for block in range(part * job.blocks_per_task, last, shape.blocks):
            blocks = min(shape.blocks, last - block)
            for start in range(0, pixels, job.band):
                stop = min(start + job.band, pixels)
                _count_band(job, tile, shape, scratch, block, blocks, start, stop)
                _finish_band(job, shape.lanes, image, scratch, block, blocks, start, stop)
        task = ticket(tickets + 8)


def conv_avx512(jobs: Any) -> None:
    _work(jobs, avx512_tile, AVX512)


def conv_avx2(jobs: Any) -> None:
    _work(jobs, avx2_tile, AVX2)


def conv_portable(jobs: Any) -> None:
    _work(jobs, portable_tile, PORTABLE)


ENTRIES: dict[Processor, Callable[[Any], None]] = {
    "avx512": conv_avx512,
    "avx2": conv_avx2,
    "portable": conv_portable,
}
