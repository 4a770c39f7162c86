"""The inner loops of the packed convolution: one tile of pixels x output channels, held in registers.

A tile walks over the kernel's rows. One row of a filter is one run of consecutive words, in the packed image (pixel
after pixel, channel words innermost) as in the packed weights: no im2row and no table of taps is needed.
Every tile writes raw popcounts as int32, pixel after pixel, channels innermost; `conv.py` makes the result of them.

    avx512     7 pixels x 2 blocks of 16 channels; xor, VPOPCNTD, add: three instructions for 512 products
    portable   4 pixels x 1 block of 16 channels; the same text, `llvm.ctpop` becomes what the processor has
    avx2       4 pixels x 2 blocks of 32 channels; VPSHUFB, add: two instructions for 128 products
"""

from typing import Any

import llvmlite.ir as ir
from numba.core import cgutils

from quant.kernels.intrinsics import (
    BYTES,
    HALVES,
    I8,
    I16,
    I32,
    I64,
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
    splat,
    store_words,
    vector_at,
    zeroed,
)

Arguments = tuple[Value, ...]  # acts, pixel_stride, row_stride, weights, block_stride, rows, run, out
# A byte holds 63 popcounts of a nibble, a half word 16,383 of them.
NIBBLES_PER_BYTE, NIBBLES_PER_HALF = 63, 16383


def popcount_tile(builder: Builder, pixels: int, blocks: int, arguments: Arguments) -> None:
    """out[p, b, lane] = sum over rows and run of popcount(activation word ^ weight word of the lane).

    The activation word is broadcast and the lanes are output channels: no sum across lanes is ever needed.
    """
    acts, pixel_stride, row_stride, weights, block_stride, rows, run, out = arguments
    sums = zeroed(builder, WORDS, pixels * blocks)
    with cgutils.for_range(builder, rows) as row:
        row_acts = builder.add(acts, builder.mul(row.index, row_stride))
        row_weights = builder.add(weights, builder.mul(builder.mul(row.index, run), I64(64)))
        acts_of = [builder.add(row_acts, builder.mul(pixel_stride, I64(p))) for p in range(pixels)]
        weights_of = [builder.add(row_weights, builder.mul(block_stride, I64(b))) for b in range(blocks)]
        with cgutils.for_range(builder, run) as word:
            weight = [vector_at(builder, address, word.index, WORDS, 64) for address in weights_of]
            for p in range(pixels):
                act = splat(builder, load(builder, acts_of[p], word.index, I32))
                for b in range(blocks):
                    add_to(builder, sums[p * blocks + b], popcount(builder, builder.xor(act, weight[b])))
    for index, slot in enumerate(sums):
        store_words(builder, builder.load(slot), out, I64(16 * index))


def shuffle_tile(builder: Builder, pixels: int, blocks: int, arguments: Arguments) -> None:
    """The same sums without a popcount instruction, nibble by nibble, 32 output channels in the bytes of a register.

    The nibble of the activation chooses one of 16 tables, table[w] = popcount(nibble ^ w); VPSHUFB looks up the
    weight nibbles of 32 channels in it at once. `acts` holds, for every nibble, the offset of its table (16 bits).
    Bytes are widened before they can overflow.
    """
    acts, pixel_stride, row_stride, weights, block_stride, rows, run, out = arguments
    tables = _nibble_tables(builder)
    for index in range(2 * pixels * blocks):
        store_words(builder, lanes(0), out, I64(16 * index))
    group = builder.sdiv(I64(NIBBLES_PER_HALF), run)
    groups = builder.sdiv(builder.sub(builder.add(rows, group), I64(1)), group)
    with cgutils.for_range(builder, groups) as part:
        halves = zeroed(builder, HALVES, 2 * pixels * blocks)
        first = builder.mul(part.index, group)
        count = smaller(builder, group, builder.sub(rows, first))
        with cgutils.for_range(builder, count) as in_group:
            row = builder.add(first, in_group.index)
            row_acts = builder.add(acts, builder.mul(row, row_stride))
            row_weights = builder.add(weights, builder.mul(builder.mul(row, run), I64(32)))
            acts_of = [builder.add(row_acts, builder.mul(pixel_stride, I64(p))) for p in range(pixels)]
            weights_of = [builder.add(row_weights, builder.mul(block_stride, I64(b))) for b in range(blocks)]
            _shuffle_row(builder, tables, acts_of, weights_of, run, halves)
        for index, slot in enumerate(halves):
            _add_halves(builder, builder.load(slot), out, I64(16 * index))


def _nibble_tables(builder: Builder) -> Value:
    """Address of 16 tables of 32 bytes: popcount(nibble ^ w) for w = 0..15, twice, once for each half of a register."""
    numbers = [(nibble ^ w).bit_count() for nibble in range(16) for _ in range(2) for w in range(16)]
    constant = ir.Constant(ir.ArrayType(I8, len(numbers)), numbers)
    table: Value = cgutils.global_constant(builder, "nibble_tables", constant)  # type: ignore[no-untyped-call]
    table.align = 64
    return builder.ptrtoint(table, I64)


def smaller(builder: Builder, a: Value, b: Value) -> Value:
    return builder.select(builder.icmp_signed("<", a, b), a, b)


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


def _by_shape(emit: Any, most_pixels: int, most_blocks: int) -> Any:
    """A function that chooses at run time among the tiles of 1..most_pixels x 1..most_blocks."""

    def tile(
        builder: Any, pixels: Any, blocks: Any, acts: Any, pixel_stride: Any, row_stride: Any, weights: Any,
        block_stride: Any, rows: Any, run: Any, out: Any,
    ) -> None:  # fmt: skip
        done = builder.append_basic_block("done")
        shape = builder.add(builder.mul(pixels, I64(8)), blocks)
        choice = builder.switch(shape, done)
        for p in range(1, most_pixels + 1):
            for b in range(1, most_blocks + 1):
                block = builder.append_basic_block(f"tile_{p}x{b}")
                choice.add_case(ir.Constant(I64, 8 * p + b), block)
                builder.position_at_end(block)
                emit(builder, p, b, (acts, pixel_stride, row_stride, weights, block_stride, rows, run, out))
                builder.branch(done)
        builder.position_at_end(done)

    return emitted(tile)


avx512_tile = _by_shape(popcount_tile, 7, 2)
avx2_tile = _by_shape(shuffle_tile, 4, 2)
portable_tile = _by_shape(popcount_tile, 4, 1)
