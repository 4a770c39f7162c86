"""Floats to codes and back in one pass each: the elementwise work of quantized training on a CPU.

Torch runs a formula as a chain of operations, each of which reads and writes the whole tensor; here one loop does all of it,
and LLVM makes vectors of it. Nearest rounding is bit for bit that of the chain of float32 operations. Stochastic rounding
draws a number a value from a hash of its place and of a seed, which torch's generator gives: the same for any threads.

Tensors are float32 or uint8, on the CPU, dense, and walked in the order of their memory. A float that is no number gets the
lowest code.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import types
from numba.extending import intrinsic
from numba.np.numpy_support import carray
from torch import Tensor

from quant.kernels.intrinsics import ticket
from quant.kernels.machine import compiled, helper, run, threads_for

CHUNK = 1 << 15  # values of a task: they and what is made of them fit into the second-level cache
SIDE = 64  # sums, or extremes, that are kept side by side, in vectors
ROUND = np.float32(3 << 22)  # added and taken away again, it rounds |u| < 2^22 to whole numbers, ties to even
UNIT = np.float32(2.0**-24)


class Job(NamedTuple):
    """One pass over `values` values. What lies at the addresses is said by each entry."""

    unused: int
    tickets: int
    first: int
    second: int
    third: int
    fourth: int
    numbers: int  # float32 numbers, the same for all values
    seed: int
    values: int
    chunk: int
    tasks: int
    group: int


JOB = np.dtype([(name, np.int64) for name in Job._fields])


@intrinsic
def _pointer(typing_context: Any, address: Any, kind: Any) -> Any:
    """An int64 as a pointer to numbers of a type."""
    target = types.CPointer(kind.dtype)  # type: ignore[no-untyped-call]

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], context.get_value_type(target))

    return target(types.int64, kind), generate


@helper
def _floats(address: int, count: int) -> Any:
    return carray(_pointer(address, np.float32), count)  # type: ignore[call-arg]


@helper
def _bytes(address: int, count: int) -> Any:
    return carray(_pointer(address, np.uint8), count)  # type: ignore[call-arg]


@helper
def _next(job: Any, tickets: int) -> tuple[int, int, int]:
    """The next task: its number, its first value, and its number of values (0: none is left)."""
    task = ticket(tickets)
    start = task * job.chunk
    return task, start, min(job.chunk, job.values - start) if task < job.tasks else 0


@helper
def _noise(place: Any, low_seed: Any, high_seed: Any) -> Any:
    """A number in [0, 1), of 24 bits."""
    h = np.uint32((np.uint32(place) ^ low_seed) * np.uint32(0x9E3779B1))
    h = np.uint32((h ^ (h >> np.uint32(16))) + high_seed)
    h = np.uint32(h * np.uint32(0x21F0AAAD))
    h = np.uint32((h ^ (h >> np.uint32(15))) * np.uint32(0x735A2D97))
    return np.float32(np.int32((h ^ (h >> np.uint32(15))) >> np.uint32(8))) * UNIT


# ---- one step for the tensor --------------------------------------------------------------------------------------------


@helper
def _clip(u: Any, low: Any, high: Any) -> Any:
    u = u if u > low else low
    return u if u < high else high


@helper
def _encode(x: Any, codes: Any, bad: Any, step: Any, low: Any, high: Any) -> None:
    for first in range(0, len(x), SIDE):
        count = min(SIDE, len(x) - first)
        xs, cs = x[first : first + count], codes[first : first + count]
        for j in range(count):
            u = xs[j] / step
            bad[j] = bad[j] if u == u else u  # only what is no number differs from itself
            cs[j] = np.uint8(np.int32(_clip(u, low, high) + ROUND - ROUND - low))


def encode_entry(jobs: Any) -> None:
    """first: float x; second: bytes round(clip(x / s, low, high)) - low; third: float, 0 or NaN a task; numbers: s, low, high."""
    records = carray(jobs, 1)
    job, tickets = records[0], records.ctypes.data + 8
    numbers, bad = _floats(job.numbers, 3), np.empty(SIDE, np.float32)
    task, start, count = _next(job, tickets)
    while count:
        bad[:] = 0
        x, codes = _floats(job.first + 4 * start, count), _bytes(job.second + start, count)
        _encode(x, codes, bad, numbers[0], numbers[1], numbers[2])
        _floats(job.third + 4 * task, 1)[0] = bad.sum()
        task, start, count = _next(job, tickets)


@helper
def _decode(codes: Any, out: Any, zero: Any, step: Any, low: Any) -> None:
    for i in range(len(codes)):
        out[i] = (np.float32(np.int32(codes[i])) - zero) * step + low


def decode_entry(jobs: Any) -> None:
    """first: bytes c; second: float (c - zero) s + low; numbers: zero, s, low."""
    records = carray(jobs, 1)
    job, tickets = records[0], records.ctypes.data + 8
    numbers = _floats(job.numbers, 3)
    _, start, count = _next(job, tickets)
    while count:
        codes, out = _bytes(job.first + start, count), _floats(job.second + 4 * start, count)
        _decode(codes, out, numbers[0], numbers[1], numbers[2])
        _, start, count = _next(job, tickets)


@helper
def _step_gradient(x: Any, g: Any, dx: Any, sums: Any, step: Any, low: Any, high: Any) -> None:
    for first in range(0, len(x), SIDE):
        count = min(SIDE, len(x) - first)
        xs, gs, dxs = x[first : first + count], g[first : first + count], dx[first : first + count]
        for j in range(count):
            u, gradient = xs[j] / step, gs[j]
            code = _clip(u, low, high) + ROUND - ROUND
            inside = (u > low) & (u < high)
            sums[j] += (code - u if inside else code) * gradient
            dxs[j] = gradient if inside else np.float32(0)


def step_gradient_entry(jobs: Any) -> None:
    """first: float x; second: float g; third: float dx = g inside, else 0; fourth: double, sum of dv_q/ds g of a task."""
    records = carray(jobs, 1)
    job, tickets = records[0], records.ctypes.data + 8
    numbers, sums = _floats(job.numbers, 3), np.empty(SIDE, np.float32)
    task, start, count = _next(job, tickets)
    while count:
        sums[:] = 0
        x, g, dx = (
            _floats(job.first + 4 * start, count),
            _floats(job.second + 4 * start, count),
            _floats(job.third + 4 * start, count),
        )
        _step_gradient(x, g, dx, sums, numbers[0], numbers[1], numbers[2])
        total = 0.0
        for j in range(SIDE):
            total += np.float64(sums[j])
        carray(_pointer(job.fourth + 8 * task, np.float64), 1)[0] = total  # type: ignore[call-arg]
        task, start, count = _next(job, tickets)


# ---- a grid, to the nearest value or to either neighbour ------------------------------------------------------------------


@helper
def _round_nearest(x: Any, out: Any, step: Any, low: Any, zero: Any, top: Any) -> None:
    for i in range(len(x)):
        code = _clip((x[i] - low) / step, -zero, top - zero) + ROUND - ROUND
        out[i] = code * step + low


@helper
def _round_to_either(
    x: Any, out: Any, step: Any, low: Any, zero: Any, top: Any, place: int, low_seed: Any, high_seed: Any
) -> None:
    for i in range(len(x)):
        u = (x[i] - low) / step + _noise(place + i, low_seed, high_seed)
        out[i] = np.floor(_clip(u, -zero, top - zero)) * step + low


def round_entry(jobs: Any) -> None:
    """first: float x; second: float, x on the grid; numbers: s, low, zero, top; seed: 0 rounds to the nearest value."""
    records = carray(jobs, 1)
    job, tickets = records[0], records.ctypes.data + 8
    numbers = _floats(job.numbers, 4)
    step, low, zero, top = numbers[0], numbers[1], numbers[2], numbers[3]
    low_seed, high_seed = np.uint32(job.seed), np.uint32(job.seed >> 32)
    _, start, count = _next(job, tickets)
    while count:
        x, out = _floats(job.first + 4 * start, count), _floats(job.second + 4 * start, count)
        if job.seed == 0:
            _round_nearest(x, out, step, low, zero, top)
        else:
            _round_to_either(x, out, step, low, zero, top, start, low_seed, high_seed)
        _, start, count = _next(job, tickets)


# ---- a range for every group ----------------------------------------------------------------------------------------------


@helper
def _extremes(x: Any, least: Any, most: Any) -> tuple[Any, Any]:
    count = min(SIDE, len(x))
    for j in range(count):
        least[j] = most[j] = x[j]
    for first in range(SIDE, len(x), SIDE):
        xs = x[first : first + min(SIDE, len(x) - first)]
        for j in range(len(xs)):
            least[j] = xs[j] if xs[j] < least[j] else least[j]
            most[j] = xs[j] if xs[j] > most[j] else most[j]
    low, high = least[0], most[0]
    for j in range(1, count):
        low, high = min(low, least[j]), max(high, most[j])
    return low, high


@helper
def _encode_group(x: Any, codes: Any, low: Any, inverse: Any, top: Any) -> None:
    for i in range(len(x)):
        codes[i] = np.uint8(np.int32(_clip((x[i] - low) * inverse, np.float32(0), top) + ROUND - ROUND))


@helper
def _encode_group_to_either(
    x: Any, codes: Any, low: Any, inverse: Any, top: Any, place: int, low_seed: Any, high_seed: Any
) -> None:
    for i in range(len(x)):
        u = (x[i] - low) * inverse + _noise(place + i, low_seed, high_seed)
        codes[i] = np.uint8(np.int32(_clip(u, np.float32(0), top)))


def encode_groups_entry(jobs: Any) -> None:
    """first: float x; second: bytes; third, fourth: float lowest value and step of each group; numbers: highest code."""
    records = carray(jobs, 1)
    job, tickets = records[0], records.ctypes.data + 8
    top, group = _floats(job.numbers, 1)[0], job.group
    lows, steps = _floats(job.third, job.values // group), _floats(job.fourth, job.values // group)
    widest, tiny = np.float32(np.finfo(np.float32).max / 4), np.float32(np.finfo(np.float32).tiny)
    low_seed, high_seed = np.uint32(job.seed), np.uint32(job.seed >> 32)
    least, most = np.empty(SIDE, np.float32), np.empty(SIDE, np.float32)
    _, start, count = _next(job, tickets)
    while count:
        for first in range(start, start + count, group):
            x, codes = _floats(job.first + 4 * first, group), _bytes(job.second + first, group)
            low, high = _extremes(x, least, most)
            low, high = _clip(low, -widest, widest), _clip(high, -widest, widest)
            step = (high - low) / top
            inverse = np.float32(0) if step < tiny else np.float32(1) / step
            lows[first // group], steps[first // group] = low, step
            if job.seed == 0:
                _encode_group(x, codes, low, inverse, top)
            else:
                _encode_group_to_either(x, codes, low, inverse, top, first, low_seed, high_seed)
        _, start, count = _next(job, tickets)


def decode_groups_entry(jobs: Any) -> None:
    """first: bytes c; second: float c s + low; third, fourth: low and s of each group."""
    records = carray(jobs, 1)
    job, tickets = records[0], records.ctypes.data + 8
    group = job.group
    lows, steps = _floats(job.third, job.values // group), _floats(job.fourth, job.values // group)
    _, start, count = _next(job, tickets)
    while count:
        for first in range(start, start + count, group):
            codes, out = _bytes(job.first + first, group), _floats(job.second + 4 * first, group)
            _decode(codes, out, np.float32(0), steps[first // group], lows[first // group])
        _, start, count = _next(job, tickets)


# ---- one bit a value ------------------------------------------------------------------------------------------------------


@helper
def _keep(bits: Any, plane: Any, g: Any, out: Any) -> None:
    for i in range(len(g)):
        out[i] = g[i] if (bits[i] >> plane) & np.uint8(1) else np.float32(0)


def keep_entry(jobs: Any) -> None:
    """first: bits as `quant.pack` packs them; second: float g; third: float, g where the bit is set, else 0."""
    records = carray(jobs, 1)
    job, tickets = records[0], records.ctypes.data + 8
    plane_size = (job.values + 7) // 8
    _, start, count = _next(job, tickets)
    while count:
        end = start + count
        while start < end:
            plane, at = start // plane_size, start % plane_size
            part = min(end - start, plane_size - at)
            bits, g = _bytes(job.first + at, part), _floats(job.second + 4 * start, part)
            _keep(bits, np.uint8(plane), g, _floats(job.third + 4 * start, part))
            start += part
        _, start, count = _next(job, tickets)


# ---- from tensors ---------------------------------------------------------------------------------------------------------


@functools.cache
def _entry(function: Callable[[Any], None]) -> int:
    return compiled(function, JOB)


def _run(
    function: Callable[[Any], None], values: int, *tensors: Tensor, numbers: Tensor | None = None, seed: int = 0, group: int = 1
) -> None:  # fmt: skip
    chunk = group * max(CHUNK // group, 1)
    tasks = -(-values // chunk)
    addresses = [tensor.data_ptr() for tensor in tensors] + [0] * (4 - len(tensors))
    numbers_at = 0 if numbers is None else numbers.data_ptr()
    job = np.array([0, 0, *addresses, numbers_at, seed, values, chunk, tasks, group], np.int64)
    run(_entry(function), job.tobytes(), (), threads_for(tasks))


def _numbers(*values: Tensor | float) -> Tensor:
    return torch.stack([torch.as_tensor(value, dtype=torch.float32).reshape(()) for value in values])


def new_seed() -> int:
    """A seed for stochastic rounding, from torch's generator: never 0."""
    return int(torch.randint(1, (1 << 63) - 1, ()))


def dense_like(g: Tensor, x: Tensor) -> Tensor:
    """g in the strides of x, which is dense."""
    return g if g.stride() == x.stride() else torch.empty_like(x, dtype=g.dtype).copy_(g)


def encode(x: Tensor, step: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """round(clip(x / step, low, high)) - low, as bytes in the strides of x; step, low, high of one element.

    And 0, or NaN where x holds one: a byte cannot, and whoever uses the codes adds it, so that it is not lost.
    """
    codes, bad = torch.empty_like(x, dtype=torch.uint8), torch.empty(-(-x.numel() // CHUNK))
    _run(encode_entry, x.numel(), x, codes, bad, numbers=_numbers(step, low, high))
    return codes, bad.sum()


def decode(codes: Tensor, zero: Tensor | float, step: Tensor, low: Tensor | float = 0.0) -> Tensor:
    """(codes - zero) step + low, float32 in the strides of the codes; numbers of one element."""
    out = torch.empty_like(codes, dtype=torch.float32)
    _run(decode_entry, codes.numel(), codes, out, numbers=_numbers(zero, step, low))
    return out


def step_gradient(x: Tensor, g: Tensor, step: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """dx = g where low < u < high, u = x / step, else 0; and the sum of (code - u inside, else code) g, float64.

    dx takes the memory of g where it can: fresh memory costs more than the pass itself.
    """
    dx = g = dense_like(g, x)
    sums = torch.empty(-(-x.numel() // CHUNK), dtype=torch.float64)
    _run(step_gradient_entry, x.numel(), x, g, dx, sums, numbers=_numbers(step, low, high))
    return dx, sums.sum()


def round_to_grid(
    x: Tensor, step: Tensor, low: Tensor | float, zero: Tensor | float, top: int, seed: int = 0
) -> Tensor:
    """step clip(round((x - low) / step), -zero, top - zero) + low; with a seed, to either neighbour, so that E = x inside."""
    out = torch.empty_like(x)
    _run(round_entry, x.numel(), x, out, numbers=_numbers(step, low, zero, top), seed=seed)
    return out


def encode_groups(rows: Tensor, top: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """rows (G, n) -> bytes round((x - low) / step) (G, n), low and step (G, 1): the range of each row, cut into `top` steps."""
    codes = torch.empty_like(rows, dtype=torch.uint8)
    low, step = rows.new_empty(len(rows), 1), rows.new_empty(len(rows), 1)
    _run(
        encode_groups_entry, rows.numel(), rows, codes, low, step, numbers=_numbers(top), seed=seed, group=rows.shape[1]
    )
    return codes, low, step


def decode_groups(codes: Tensor, low: Tensor, step: Tensor) -> Tensor:
    """The inverse of `encode_groups`: codes step + low."""
    out = torch.empty_like(codes, dtype=torch.float32)
    _run(decode_groups_entry, codes.numel(), codes, out, low, step, group=codes.shape[1])
    return out


def keep(bits: Tensor, g: Tensor) -> Tensor:
    """g where the bit is set, else 0: bits of `quant.pack.pack_bits`, in the order of the memory of g, which is dense."""
    out = torch.empty_like(g)
    _run(keep_entry, g.numel(), bits, g, out)
    return out
