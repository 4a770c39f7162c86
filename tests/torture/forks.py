"""The fork server: torch is imported once, every run is a child that can be killed at any moment."""

import gc
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import chdir, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from runner.environment import environment
from runner.faults import Exit, exit_code
from runner.folder import RunFolder, done_already, run_path
from runner.job import train
from runner.schema import RunConfig
from runner.screen import Screen
from runner.signals import FATAL
from tests.torture.phases import Board, watch

KILLED = {-signal.SIGKILL, -signal.SIGALRM}  # exit codes of children that ended without a last word
LIMIT = 900.0  # seconds after which a child counts as hanging; a busy machine may hold it for minutes
BOARD = Board()


def prepare(configs: Sequence[RunConfig]) -> None:
    """Once, before the first fork: one thread, so that a fork copies a whole process; what is read once, is read here.

    `configs` are run in this process, so that no child has to import or to build what all of them need.
    """
    torch.set_num_threads(1)
    environment(torch.device("cpu"))
    handlers = {number: signal.getsignal(number) for number in FATAL}
    for config in configs:
        with tempfile.TemporaryDirectory() as place, chdir(place):
            if do_run(config):
                raise RuntimeError(f"{run_path(config)}: does not even run undisturbed")
    for number, handler in handlers.items():
        signal.signal(number, handler)
    watch(BOARD)
    gc.collect()
    gc.freeze()


def do_run(config: RunConfig) -> int:
    """What `python -m runner` does with a checked config, and its exit code."""
    try:
        if not done_already(run_path(config), Screen("none")):
            train(config, RunFolder(run_path(config)))
        return int(Exit.DONE)
    except BaseException as error:
        traceback.print_exc()
        return int(exit_code(error))


def fork(work: Callable[[], int], place: Path, gate: int | None = None, aim: "Aim | None" = None) -> int:
    """Start `work` in a child, in the folder `place`; its result becomes the exit code. The child's pid.

    Its output goes to the file beside `place`, see `log_of`. With a `gate`, it first waits for a byte from that pipe.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    BOARD.clear()
    if aim is not None and aim.phase is not None:
        BOARD.aim(aim.phase, aim.entry, aim.delay)
    place.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        handle = os.open(log_of(place), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.chdir(place)
        if gate is not None:
            os.read(gate, 1)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
        with suppress(OSError):
            sys.stderr.flush()
        os._exit(code)


def limit_memory(more: int) -> None:
    """This process may take so many bytes of address space on top of what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def log_of(place: Path) -> Path:
    """What all the children in a folder have said; outside of it, so that a full disk there does not silence them."""
    return place.with_name(f"{place.name}.txt")


def tail(place: Path, characters: int = 600) -> str:
    """The last words of the children in a folder."""
    return log_of(place).read_text(errors="replace")[-characters:] if log_of(place).exists() else ""


@dataclass(frozen=True)
class Aim:
    """When to kill: `delay` seconds after the `entry`-th time that `phase` begins (or after the start: phase None)."""

    delay: float
    phase: str | None = None
    entry: int = 1


@dataclass(frozen=True)
class End:
    """How a child ended: its exit code (negative: the signal), the phase it was in, the last step committed."""

    code: int
    phase: str
    committed: int
    seconds: float


def finish(child: int, began: float) -> End:
    """Wait for a child; one that hangs is killed and counts as code -99."""
    while time.monotonic() - began < LIMIT:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return End(os.waitstatus_to_exitcode(status), BOARD.phase, BOARD.committed, time.monotonic() - began)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return End(-99, BOARD.phase, BOARD.committed, time.monotonic() - began)


def run_once(work: Callable[[], int], place: Path) -> End:
    """A child that nobody disturbs."""
    began = time.monotonic()
    return finish(fork(work, place), began)


def run_and_kill(work: Callable[[], int], place: Path, aim: Aim) -> End:
    """A child that is killed where `aim` says, if it gets there."""
    began = time.monotonic()
    child = fork(work, place, aim=aim)
    if aim.phase is None:
        time.sleep(aim.delay)
        os.kill(child, signal.SIGKILL)
    return finish(child, began)


@dataclass
class Marksman:
    """Draws aims: most at a random time of the whole run, the others into a phase that time alone would rarely hit."""

    rng: random.Random
    seconds: float  # of an uninterrupted run
    phases: dict[str, tuple[int, float]]  # entries and seconds of each phase in it
    aimed: float = 0.5

    def next(self, resumes: bool) -> Aim:
        """`resumes`: the run to be killed has a checkpoint to go on from."""
        if self.rng.random() > self.aimed:
            return Aim(self.rng.uniform(0, self.seconds) * self.rng.uniform(0.3, 1))
        never = {"start"} if resumes else {"start", "resume"}
        phase = self.rng.choice([name for name, (entries, _) in self.phases.items() if entries and name not in never])
        entries, spent = self.phases[phase]
        return Aim(self.rng.uniform(0, spent / max(entries, 1)), phase, self.rng.randint(1, max(1, entries // 3)))
