"""Ends a training of several ranks when one of them hangs: waiting for it would be for ever."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch.distributed.distributed_c10d import Store

from runner.faults import Exit
from runner.ranks.meeting import Meeting

PATIENCE = (
    20.0  # seconds without a step, or without a sign of life of some rank, after which that rank is taken to hang
)
STEPS = 10  # or so many times the longest step, where that is more
TICK = 1.0  # seconds between two looks, and between two signs of life
BUSY = 2  # hundredths of a second of processor time between two looks: somebody computes
LONG = 3600.0  # seconds for what is no step: reading data, compiling, saving
LEFT = b"left"  # the last sign of life of a rank that is done


class Beats(threading.Thread):
    """Says in the store, every tick, that this process lives, and hears the others.

    In a thread of its own: a store that is gone or hangs must not stop the watchdog, for which everybody then is silent.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        super().__init__(daemon=True, name="beats")
        self.store, self.keys, self.own = store.clone(), [f"beat/{n}" for n in range(size)], f"beat/{rank}"
        self.heard = [b""] * size
        self.over, self.done = threading.Event(), False

    def run(self) -> None:
        count = 0
        with suppress(RuntimeError):
            while not self.over.wait(TICK if count else 0.0):
                self.store.set(self.own, str(count))
                self.heard = self.store.multi_get(self.keys)
                count += 1
            if self.done:
                self.store.set(self.own, LEFT.decode())

    def stop(self, done: bool) -> None:
        """With `done`, the others need not wait for this rank."""
        self.done = done
        self.over.set()
        self.join(timeout=2 * TICK)


class Watchdog:
    """A thread that ends this process, and the ranks beside it, when no rank makes a step or one gives no sign of life.

    It counts its own ticks and no clock, so that a machine that slept, or a process that was frozen, is not taken to hang.
    While ranks of this host compute (`looks_at_cpu`), ticks count a tenth: a crowded machine is slow and does not hang.
    What is no step may take LONG; a rank that is stopped, or on a host that is gone, is noticed then, too.
    """

    def __init__(self, meeting: Meeting, rank: int, last_words: Callable[[str], None], looks_at_cpu: bool) -> None:
        self.siblings, self.last_words, self.looks_at_cpu = meeting.siblings, last_words, looks_at_cpu
        self.limit, self.longest = LONG, 0.0  # the first step of a process compiles, loads and fills caches
        self.idle, self.over = 0.0, threading.Event()
        self.beats = Beats(meeting.store, rank, len(meeting.processes))
        self.heard, self.silence = self.beats.heard, [0.0] * len(meeting.processes)
        self.beats.start()
        threading.Thread(target=self._look, daemon=True, name="watchdog").start()

    def alive(self) -> None:
        """A step is over."""
        if self.limit < LONG:
            self.longest = max(self.longest, self.idle)
        self.idle, self.limit = 0.0, max(PATIENCE, STEPS * self.longest)

    @contextmanager
    def long(self) -> Iterator[None]:
        before, self.limit = self.limit, LONG
        try:
            yield
        finally:
            self.idle, self.limit = 0.0, before

    def stop(self, done: bool) -> None:
        if not self.over.is_set():
            self.over.set()
            self.beats.stop(done)

    def _look(self) -> None:
        before, worked = time.monotonic(), self._cpu_ticks()
        while not self.over.wait(TICK):
            now, working = time.monotonic(), self._cpu_ticks()
            slow = 0.1 if working - worked > BUSY else 1.0
            passed = slow * min(now - before, 2 * TICK)
            before, worked = now, working
            self._listen(passed)
            self.idle += passed
            if self.idle > self.limit:
                self._give_up(f"no rank moved for {self.limit:.0f} s: one of them hangs")
            silent = [rank for rank, seconds in enumerate(self.silence) if seconds > PATIENCE]
            if silent:
                self._give_up(f"no sign of life of rank {', '.join(map(str, silent))} for {PATIENCE:.0f} s")

    def _listen(self, passed: float) -> None:
        """Count how long each rank has been silent."""
        heard = self.beats.heard
        for rank, (now, before) in enumerate(zip(heard, self.heard, strict=True)):
            self.silence[rank] = 0.0 if now != before or now == LEFT else self.silence[rank] + passed
        self.heard = heard

    def _cpu_ticks(self) -> int:
        """Processor time of the ranks of this host so far, in hundredths of a second; 0 where nobody says."""
        total = 0
        for pid in [os.getpid(), *self.siblings] if self.looks_at_cpu else []:
            with suppress(OSError, ValueError, IndexError):
                fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
                total += int(fields[11]) + int(fields[12])
        return total

    def _give_up(self, reason: str) -> None:
        reason = f"{reason}; run the same command again to go on"
        print(f"runner: {reason}", file=sys.stderr, flush=True)
        with suppress(Exception):
            self.last_words(reason)
        for pid in self.siblings:  # one that is stopped would not follow the agent's TERM
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        os._exit(Exit.PREEMPTED)
