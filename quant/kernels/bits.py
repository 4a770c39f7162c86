"""Vector code that turns floats into bits and back; `packing.py` walks over the tensors with it.

A word holds one bit of 32 channels of one pixel, channel c in bit c % 32. In a contiguous (NCHW) tensor the lanes are 16
neighbouring pixels and the channels follow one another in a loop; in a channels_last one the lanes are channels.
"""

from collections.abc import Callable, Iterator

from numba.core import cgutils

from quant.kernels.intrinsics import (
    FLAGS,
    FLOATS,
    HALVES,
    I16,
    I32,
    I64,
    LANES,
    ONE,
    SIGN_BIT,
    WORDS,
    Builder,
    Value,
    at,
    call,
    emitted,
    first_lanes,
    full_and_tail,
    lanes,
    load,
    masked_load,
    masked_store,
    splat,
    zeroed,
)

SPAN = 4  # vectors of pixels that are handled together: 256 bytes of every plane, so that memory is read in long pieces


def _negative(builder: Builder, x: Value) -> Value:
    """Highest bit of every lane = (x < 0). Adding +0.0 turns -0.0, which counts as +1, into +0.0."""
    zero = builder.bitcast(lanes(0), FLOATS)
    return builder.bitcast(builder.fadd(builder.bitcast(x, FLOATS), zero), WORDS)


def _inside(builder: Builder, x: Value) -> Value:
    """Highest bit of every lane = (|x| <= 1): floats without their sign compare as whole numbers."""
    return builder.sub(builder.and_(x, lanes(SIGN_BIT - 1)), lanes(ONE + 1))


def _shift_in(builder: Builder, slot: Value, word: Value) -> None:
    """slot = slot << 1 | highest bit of word: one instruction (VPSHLDD) for 16 channels' bits."""
    shifted = call(builder, "llvm.fshl.v16i32", WORDS, builder.load(slot), word, lanes(1))
    builder.store(shifted, slot)


def _vectors(builder: Builder, count: Value, vectors: int, full: bool) -> list[tuple[Value, Value]]:
    """Offset and lane mask (None: all lanes) of the vectors that hold `count` elements."""
    offsets = [I64(LANES * i) for i in range(vectors)]
    return [(offset, None if full else first_lanes(builder, builder.sub(count, offset))) for offset in offsets]


def _span(builder: Builder, pixels: Value) -> Iterator[list[tuple[Value, Value]]]:
    """The vectors of a span: emit the loop's body for all of a full one together, and for one after the other of a tail."""
    for full in full_and_tail(builder, pixels, SPAN * LANES):
        if full:
            yield _vectors(builder, pixels, SPAN, full)
            continue
        count = builder.sdiv(builder.add(pixels, I64(LANES - 1)), I64(LANES))
        with cgutils.for_range(builder, count) as vector:
            offset = builder.mul(vector.index, I64(LANES))
            yield [(offset, first_lanes(builder, builder.sub(pixels, offset)))]


def _pack_span(builder: Builder, x: Value, plane: Value, channels: Value, pixels: Value, outputs: list[Value]) -> None:
    """Pack the first `pixels` (at most 64) pixels of up to 32 planes: signs, and |x| <= 1 where asked."""
    for spans in _span(builder, pixels):
        _pack_vectors(builder, x, plane, channels, spans, outputs)


def _pack_vectors(
    builder: Builder,
    x: Value,
    plane: Value,
    channels: Value,
    spans: list[tuple[Value, Value]],
    outputs: list[Value],
) -> None:
    bits = (_negative, _inside)[: len(outputs)]
    slots = [zeroed(builder, WORDS, len(spans)) for _ in outputs]
    with cgutils.for_range(builder, channels) as loop:
        # The last channel first: it ends in the highest bit.
        channel = builder.sub(builder.sub(channels, I64(1)), loop.index)
        source = builder.add(x, builder.mul(channel, plane))
        for i, (offset, mask) in enumerate(spans):
            value = masked_load(builder, source, offset, mask)
            for make, slot in zip(bits, slots, strict=True):
                _shift_in(builder, slot[i], make(builder, value))
    for output, slot in zip(outputs, slots, strict=True):
        for i, (offset, mask) in enumerate(spans):
            masked_store(builder, builder.load(slot[i]), output, offset, mask)


@emitted
def pack_span(
    builder: Builder, floats: Value, words: Value, second: Value, plane: Value, channels: Value, pixels: Value, one: Value,
) -> None:  # fmt: skip
    """Signs of up to 64 pixels x 32 channels; `plane` bytes from a channel to the next."""
    _pack_span(builder, floats, plane, channels, pixels, [words])


@emitted
def pack_span_and_mask(
    builder: Builder, floats: Value, words: Value, second: Value, plane: Value, channels: Value, pixels: Value, one: Value,
) -> None:  # fmt: skip
    """Signs and |x| <= 1 of up to 64 pixels x 32 channels from one read."""
    _pack_span(builder, floats, plane, channels, pixels, [words, second])


def _pack_pixel(builder: Builder, x: Value, channels: Value, outputs: list[Value]) -> None:
    for full in full_and_tail(builder, channels, 2 * LANES):
        words = [I32(0)] * len(outputs)
        for first, mask in _vectors(builder, channels, 2, full):
            value = masked_load(builder, x, first, mask)
            for i, make in enumerate((_negative, _inside)[: len(outputs)]):
                bit = builder.icmp_signed("<", make(builder, value), lanes(0))
                bit = bit if mask is None else builder.and_(bit, mask)
                half = builder.zext(builder.bitcast(bit, I16), I32)
                words[i] = builder.or_(words[i], builder.shl(half, builder.trunc(first, I32)))
        for word, output in zip(words, outputs, strict=True):
            builder.store(word, at(builder, output, 0, I32), align=4)


@emitted
def pack_pixel(builder: Builder, floats: Value, words: Value, second: Value, channels: Value, one: Value) -> None:
    """Signs of up to 32 neighbouring channels of one pixel."""
    _pack_pixel(builder, floats, channels, [words])


@emitted
def pack_pixel_and_mask(
    builder: Builder, floats: Value, words: Value, second: Value, channels: Value, one: Value
) -> None:
    """Signs and |x| <= 1 of up to 32 neighbouring channels of one pixel."""
    _pack_pixel(builder, floats, channels, [words, second])


def _over_span(builder: Builder, words: Value, channels: Value, pixels: Value, use: Callable[..., None]) -> None:
    """use(channel, pixel offset, lane mask, the channel's bits as the highest bit of the lanes)."""
    for spans in _span(builder, pixels):
        loaded = [masked_load(builder, words, offset, mask) for offset, mask in spans]
        with cgutils.for_range(builder, channels) as loop:
            up = splat(builder, builder.sub(I32(31), builder.trunc(loop.index, I32)))
            for word, (offset, mask) in zip(loaded, spans, strict=True):
                use(loop.index, offset, mask, builder.shl(word, up))


def _over_pixel(builder: Builder, words: Value, channels: Value, use: Callable[..., None]) -> None:
    """use(channel offset, lane mask, which bits of the pixel's word are set)."""
    word = load(builder, words, 0, I32)
    for full in full_and_tail(builder, channels, 2 * LANES):
        for part, (offset, mask) in enumerate(_vectors(builder, channels, 2, full)):
            use(offset, mask, bits_of_word(builder, word, LANES * part))


def bits_of_word(builder: Builder, word: Value, first: int) -> Value:
    """Lane mask: bits first .. first + 15 of one word."""
    return builder.bitcast(builder.trunc(builder.lshr(word, I32(first)), I16), FLAGS)


@emitted
def unpack_span(
    builder: Builder, floats: Value, words: Value, second: Value, plane: Value, channels: Value, pixels: Value, one: Value,
) -> None:  # fmt: skip
    """+1.0 and -1.0 as float32 for up to 64 pixels x 32 channels."""

    def store(channel: Value, offset: Value, mask: Value, bit: Value) -> None:
        value = builder.or_(builder.and_(bit, lanes(SIGN_BIT)), lanes(ONE))
        masked_store(builder, value, builder.add(floats, builder.mul(channel, plane)), offset, mask)

    _over_span(builder, words, channels, pixels, store)


@emitted
def unpack_span_half(
    builder: Builder, floats: Value, words: Value, second: Value, plane: Value, channels: Value, pixels: Value, one: Value,
) -> None:  # fmt: skip
    """The same in a type of 16 bits, whose +1 has the bits `one` (bfloat16 or float16)."""
    ones = splat(builder, builder.trunc(one, I16), HALVES)

    def store(channel: Value, offset: Value, mask: Value, bit: Value) -> None:
        sign = builder.trunc(builder.lshr(builder.and_(bit, lanes(SIGN_BIT)), lanes(16)), HALVES)
        masked_store(
            builder,
            builder.or_(sign, ones),
            builder.add(floats, builder.mul(channel, plane)),
            offset,
            mask,
            I16,
        )

    _over_span(builder, words, channels, pixels, store)


@emitted
def mask_span(
    builder: Builder, floats: Value, words: Value, second: Value, plane: Value, channels: Value, pixels: Value, one: Value,
) -> None:  # fmt: skip
    """second = floats where the bit is set, else 0, for up to 64 pixels x 32 channels."""

    def store(channel: Value, offset: Value, mask: Value, bit: Value) -> None:
        step = builder.mul(channel, plane)
        value = masked_load(builder, builder.add(floats, step), offset, mask)
        kept = builder.select(builder.icmp_signed("<", bit, lanes(0)), value, lanes(0))
        masked_store(builder, kept, builder.add(second, step), offset, mask)

    _over_span(builder, words, channels, pixels, store)


@emitted
def unpack_pixel(builder: Builder, floats: Value, words: Value, second: Value, channels: Value, one: Value) -> None:
    """+1.0 and -1.0 as float32 for up to 32 neighbouring channels of one pixel."""

    def store(offset: Value, mask: Value, bits: Value) -> None:
        masked_store(builder, builder.select(bits, lanes(SIGN_BIT | ONE), lanes(ONE)), floats, offset, mask)

    _over_pixel(builder, words, channels, store)


@emitted
def unpack_pixel_half(
    builder: Builder, floats: Value, words: Value, second: Value, channels: Value, one: Value
) -> None:
    """The same in a type of 16 bits."""
    plus = splat(builder, builder.trunc(one, I16), HALVES)
    minus = builder.or_(plus, lanes(0x8000, HALVES))

    def store(offset: Value, mask: Value, bits: Value) -> None:
        masked_store(builder, builder.select(bits, minus, plus), floats, offset, mask, I16)

    _over_pixel(builder, words, channels, store)


@emitted
def mask_pixel(builder: Builder, floats: Value, words: Value, second: Value, channels: Value, one: Value) -> None:
    """second = floats where the bit is set, else 0, for up to 32 neighbouring channels of one pixel."""

    def store(offset: Value, mask: Value, bits: Value) -> None:
        value = masked_load(builder, floats, offset, mask)
        masked_store(builder, builder.select(bits, value, lanes(0)), second, offset, mask)

    _over_pixel(builder, words, channels, store)
