"""Vector code of the lookup products (`lookup.py`): sums of floats under signs by table, without a multiplication.

Four floats have 16 sums +-a +-b +-c +-d: one register. A code of four sign bits picks one of them, and VPERMPS does so for 16
codes at once: an instruction and an addition for 64 products, where multiply-and-add has 16 an instruction.
"""

from typing import Any

import llvmlite.ir as ir
from numba.core import cgutils

from quant.kernels.bits import bits_of_word
from quant.kernels.intrinsics import (
    FLOAT,
    FLOATS,
    I32,
    I64,
    LANES,
    Builder,
    Value,
    call,
    emitted,
    first_lanes,
    full_and_tail,
    lanes,
    load,
    masked_store,
    splat,
    store_words,
    words_at,
)

GROUP = 4  # floats of a table
TABLE = 64  # its bytes
MOST_ROWS, MOST_BLOCKS = 6, 4  # of a tile: 24 sums, 4 codes and a table in 32 registers


def _signs_of_member(member: int) -> Value:
    """-1.0 in the lanes whose code has the member's bit."""
    signs = [-1.0 if lane >> member & 1 else 1.0 for lane in range(LANES)]
    return ir.Constant(FLOATS, [ir.Constant(FLOAT, sign) for sign in signs])


@emitted
def fill_tables(
    builder: Builder, a: Value, b: Value, c: Value, d: Value, step: Value, factors: Value, count: Value, tables: Value,
    table_step: Value,
) -> None:  # fmt: skip
    """`count` tables of the floats at a, b, c, d, which move by `step` bytes a table, times four factors."""
    signed = [
        builder.fmul(splat(builder, load(builder, factors, i, FLOAT), FLOATS), _signs_of_member(i))
        for i in range(GROUP)
    ]
    with cgutils.for_range(builder, count) as loop:
        offset = builder.mul(loop.index, step)
        values = [splat(builder, load(builder, builder.add(m, offset), 0, FLOAT), FLOATS) for m in (a, b, c, d)]
        table = builder.fmul(values[0], signed[0])
        for value, factor in zip(values[1:], signed[1:], strict=True):
            table = call(builder, "llvm.fma.v16f32", FLOATS, value, factor, table)
        store_words(builder, table, builder.add(tables, builder.mul(loop.index, table_step)), I64(0))


@emitted
def store_codes(
    builder: Builder, a: Value, b: Value, c: Value, d: Value, low: Value, high: Value, channels: Value
) -> None:
    """The codes of up to 32 channels from their sign words at a, b, c, d: channels 0..15 to `low`, the others to `high`."""
    words = [load(builder, address, 0, I32) for address in (a, b, c, d)]

    def codes(first: int) -> Value:
        code = lanes(0)
        for member, word in enumerate(words):
            bit = builder.select(bits_of_word(builder, word, first), lanes(1 << member), lanes(0))
            code = builder.or_(code, bit)
        return code

    store_words(builder, codes(0), low, I64(0))
    with builder.if_then(builder.icmp_signed(">", channels, I64(LANES))):
        store_words(builder, codes(LANES), high, I64(0))


def _tile(builder: Builder, rows: int, blocks: int, arguments: tuple[Value, ...]) -> None:
    """out[r, b, lane] += sum over lines and run of table[r][code of the lane in block b]."""
    tables, row_step, line_step, codes, code_step, code_line_step, lines, run, out, out_step = arguments
    zero = I64(0)
    outs = [builder.add(out, builder.mul(out_step, I64(r))) for r in range(rows)]
    sums = [[cgutils.alloca_once(builder, FLOATS) for _ in range(blocks)] for _ in range(rows)]  # type: ignore[no-untyped-call]
    for target, row in zip(outs, sums, strict=True):
        for b, slot in enumerate(row):
            builder.store(builder.bitcast(words_at(builder, target, I64(LANES * b)), FLOATS), slot)
    with cgutils.for_range(builder, lines) as line:
        first = builder.add(tables, builder.mul(line.index, line_step))
        tables_of = [builder.add(first, builder.mul(row_step, I64(r))) for r in range(rows)]
        codes_of = builder.add(codes, builder.mul(line.index, code_line_step))
        with cgutils.for_range(builder, run) as step:
            offset = builder.mul(step.index, I64(TABLE))
            place = builder.add(codes_of, builder.mul(step.index, code_step))
            code = [words_at(builder, place, I64(LANES * b)) for b in range(blocks)]
            for address, row in zip(tables_of, sums, strict=True):
                table = builder.bitcast(words_at(builder, builder.add(address, offset), zero), FLOATS)
                for b, slot in enumerate(row):
                    found = call(builder, "llvm.x86.avx512.permvar.sf.512", FLOATS, table, code[b])
                    builder.store(builder.fadd(builder.load(slot), found), slot)
    for target, row in zip(outs, sums, strict=True):
        for b, slot in enumerate(row):
            store_words(builder, builder.load(slot), target, I64(LANES * b))


@emitted
def add_products(
    builder: Any, rows: Any, blocks: Any, tables: Any, row_step: Any, line_step: Any, codes: Any, code_step: Any,
    code_line_step: Any, lines: Any, run: Any, out: Any, out_step: Any,
) -> None:  # fmt: skip
    """The tile of 1..6 rows of tables x 1..4 blocks of 16 codes, chosen at run time."""
    done = builder.append_basic_block("done")
    choice = builder.switch(builder.add(builder.mul(rows, I64(8)), blocks), done)
    arguments = (tables, row_step, line_step, codes, code_step, code_line_step, lines, run, out, out_step)
    for r in range(1, MOST_ROWS + 1):
        for b in range(1, MOST_BLOCKS + 1):
            block = builder.append_basic_block(f"products_{r}x{b}")
            choice.add_case(ir.Constant(I64, 8 * r + b), block)
            builder.position_at_end(block)
            _tile(builder, r, b, arguments)
            builder.branch(done)
    builder.position_at_end(done)


@emitted
def store_pixels(
    builder: Builder, source: Value, source_step: Value, target: Value, target_step: Value, pixels: Value, channels: Value,
) -> None:  # fmt: skip
    """Copy up to 16 channels of some pixels, which lie `source_step` and `target_step` bytes apart."""
    for full in full_and_tail(builder, channels, LANES):
        mask = None if full else first_lanes(builder, channels)
        with cgutils.for_range(builder, pixels) as pixel:
            words = words_at(builder, builder.add(source, builder.mul(pixel.index, source_step)), I64(0))
            masked_store(builder, words, builder.add(target, builder.mul(pixel.index, target_step)), I64(0), mask)
