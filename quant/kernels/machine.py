"""Compile an entry point once, keep its machine code on disk, and run it on as many threads as torch uses."""

import ctypes
import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

import numba
import numpy as np
import torch
from llvmlite import binding

Processor = Literal["avx512", "avx2", "portable"]
PROCESSORS: tuple[Processor, ...] = get_args(Processor)
PATH_VARIABLE = "QUANT_KERNELS_PATH"
_NEEDS = {"avx512": ("avx512f", "avx512bw", "avx512vl", "avx512vpopcntdq"), "avx2": ("avx2",), "portable": ()}
Address = int
Function = TypeVar("Function", bound=Callable[..., Any])
_config: Any = numba.config
_njit: Any = numba.njit  # its published types do not know the options that leave out wrappers for Python
_forked = False


def _remember_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_remember_fork)


@functools.cache
def processors() -> tuple[Processor, ...]:
    """The code paths that this processor can run, the fastest first."""
    chosen = _config.CPU_FEATURES  # a user who compiles for another processor says so to Numba
    has = binding.get_host_cpu_features() if chosen is None else {f[1:]: f[0] == "+" for f in chosen.split(",")}
    return tuple(path for path in PROCESSORS if all(has.get(feature) for feature in _NEEDS[path]))


def processor() -> Processor:
    """The path in use: the fastest, or what QUANT_KERNELS_PATH asks for."""
    wanted = os.environ.get(PATH_VARIABLE)
    if wanted is None:
        return processors()[0]
    for path in processors():
        if path == wanted:
            return path
    raise ValueError(f"{PATH_VARIABLE}={wanted} is not possible here; accepted: {', '.join(processors())}")


@functools.cache
def cache_folder() -> str | None:
    """Where machine code is kept, or None where the user's cache folder cannot be written.

    Numba notices a change of the function's own file only; a hash over all files here stands for the rest.
    """
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "quant-kernels" / digest.hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return str(folder) if os.access(folder, os.W_OK) else None


def helper(function: Function) -> Function:
    """A function that entry points call."""
    return cast(Function, _njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, error_model="numpy")(function))


def inlined(function: Function) -> Function:
    """A helper that becomes part of its caller before LLVM sees it: for those with tiles, which LLVM compiles slowly.

    (LLVM optimizes a plain helper on its own and again inside each of its callers; Numba's inlining costs time, too.)
    """
    return cast(Function, numba.njit(inline="always", error_model="numpy")(function))


def compiled(function: Callable[[Any], None], job: np.dtype[Any]) -> Address:
    """Address of the machine code of `function(jobs)`, which reads its arguments from a record of type `job`."""
    folder = cache_folder()
    signature = numba.types.void(numba.types.CPointer(numba.from_dtype(job)))  # type: ignore[no-untyped-call]
    before, _config.CACHE_DIR = _config.CACHE_DIR, _config.CACHE_DIR or folder or ""
    try:
        entry: Any = numba.cfunc(signature, cache=folder is not None, error_model="numpy")(function)
    finally:
        _config.CACHE_DIR = before
    _keep_alive.append(entry)
    return int(entry.address)


_keep_alive: list[Any] = []


@functools.cache
def _team() -> Any:
    """GOMP_parallel of the OpenMP library that torch itself has loaded, or None where torch has another one.

    A team of our own would compete with torch's idle threads, which spin for milliseconds after each operation.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        team = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    team.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    team.restype = None
    return team


_PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _alone(entry: Address) -> Any:
    return _PROTOTYPE(entry)


def threads_for(tasks: int) -> int:
    """How many threads will share the tasks. A forked child has lost the threads of its parent: it works alone."""
    return 1 if _forked or _team() is None else min(torch.get_num_threads(), tasks)


def run(entry: Address, plan: bytes, now: Sequence[int], threads: int) -> None:
    """Run the entry point on a job: a plan whose first numbers are replaced by `now`.

    Two zeros lead them: counters in the threads' common record, from which they draw scratch memory and tasks.
    """
    record = _record(plan, now)
    _start(entry, ctypes.addressof(record), threads)


def repeatable(entry: Address, plan: bytes, now: Sequence[int], threads: int) -> Callable[[], None]:
    """The same job as a function, to be run again and again while the memory stays where it is."""
    record = _record(plan, now)

    def once() -> None:
        record[0] = record[1] = 0
        _start(entry, ctypes.addressof(record), threads)

    return once


def _record(plan: bytes, now: Sequence[int]) -> "ctypes.Array[ctypes.c_int64]":
    record = (ctypes.c_int64 * (len(plan) // 8)).from_buffer_copy(plan)
    record[: len(now)] = [*now]
    return record


def _start(entry: Address, record: Address, threads: int) -> None:
    if threads == 1:
        _alone(entry)(record)
    else:
        _team()(entry, record, threads, 0)
