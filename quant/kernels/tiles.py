"""The inner loops of the packed convolution: one tile of pixels x output channels, held in registers.

A tile walks over the kernel's rows. One row of a filter is one run of consecutive words, in the packed image (pixel
after pixel, channel words innermost) as in the packed weights: no im2row and no table of taps is needed.
Every tile ends with (base - 2 popcount) scale + bias, still in registers, and stores float32 pixel after pixel,
channels innermost: into a channels_last output, or into the scratch, from which `conv.py` transposes.

    avx512     7 pixels x 2 blocks of 16 channels; xor, VPOPCNTD, add: three instructions for 512 products
    portable   4 pixels x 1 block of 16 channels; the same text, `llvm.ctpop` becomes what the processor has
    avx2       4 pixels x 2 blocks of 32 channels; VPSHUFB, add: two instructions for 128 products
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import llvmlite.ir as ir
from numba.core import cgutils

from quant.kernels.intrinsics import (
    BYTES,
    FLOATS,
    HALVES,
    I8,
    I16,
    I32,
    I64,
    LANES,
    WORDS,
    Builder,
    Value,
    add_to,
    at,
    call,
    emitted,
    lanes,
    load,
    popcount,
    smaller,
    splat,
    store_words,
    vector_at,
    words_at,
    zeroed,
)

# A byte holds 63 popcounts of a nibble, a half word 16,383 of them.
NIBBLES_PER_BYTE, NIBBLES_PER_HALF = 63, 16383


class Tile(NamedTuple):
    """What a tile works on. All are int64; addresses and steps in bytes."""

    acts: Value  # the first pixel's window; the next pixel's, and the next kernel row, are a step away
    pixel_step: Value
    row_step: Value
    weights: Value
    block_step: Value
    rows: Value
    run: Value  # words of a kernel row
    columns: Value  # for each pixel, where its border class begins in a row of `base`
    low: Value  # `base` up to the first kernel row in the image, and up to the last
    high: Value
    scale: Value
    bias: Value
    sums: Value  # memory for the raw sums, where the registers are too few for them
    out: Value
    out_step: Value  # to the next pixel


def popcount_tile(builder: Builder, pixels: int, blocks: int, tile: Tile) -> None:
    """sums[p, b, lane] = sum over rows and run of popcount(activation word ^ weight word of the lane).

    The activation word is broadcast and the lanes are output channels: no sum across lanes is ever needed.
    """
    sums = zeroed(builder, WORDS, pixels * blocks)
    with cgutils.for_range(builder, tile.rows) as row:
        acts_of, weights_of = _of_row(builder, pixels, blocks, tile, row.index, 64)
        with cgutils.for_range(builder, tile.run) as word:
            weight = [vector_at(builder, address, word.index, WORDS, 64) for address in weights_of]
            for p in range(pixels):
                act = splat(builder, load(builder, acts_of[p], word.index, I32))
                for b in range(blocks):
                    add_to(builder, sums[p * blocks + b], popcount(builder, builder.xor(act, weight[b])))
    for p in range(pixels):
        pixel_sums = [builder.load(slot) for slot in sums[p * blocks : (p + 1) * blocks]]
        _finish_pixel(builder, tile, I64(p), pixel_sums)


def _of_row(
    builder: Builder, pixels: int, blocks: int, tile: Tile, row: Value, word_size: int
) -> tuple[list[Value], list[Value]]:
    """Addresses of the pixels' words and of the blocks' weights in one kernel row."""
    acts = builder.add(tile.acts, builder.mul(row, tile.row_step))
    weights = builder.add(tile.weights, builder.mul(builder.mul(row, tile.run), I64(word_size)))
    acts_of = [builder.add(acts, builder.mul(tile.pixel_step, I64(p))) for p in range(pixels)]
    return acts_of, [builder.add(weights, builder.mul(tile.block_step, I64(b))) for b in range(blocks)]


def _finish_pixel(builder: Builder, tile: Tile, pixel: Value, sums: list[Value]) -> None:
    """out = (high - low - 2 sums) scale + bias as float32: all channels of one pixel, 16 in each vector of sums."""
    column = builder.zext(load(builder, tile.columns, pixel, I32), I64)
    low, high = builder.add(tile.low, column), builder.add(tile.high, column)
    out = builder.add(tile.out, builder.mul(pixel, tile.out_step))
    for i, count in enumerate(sums):
        first = I64(LANES * i)
        base = builder.sub(words_at(builder, high, first), words_at(builder, low, first))
        whole = builder.sub(base, builder.shl(count, lanes(1)))
        scale, bias = (builder.bitcast(words_at(builder, at, first), FLOATS) for at in (tile.scale, tile.bias))
        value = builder.fadd(builder.fmul(builder.sitofp(whole, FLOATS), scale), bias)
        store_words(builder, value, out, first)


def shuffle_tile(builder: Builder, pixels: int, blocks: int, tile: Tile) -> None:
    """The same sums without a popcount instruction, nibble by nibble, 32 output channels in the bytes of a register.

    The nibble of the activation chooses one of 16 tables, table[w] = popcount(nibble ^ w); VPSHUFB looks up the
    weight nibbles of 32 channels in it at once. `acts` holds, for every nibble, the offset of its table (16 bits).
    Bytes are widened before they can overflow.
    """
    tables = _nibble_tables(builder)
    for index in range(2 * pixels * blocks):
        store_words(builder, lanes(0), tile.sums, I64(16 * index))
    group = builder.sdiv(I64(NIBBLES_PER_HALF), tile.run)
    groups = builder.sdiv(builder.sub(builder.add(tile.rows, group), I64(1)), group)
    with cgutils.for_range(builder, groups) as part:
        halves = zeroed(builder, HALVES, 2 * pixels * blocks)
        first = builder.mul(part.index, group)
        count = smaller(builder, group, builder.sub(tile.rows, first))
        with cgutils.for_range(builder, count) as in_group:
            acts_of, weights_of = _of_row(builder, pixels, blocks, tile, builder.add(first, in_group.index), 32)
            _shuffle_row(builder, tables, acts_of, weights_of, tile.run, halves)
        for index, slot in enumerate(halves):
            _add_halves(builder, builder.load(slot), tile.sums, I64(16 * index))
    with cgutils.for_range(builder, I64(pixels)) as pixel:
        at_pixel = builder.add(tile.sums, builder.mul(pixel.index, I64(128 * blocks)))
        sums = [words_at(builder, at_pixel, I64(LANES * i)) for i in range(2 * blocks)]
        _finish_pixel(builder, tile, pixel.index, sums)


def _nibble_tables(builder: Builder) -> Value:
    """Address of 16 tables of 32 bytes: popcount(nibble ^ w) for w = 0..15, twice, once for each half of a register."""
    numbers = [(nibble ^ w).bit_count() for nibble in range(16) for _ in range(2) for w in range(16)]
    constant = ir.Constant(ir.ArrayType(I8, len(numbers)), numbers)
    table: Value = cgutils.global_constant(builder, "nibble_tables", constant)  # type: ignore[no-untyped-call]
    table.align = 64
    return builder.ptrtoint(table, I64)


def _shuffle_row(
    builder: Builder,
    tables: Value,
    acts_of: list[Value],
    weights_of: list[Value],
    run: Value,
    halves: list[Value],
) -> None:
    """Add the popcounts of one kernel row, in equal pieces of at most 63 nibbles, to the 16-bit sums."""
    pieces = builder.sdiv(builder.add(run, I64(NIBBLES_PER_BYTE - 1)), I64(NIBBLES_PER_BYTE))
    size = builder.sdiv(builder.sub(builder.add(run, pieces), I64(1)), pieces)
    with cgutils.for_range(builder, pieces) as piece:
        sums = zeroed(builder, BYTES, len(acts_of) * len(weights_of))
        first = builder.mul(piece.index, size)
        with cgutils.for_range(builder, smaller(builder, size, builder.sub(run, first))) as step:
            nibble = builder.add(first, step.index)
            weight = [vector_at(builder, address, nibble, BYTES, 32) for address in weights_of]
            for p, address in enumerate(acts_of):
                offset = builder.zext(load(builder, address, nibble, I16, 2), I64)
                table = vector_at(builder, builder.add(tables, offset), I64(0), BYTES, 32)
                for b in range(len(weights_of)):
                    found = call(builder, "llvm.x86.avx2.pshuf.b", BYTES, table, weight[b])
                    add_to(builder, sums[p * len(weights_of) + b], found)
        for index, slot in enumerate(sums):
            pairs = builder.bitcast(builder.load(slot), HALVES)
            add_to(builder, halves[2 * index], builder.and_(pairs, lanes(0xFF, HALVES)))
            add_to(builder, halves[2 * index + 1], builder.lshr(pairs, lanes(8, HALVES)))


def _add_halves(builder: Builder, halves: Value, out: Value, index: Value) -> None:
    """out[index : index + 16] += halves, widened to 32 bits."""
    pointer = builder.bitcast(at(builder, out, index, I32), WORDS.as_pointer())
    builder.store(builder.add(builder.load(pointer, align=64), builder.zext(halves, WORDS)), pointer, align=64)


def _by_shape(emit: Any, pixel_counts: Sequence[int], most_blocks: int) -> Any:
    """A function that chooses at run time among the tiles of pixel_counts x 1..most_blocks."""

    def tile(
        builder: Any, pixels: Any, blocks: Any, acts: Any, pixel_step: Any, row_step: Any, weights: Any, block_step: Any,
        rows: Any, run: Any, columns: Any, low: Any, high: Any, scale: Any, bias: Any, sums: Any, out: Any, out_step: Any,
    ) -> None:  # fmt: skip
        work = Tile(
            acts, pixel_step, row_step, weights, block_step, rows, run, columns, low, high, scale, bias, sums, out, out_step
        )  # fmt: skip
        done = builder.append_basic_block("done")
        shape = builder.add(builder.mul(pixels, I64(8)), blocks)
        choice = builder.switch(shape, done)
        for p in pixel_counts:
            for b in range(1, most_blocks + 1):
                block = builder.append_basic_block(f"tile_{p}x{b}")
                choice.add_case(ir.Constant(I64, 8 * p + b), block)
                builder.position_at_end(block)
                emit(builder, p, b, work)
                builder.branch(done)
        builder.position_at_end(done)

    return emitted(tile)


avx512_tile = _by_shape(popcount_tile, (1, 2, 4, 7), 2)
avx2_tile = _by_shape(shuffle_tile, (1, 2, 4), 2)
portable_tile = _by_shape(popcount_tile, (1, 2, 4), 1)
