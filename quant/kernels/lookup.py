"""The loops of the lookup products: a tile of rows of tables against blocks of codes, for dx and for dw.

    dx[n, c, y, x]   = sum over filters o and taps   g[n, o, ...] factor[o] sign(w[o, c, tap])      four filters a table
    dw[o, c, ky, kx] = sum over images n and pixels  g[n, o, pixel] sign(x[n, c, pixel + tap])      four images a table

A row of tables is a pixel of dx, or a filter of dw. The order of the sums does not depend on the number of threads. Padding is
skipped, or met by tables of zeros: it adds nothing.
"""

from typing import Any, NamedTuple

import numpy as np

from quant.kernels.codes import members
from quant.kernels.intrinsics import LANES, address_of, clear, least, most, record_at, ticket, transpose
from quant.kernels.machine import helper, inlined
from quant.kernels.tables import GROUP, MOST_BLOCKS, MOST_ROWS, TABLE, add_products, fill_tables, store_pixels

CODES = 64 * MOST_BLOCKS  # bytes of the codes of a tile
STRIP_PIXELS = 64  # of dw: the tables of six filters stay in the first-level cache


class LookupJob(NamedTuple):
    """One product. Sizes are those of the convolution: g is (images, filters, out_height, out_width)."""

    scratch_tickets: int
    task_tickets: int
    scratch: int
    g: int
    codes: int
    factors: int
    out: int
    channels_last: int  # of dx
    g_image: int  # bytes from an image of g to the next, and so on
    g_filter: int
    g_pixel: int
    tasks: int
    scratch_size: int
    sums_at: int  # where in the scratch the sums lie, behind the tables
    images: int
    filters: int
    channels: int
    height: int
    width: int
    out_height: int
    out_width: int
    kernel_height: int
    kernel_width: int
    stride_height: int
    stride_width: int
    padding_height: int
    padding_width: int
    left: int  # columns of zeros beside the tables of a row of dx
    columns: int  # all columns of such a row
    strip: int  # rows of dx, or of g, whose tables are in the scratch together
    strips: int


LOOKUP_JOB = np.dtype([(name, np.int64) for name in LookupJob._fields])


# ---- dx ---------------------------------------------------------------------------------------------------------------


@inlined
def _tables_of_rows(job: Any, scratch: int, image: int, first: int, last: int) -> None:
    """Tables of rows first..last of g, all filters of a pixel side by side, between the columns of zeros."""
    groups = (job.filters + GROUP - 1) // GROUP
    for y in range(first, last):
        row = scratch + ((y - first) * job.columns + job.left) * groups * TABLE
        source = job.g + image * job.g_image + y * job.out_width * job.g_pixel
        for group in range(groups):
            a, b, c, d = members(source, GROUP * group, job.filters, job.g_filter)
            factors = job.factors + 4 * GROUP * group
            fill_tables(a, b, c, d, job.g_pixel, factors, job.out_width, row + group * TABLE, groups * TABLE)


@helper
def _taps(kernel: int, stride: int, remainder: int) -> tuple[int, int]:
    """How many taps of a kernel side are `remainder` modulo the stride, and how many have a smaller one.

    An input pixel meets only those taps; in descending order they belong to neighbouring output pixels.
    """
    before = 0
    for r in range(remainder):
        before += (kernel - r + stride - 1) // stride if r < kernel else 0
    return (kernel - remainder + stride - 1) // stride if remainder < kernel else 0, before


@inlined
def _row_of_dx(job: Any, scratch: int, y: int, first: int, tile: int, blocks: int) -> None:
    """Sums of one row of dx for up to 64 channels; `first` is the row of g whose tables come first."""
    groups = (job.filters + GROUP - 1) // GROUP
    sums, kernel_height, kernel_width = scratch + job.sums_at, job.kernel_height, job.kernel_width
    clear(sums, job.width * CODES)
    remainder = (y + job.padding_height) % job.stride_height
    lines, line_before = _taps(kernel_height, job.stride_height, remainder)
    top = (y + job.padding_height) // job.stride_height - lines + 1
    start, stop = most(-top, 0), least(job.out_height - top, lines)
    if stop <= start:
        return
    for remainder in range(job.stride_width):
        taps, before = _taps(kernel_width, job.stride_width, remainder)
        x = (remainder - job.padding_width) % job.stride_width
        column = (x + job.padding_width) // job.stride_width - taps + 1 + job.left
        tap = (tile * kernel_height + line_before + start) * kernel_width + before
        codes = job.codes + tap * groups * CODES
        tables = scratch + ((top + start - first) * job.columns + column) * groups * TABLE
        pixels = (job.width - x + job.stride_width - 1) // job.stride_width
        tiles = (pixels + MOST_ROWS - 1) // MOST_ROWS
        while tiles > 0:
            rows = (pixels + tiles - 1) // tiles
            add_products(
                rows, blocks, tables, groups * TABLE, job.columns * groups * TABLE, codes, CODES,
                kernel_width * groups * CODES, stop - start, taps * groups, sums + x * CODES, job.stride_width * CODES,
            )  # fmt: skip
            tables += rows * groups * TABLE
            x += rows * job.stride_width
            pixels -= rows
            tiles -= 1


@helper
def _store_row(job: Any, sums: int, image: int, y: int, tile: int, blocks: int) -> None:
    """A row of sums to its place in dx."""
    pixels = job.height * job.width
    for block in range(blocks):
        channel = (tile * MOST_BLOCKS + block) * LANES
        rest, source = job.channels - channel, sums + 64 * block
        if job.channels_last:
            target = job.out + 4 * (((image * job.height + y) * job.width) * job.channels + channel)
            store_pixels(source, CODES, target, 4 * job.channels, job.width, rest)
        else:
            target = job.out + 4 * ((image * job.channels + channel) * pixels + y * job.width)
            for x in range(0, job.width, LANES):
                transpose(source + x * CODES, CODES, target + 4 * x, 4 * pixels, job.width - x, rest)


def dx_entry(jobs: Any) -> None:
    """A task is a strip of rows of one image."""
    job, tickets = record_at(jobs), address_of(jobs)
    scratch = job.scratch + ticket(tickets) * job.scratch_size
    clear(scratch, job.sums_at)
    all_blocks = (job.channels + LANES - 1) // LANES
    task = ticket(tickets + 8)
    while task < job.tasks:
        image, start = task // job.strips, task % job.strips * job.strip
        stop = least(start + job.strip, job.height)
        lowest = start + job.padding_height - job.kernel_height + job.stride_height
        first = most(lowest // job.stride_height, 0)
        last = least((stop - 1 + job.padding_height) // job.stride_height + 1, job.out_height)
        _tables_of_rows(job, scratch, image, first, last)
        for y in range(start, stop):
            for tile in range((all_blocks + MOST_BLOCKS - 1) // MOST_BLOCKS):
                blocks = least(all_blocks - tile * MOST_BLOCKS, MOST_BLOCKS)
                _row_of_dx(job, scratch, y, first, tile, blocks)
                _store_row(job, scratch + job.sums_at, image, y, tile, blocks)
        task = ticket(tickets + 8)


# ---- dw ---------------------------------------------------------------------------------------------------------------


@helper
def _inside(start: int, stop: int, tap: int, stride: int, padding: int, size: int) -> tuple[int, int]:
    """The output pixels of start..stop whose `tap` lies in an image of this size."""
    first = most(start, (padding - tap + stride - 1) // stride)
    return first, most(least(stop, (size - 1 + padding - tap) // stride + 1), first)


@inlined
def _piece_of_dw(job: Any, scratch: int, group: int, rows: int, y: int, height: int, x: int, width: int) -> None:
    """What a rectangle of pixels of four images adds to some filters; their tables lie at the start of the scratch."""
    blocks = (job.channels + LANES - 1) // LANES
    taps = job.kernel_height * job.kernel_width
    for ky in range(job.kernel_height):
        y0, y1 = _inside(y, y + height, ky, job.stride_height, job.padding_height, job.height)
        for kx in range(job.kernel_width):
            x0, x1 = _inside(x, x + width, kx, job.stride_width, job.padding_width, job.width)
            if y1 <= y0 or x1 <= x0:
                continue
            row = (group * job.height + y0 * job.stride_height - job.padding_height + ky) * job.width
            codes = job.codes + (row + x0 * job.stride_width - job.padding_width + kx) * blocks * 64
            tables = scratch + ((y0 - y) * width + x0 - x) * TABLE
            sums = scratch + job.sums_at + (ky * job.kernel_width + kx) * blocks * 64
            for block in range(0, blocks, MOST_BLOCKS):
                add_products(
                    rows, least(blocks - block, MOST_BLOCKS), tables, height * width * TABLE, width * TABLE,
                    codes + 64 * block, job.stride_width * blocks * 64, job.stride_height * job.width * blocks * 64,
                    y1 - y0, x1 - x0, sums + 64 * block, taps * blocks * 64,
                )  # fmt: skip


@inlined
def _filters_of_dw(job: Any, scratch: int, filter_: int, rows: int) -> None:
    """The sums of some filters over all images and pixels."""
    wide = least(job.out_width, STRIP_PIXELS)
    for group in range((job.images + GROUP - 1) // GROUP):
        factors = job.factors + 4 * GROUP * group
        for y in range(0, job.out_height, job.strip):
            height = least(job.strip, job.out_height - y)
            for x in range(0, job.out_width, wide):
                width = least(wide, job.out_width - x)
                for row in range(rows):
                    source = job.g + (filter_ + row) * job.g_filter + (y * job.out_width + x) * job.g_pixel
                    a, b, c, d = members(source, GROUP * group, job.images, job.g_image)
                    tables = scratch + row * height * width * TABLE
                    fill_tables(a, b, c, d, job.g_pixel, factors, height * width, tables, TABLE)
                _piece_of_dw(job, scratch, group, rows, y, height, x, width)


@helper
def _store_filters(job: Any, sums: int, filter_: int, rows: int) -> None:
    """(filters, taps, channels) to (filters, channels, taps)."""
    blocks, taps = (job.channels + LANES - 1) // LANES, job.kernel_height * job.kernel_width
    for row in range(rows):
        for block in range(blocks):
            channel = LANES * block
            target = job.out + 4 * ((filter_ + row) * job.channels + channel) * taps
            for tap in range(0, taps, LANES):
                source = sums + ((row * taps + tap) * blocks + block) * 64
                transpose(source, blocks * 64, target + 4 * tap, 4 * taps, taps - tap, job.channels - channel)


def dw_entry(jobs: Any) -> None:
    """A task is some filters."""
    job, tickets = record_at(jobs), address_of(jobs)
    scratch = job.scratch + ticket(tickets) * job.scratch_size
    task = ticket(tickets + 8)
    while task < job.tasks:
        filter_ = task * job.filters // job.tasks
        rows = (task + 1) * job.filters // job.tasks - filter_
        clear(scratch + job.sums_at, job.scratch_size - job.sums_at)
        _filters_of_dw(job, scratch, filter_, rows)
        _store_filters(job, scratch + job.sums_at, filter_, rows)
        task = ticket(tickets + 8)
