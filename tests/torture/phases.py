"""Where a run is, told through shared memory: a process that was killed can no longer say it.

The functions of the program are wrapped, not changed: each wrapper notes that its phase begins, and that it ends.
"""

import functools
import mmap
import signal
import struct
import time
from collections.abc import Callable
from typing import Any

import runner.job
import runner.run
import runner.train
from runner.checkpoint import Checkpoints
from runner.log import CsvLog
from runner.run import Run

PHASES = ("start", "resume", "step", "csv", "save", "prune", "eval", "final")
CELL = struct.Struct("<qq")  # entries of a phase, and nanoseconds spent in it
COMMITTED = 8 + CELL.size * len(PHASES)
TARGET = COMMITTED + 8  # phase, entry and delay in nanoseconds of a kill; entry 0: none
Function = Callable[..., Any]


class Board:
    """Shared memory of a parent and its forked children: the phase, how often each was entered, the last commit."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Memory of this process and its own children only."""
        self.memory = mmap.mmap(-1, mmap.PAGESIZE)
        self.clear()

    def clear(self) -> None:
        self.memory[:] = bytes(mmap.PAGESIZE)
        self.committed = -1

    @property
    def phase(self) -> str:
        return PHASES[self.memory[0]]

    @phase.setter
    def phase(self, name: str) -> None:
        self.memory[0] = PHASES.index(name)

    @property
    def committed(self) -> int:
        """The step whose save has returned last; -1 before the first."""
        return int(struct.unpack_from("<q", self.memory, COMMITTED)[0])

    @committed.setter
    def committed(self, step: int) -> None:
        struct.pack_into("<q", self.memory, COMMITTED, step)

    @property
    def loaded(self) -> bool:
        """Whether the data of the run was loaded."""
        return bool(self.memory[1])

    @loaded.setter
    def loaded(self, now: bool) -> None:
        self.memory[1] = now

    def aim(self, phase: str, entry: int, delay: float) -> None:
        """The child shall end `delay` seconds after it enters `phase` for the `entry`-th time."""
        struct.pack_into("<qqq", self.memory, TARGET, PHASES.index(phase), entry, int(delay * 1e9))

    def _fire(self, phase: str, entry: int) -> None:
        """A timer signal that nobody handles ends a process as SIGKILL does, without delay and without a last word."""
        wanted, at, delay = struct.unpack_from("<qqq", self.memory, TARGET)
        if at and (PHASES[wanted], at) == (phase, entry):
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, max(delay / 1e9, 1e-6))

    def entered(self, phase: str) -> tuple[int, float]:
        """How often a phase was entered, and the seconds spent in it."""
        entries, nanoseconds = CELL.unpack_from(self.memory, self._cell(phase))
        return entries, nanoseconds / 1e9

    def enter(self, phase: str) -> None:
        entries, spent = CELL.unpack_from(self.memory, self._cell(phase))
        CELL.pack_into(self.memory, self._cell(phase), entries + 1, spent)
        self.phase = phase
        self._fire(phase, entries + 1)

    def leave(self, phase: str, nanoseconds: int, outer: str) -> None:
        entries, spent = CELL.unpack_from(self.memory, self._cell(phase))
        CELL.pack_into(self.memory, self._cell(phase), entries, spent + nanoseconds)
        self.phase = outer

    def _cell(self, phase: str) -> int:
        return 8 + CELL.size * PHASES.index(phase)


def watch(board: Board) -> None:
    """Wrap the functions that make up a run. Once a process; children inherit it."""
    _mark(runner.job, "fit", board, lambda *_: "step")
    _mark(runner.job, "_conclude", board, lambda *_: "final")
    _mark(runner.train, "evaluate", board, lambda *_: "eval")
    _mark(CsvLog, "_append", board, lambda *_: "csv")
    _mark(Checkpoints, "save", board, lambda *_: "save", commits=True)
    _mark(Checkpoints, "_prune", board, lambda *_: "prune")
    _mark_data(board)
    _mark(Run, "begin", board, lambda run: "resume" if run.checkpoints.manifests() else "start")


def _mark_data(board: Board) -> None:
    inner: Function = runner.run.load

    @functools.wraps(inner)
    def marked(*args: Any, **kwargs: Any) -> Any:
        data = inner(*args, **kwargs)
        board.loaded = True
        return data

    runner.run.load = marked


def _mark(owner: Any, name: str, board: Board, phase_of: Callable[..., str], commits: bool = False) -> None:
    inner: Function = getattr(owner, name)

    @functools.wraps(inner)
    def marked(*args: Any, **kwargs: Any) -> Any:
        outer, phase, began = board.phase, phase_of(*args), time.monotonic_ns()
        board.enter(phase)
        try:
            result = inner(*args, **kwargs)
            if commits:
                board.committed = args[1]
            return result
        finally:
            board.leave(phase, time.monotonic_ns() - began, outer)

    setattr(owner, name, marked)
