"""LLVM vector code that Numba cannot express: what runs in the inner loops of the packed kernels.

Numba compiles the plain loops of `conv.py` and `packing.py`; the functions here are called from them and
emit vectors of 16 lanes (`<16 x i32>`). LLVM turns such a vector into one AVX-512 register, two AVX2 or four
NEON ones, and `llvm.ctpop` into VPOPCNTD, into a shuffle or into CNT: one text serves every processor.
Addresses travel as int64 (Numba has no raw pointers); every function here returns nothing and stores its result.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
FLOAT = ir.FloatType()
WORDS = ir.VectorType(I32, LANES)
FLOATS = ir.VectorType(FLOAT, LANES)
HALVES, BYTES = ir.VectorType(I16, LANES), ir.VectorType(I8, 32)
FLAGS = ir.VectorType(I1, LANES)
SIGN_BIT, ONE = 0x80000000, 0x3F800000  # of a float32

Builder = Any
Value = Any


def lanes(value: int | list[int], of: ir.VectorType = WORDS) -> Value:
    """A constant vector: one number in every lane, or a list with a number for each."""
    return ir.Constant(of, value if isinstance(value, list) else [value] * of.count)


def at(builder: Builder, address: Value, index: Value | int, of: Any) -> Value:
    """Pointer to element `index` (counted in elements of type `of`) behind an int64 address."""
    index = ir.Constant(I64, index) if isinstance(index, int) else index
    return builder.gep(builder.inttoptr(address, of.as_pointer()), [index])


def load(builder: Builder, address: Value, index: Value | int, of: Any, align: int = 4) -> Value:
    return builder.load(at(builder, address, index, of), align=align)


def vector_at(builder: Builder, address: Value, number: Value, vector: Any = WORDS, align: int = 4) -> Value:
    """Load vector number `number` of an array of vectors behind the address."""
    return builder.load(at(builder, address, number, vector), align=align)


def words_at(builder: Builder, address: Value, index: Value) -> Value:
    """Load 16 words from word `index` on."""
    return builder.load(builder.bitcast(at(builder, address, index, I32), WORDS.as_pointer()), align=4)


def store_words(builder: Builder, words: Value, address: Value, index: Value) -> None:
    """Store 16 words (or floats) from 32-bit element `index` on."""
    pointer = builder.bitcast(at(builder, address, index, I32), words.type.as_pointer())
    builder.store(words, pointer, align=4)


def zeroed(builder: Builder, vector: Any, count: int) -> list[Value]:
    """Local variables that start at 0; LLVM keeps them in registers."""
    slots = [cgutils.alloca_once(builder, vector) for _ in range(count)]  # type: ignore[no-untyped-call]
    for slot in slots:
        builder.store(lanes(0, vector), slot)
    return slots


def add_to(builder: Builder, slot: Value, value: Value) -> None:
    builder.store(builder.add(builder.load(slot), value), slot)


def splat(builder: Builder, scalar: Value, of: ir.VectorType = WORDS) -> Value:
    """The scalar in every lane (a broadcast load, where the scalar comes from memory)."""
    undefined = ir.Constant(of, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, undefined, lanes(0, ir.VectorType(I32, of.count)))


def call(builder: Builder, name: str, result: Any, *arguments: Value) -> Value:
    """Call an LLVM intrinsic by its full name."""
    signature = ir.FunctionType(result, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, signature, name)  # type: ignore[no-untyped-call]
    return builder.call(function, arguments)


def popcount(builder: Builder, words: Value) -> Value:
    return call(builder, "llvm.ctpop.v16i32", WORDS, words)


def first_lanes(builder: Builder, count: Value) -> Value:
    """Mask of the first `count` lanes; a tail shorter than a vector is loaded and stored through it."""
    return builder.icmp_signed("<", lanes(list(range(LANES))), splat(builder, builder.trunc(count, I32)))


def masked_load(builder: Builder, address: Value, index: Value, mask: Value) -> Value:
    """16 words from word `index` on, 0 where the mask (None: all set) is not set."""
    if mask is None:
        return words_at(builder, address, index)
    pointer = builder.bitcast(at(builder, address, index, I32), WORDS.as_pointer())
    return call(builder, "llvm.masked.load.v16i32.p0", WORDS, pointer, I32(4), mask, lanes(0))


def masked_store(builder: Builder, value: Value, address: Value, index: Value, mask: Value, of: Any = I32) -> None:
    """Store 16 elements of type `of` from element `index` on, where the mask (None: all set) is set."""
    pointer = builder.bitcast(at(builder, address, index, of), value.type.as_pointer())
    size = 2 if of is I16 else 4
    if mask is None:
        builder.store(value, pointer, align=size)
        return
    name = {I32: "v16i32", I16: "v16i16", FLOAT: "v16f32"}[of]
    call(builder, f"llvm.masked.store.{name}.p0", ir.VoidType(), value, pointer, I32(size), mask)


def full_and_tail(builder: Builder, count: Value, most: int) -> Iterator[bool]:
    """Emit the loop's body twice: once for `most` elements (True), once, with masks, for fewer (False).

    Masked stores are slow before AVX-512 and missing on ARM; they run only where a row ends.
    """
    with builder.if_else(builder.icmp_signed(">=", count, I64(most))) as (then, otherwise):
        with then:
            yield True
        with otherwise:
            yield False


def emitted(emit: Callable[..., Value]) -> Any:
    """Turn `emit(builder, *int64 values)` into a function that Numba code calls with integers (and that may return one)."""
    returns = types.void if inspect.signature(emit).return_annotation is None else types.int64

    def typed(typing_context: Any, *given: Any) -> Any:
        def generate(context: Any, builder: Builder, signature: Any, values: Any) -> Any:
            result = emit(builder, *values)
            return context.get_dummy_value() if result is None else result

        return returns(*[types.int64] * len(given)), generate

    typed.__name__, typed.__doc__ = emit.__name__, emit.__doc__
    # Numba reads the names and the number of the arguments here; `builder` stands for its own context.
    typed.__signature__ = inspect.signature(emit)  # type: ignore[attr-defined]
    return intrinsic(typed)


def smaller(builder: Builder, a: Value, b: Value) -> Value:
    return builder.select(builder.icmp_signed("<", a, b), a, b)


@emitted
def least(builder: Builder, a: Value, b: Value) -> Value:
    """min(a, b). (Numba would compile a function of its own for `min`.)"""
    return smaller(builder, a, b)


@emitted
def most(builder: Builder, a: Value, b: Value) -> Value:
    """max(a, b)"""
    return builder.select(builder.icmp_signed("<", a, b), b, a)


def _record_at(typing_context: Any, pointer: Any) -> Any:
    def generate(context: Any, builder: Builder, signature: Any, values: Any) -> Any:
        return builder.bitcast(values[0], context.get_value_type(signature.return_type))

    return pointer.dtype(pointer), generate


def _address_of(typing_context: Any, pointer: Any) -> Any:
    return types.int64(pointer), lambda context, builder, signature, values: builder.ptrtoint(values[0], I64)


record_at: Any = intrinsic(
    _record_at
)  # the record behind a pointer (`carray`, Numba's own way, takes longer to compile)
address_of: Any = intrinsic(_address_of)  # a pointer as int64


@emitted
def ticket(builder: Builder, counter: Value) -> Value:
    """The next number, starting from 0: each thread of a team draws its tasks here."""
    return builder.atomic_rmw("add", at(builder, counter, 0, I64), I64(1), "monotonic")


@emitted
def clear(builder: Builder, address: Value, size: Value) -> None:
    """Set `size` bytes to 0."""
    cgutils.memset(builder, at(builder, address, 0, I8), size, 0)  # type: ignore[no-untyped-call]


@emitted
def copy(builder: Builder, source: Value, target: Value, size: Value) -> None:
    """Copy `size` bytes."""
    cgutils.raw_memcpy(builder, at(builder, target, 0, I8), at(builder, source, 0, I8), size, I64(1))  # type: ignore[no-untyped-call]


@emitted
def get_word(builder: Builder, address: Value, index: Value) -> Value:
    """The 32-bit word number `index` as a positive number."""
    return builder.zext(load(builder, address, index, I32), I64)


@emitted
def spread_words(builder: Builder, source: Value, target: Value, step: Value, count: Value) -> None:
    """`count` neighbouring words to places `step` bytes apart."""
    with cgutils.for_range(builder, count) as word:
        place = builder.add(target, builder.mul(word.index, step))
        builder.store(load(builder, source, word.index, I32), at(builder, place, 0, I32), align=4)


@emitted
def put_half(builder: Builder, address: Value, index: Value, value: Value) -> None:
    """Store the lowest 16 bits."""
    builder.store(builder.trunc(value, I16), at(builder, address, index, I16), align=2)


def _copy_rows(
    builder: Builder, source: Value, source_step: Value, target: Value, target_step: Value, rows: Value, words: Value
) -> None:
    """The first `words` (of at most 16) words of some rows, which lie `source_step` and `target_step` bytes apart."""
    mask = first_lanes(builder, words)
    with cgutils.for_range(builder, rows) as row:
        value = words_at(builder, builder.add(source, builder.mul(row.index, source_step)), I64(0))
        masked_store(builder, value, builder.add(target, builder.mul(row.index, target_step)), I64(0), mask)


copy_rows = emitted(_copy_rows)


@emitted
def transpose(
    builder: Builder,
    source: Value,
    source_step: Value,
    target: Value,
    target_step: Value,
    pixels: Value,
    channels: Value,
) -> None:
    """16 pixels of 16 channels each, to 16 channels of (at most) 16 pixels each.

    Four rounds of interleaving rows i and i + 8 (a perfect shuffle of 16 x 16 elements) transpose the square.
    """
    rows = [words_at(builder, builder.add(source, builder.mul(source_step, I64(i))), I64(0)) for i in range(LANES)]
    for _ in range(4):
        rows = [half for i in range(8) for half in _interleave(builder, rows[i], rows[i + 8])]
    full = I64(LANES)
    whole = builder.icmp_signed(">=", smaller(builder, pixels, channels), full)
    aside = builder.ptrtoint(cgutils.alloca_once(builder, WORDS, LANES), I64)  # type: ignore[no-untyped-call]
    place, step = builder.select(whole, target, aside), builder.select(whole, target_step, I64(4 * LANES))
    for i, row in enumerate(rows):
        store_words(builder, row, builder.add(place, builder.mul(step, I64(i))), I64(0))
    with builder.if_then(builder.not_(whole)):
        _copy_rows(builder, aside, I64(4 * LANES), target, target_step, smaller(builder, channels, full), pixels)


def _interleave(builder: Builder, a: Value, b: Value) -> tuple[Value, Value]:
    low = [element for i in range(8) for element in (i, i + LANES)]
    high = [element + 8 for element in low]
    return builder.shuffle_vector(a, b, lanes(low)), builder.shuffle_vector(a, b, lanes(high))
