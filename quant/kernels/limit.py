"""How fast can this processor be at all? A loop with nothing but the instructions of a tile, no memory, no overhead.

    python -m quant.kernels.limit        the limit of each code path, and the share that a convolution reaches

The convolution and the limit run by turns: on a shared machine only their ratio means anything.
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numba.core import cgutils

from quant.kernels.intrinsics import (
    BYTES,
    FLOATS,
    LANES,
    WORDS,
    Builder,
    Value,
    call,
    emitted,
    popcount,
    record_at,
    vector_at,
    zeroed,
)
from quant.kernels.layers import conv2d_of_packed
from quant.kernels.machine import Processor, compiled, processor, processors, run
from quant.kernels.packing import pack_activations
from quant.kernels.weights import pack_weight

SHUFFLE = "llvm.x86.avx2.pshuf.b"
CHAINS = 16  # independent sums, more than the latency of an addition needs
WEIGHTS = 4  # vectors that take turns
STEPS = 60_000  # about 0.2 ms, so that the call itself does not count


class LimitJob(NamedTuple):
    unused: int
    also_unused: int
    weights: int
    steps: int


JOB = np.dtype([(name, np.int64) for name in LimitJob._fields])


def _loop(builder: Builder, address: Value, steps: Value, vector: Any, step: Callable[..., Value]) -> None:
    """CHAINS times sum = step(sum, weight), over and over; the sums end in memory, so that LLVM keeps them."""
    sums = zeroed(builder, vector, CHAINS)
    weights = [vector_at(builder, address, steps.type(i), vector) for i in range(WEIGHTS)]
    with cgutils.for_range(builder, steps):
        for i, slot in enumerate(sums):
            builder.store(step(builder.load(slot), weights[i % WEIGHTS]), slot)
    for i, slot in enumerate(sums):
        pointer = builder.gep(builder.inttoptr(address, vector.as_pointer()), [steps.type(WEIGHTS + i)])
        builder.store(builder.load(slot), pointer, align=4)


@emitted
def popcount_loop(builder: Builder, address: Value, steps: Value) -> None:
    """xor, popcount, add: 512 products of signs."""
    _loop(builder, address, steps, WORDS, lambda s, w: builder.add(s, popcount(builder, builder.xor(s, w))))


@emitted
def shuffle_loop(builder: Builder, address: Value, steps: Value) -> None:
    """table look-up, add: 128 products of signs."""
    _loop(builder, address, steps, BYTES, lambda s, w: builder.add(s, call(builder, SHUFFLE, BYTES, w, s)))


@emitted
def float_loop(builder: Builder, address: Value, steps: Value) -> None:
    """multiply and add, fused: 16 products of float32."""

    def fused(sums: Value, weight: Value) -> Value:
        return call(builder, "llvm.fma.v16f32", FLOATS, weight, weight, sums)

    _loop(builder, address, steps, FLOATS, fused)


def popcount_limit(jobs: Any) -> None:
    job = record_at(jobs)
    popcount_loop(job.weights, job.steps)


def shuffle_limit(jobs: Any) -> None:
    job = record_at(jobs)
    shuffle_loop(job.weights, job.steps)


def float_limit(jobs: Any) -> None:
    job = record_at(jobs)
    float_loop(job.weights, job.steps)


@functools.cache
def _entry(function: Callable[[Any], None]) -> int:
    return compiled(function, JOB)


def limit_loop(path: Processor | None = None) -> tuple[Callable[[], None], int]:
    """A function that runs the loop once on this thread, and how many products of signs (MACs) that is."""
    on_bytes = (path or processor()) == "avx2"
    return _once(shuffle_limit if on_bytes else popcount_limit), STEPS * CHAINS * (128 if on_bytes else 32 * LANES)


def float_limit_loop() -> tuple[Callable[[], None], int]:
    """The same for products of float32: what no float convolution on this processor can exceed."""
    return _once(float_limit), STEPS * CHAINS * LANES


def _once(function: Callable[[Any], None]) -> Callable[[], None]:
    memory = torch.randn((WEIGHTS + CHAINS) * LANES)  # as signs, as bytes or as floats: zeros would save power
    plan = np.array(LimitJob(0, 0, memory.data_ptr(), STEPS), np.int64).tobytes()
    entry = _entry(function)

    def once(keep: torch.Tensor = memory) -> None:
        run(entry, plan, (), 1)

    return once


def by_turns(functions: Sequence[Callable[[], object]], rounds: int, turn: float = 2e-3) -> list[list[float]]:
    """CPU seconds of this thread for one call of each function; the median of every turn.

    A turn is at least five calls, and as many as fill `turn` seconds: a single call would find the caches full of its
    neighbour's data and measure how they are refilled. CPU time leaves out what other processes take.
    """
    calls = [max(5, round(turn / min(_seconds(function) for _ in range(5)))) for function in functions]
    medians: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, count, times in zip(functions, calls, medians, strict=True):
            times.append(statistics.median(_seconds(function) for _ in range(count)))
    return medians


def _seconds(function: Callable[[], object]) -> float:
    start = time.thread_time()
    function()
    return time.thread_time() - start


def share_of_limit(batch: int, channels: int, size: int, kernel: int, path: Processor) -> tuple[float, float, float]:
    """GMAC/s of the limit and of the kernel (packed activations in, float32 out), and the median of their ratio."""
    loop, loop_macs = limit_loop(path)
    acts = pack_activations(torch.randn(batch, channels, size, size))
    weight = pack_weight(torch.randn(channels, channels, kernel, kernel), kernel // 2, path=path)
    out = conv2d_of_packed(acts, weight)
    macs = batch * (size * channels * kernel) ** 2
    before, convolution, after = by_turns([loop, lambda: conv2d_of_packed(acts, weight, out=out), loop], rounds=41)
    shares = [macs / c / (2 * loop_macs / (b + a)) for b, c, a in zip(before, convolution, after, strict=True)]
    rate = statistics.median(loop_macs / s for s in before), statistics.median(macs / s for s in convolution)
    return rate[0] / 1e9, rate[1] / 1e9, statistics.median(shares)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for path in processors():
        for batch in (1, 16):
            limit, kernel, share = share_of_limit(batch, 256, 14, 3, path)
            print(
                f"{path:9} batch {batch:2}: limit {limit:5.0f}, kernel {kernel:5.0f} GMAC/s, {share:4.0%} of the limit"
            )
