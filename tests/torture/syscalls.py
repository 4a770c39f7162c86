"""T2 and T3: a kill or an input/output error at every single system call that touches the disk, one after the other.

strace attaches to a stopped child (from the start of a process it would take seconds a point) and counts calls of one
kind, so each kind is swept alone. A kill comes as the call is entered.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.faults import Exit, RunnerError
from runner.folder import status_of
from tests.torture.forks import Aim, End, do_run, finish, fork, run_and_kill, run_once, tail
from tests.torture.kills import Reference, judge, reference
from tests.torture.needs import need
from tests.torture.scenarios import Scenario, fingerprint, short_scenario

CALLS = ("write", "fsync", "fdatasync", "rename", "openat", "unlink", "close", "ftruncate", "mkdir")
ERRORS = {
    "write": ("ENOSPC", "EIO"),
    "fsync": ("EIO",),
    "fdatasync": ("EIO", "ENOSPC"),
    "rename": ("ENOSPC", "EROFS"),
    "openat": ("EMFILE", "EIO"),
    "openat to write": ("EMFILE", "EIO", "ENOSPC", "EROFS"),
    "unlink": ("EROFS",),
    "close": ("EIO",),
    "ftruncate": ("EIO",),
    "mkdir": ("ENOSPC", "EROFS"),
}
# What an I/O error may end with; DONE where it does no harm.
HONEST = {int(code) for code in (Exit.DONE, Exit.IO, Exit.LOCKED)}


@dataclass(frozen=True)
class Point:
    """One fault: the N-th call of a kind, in a run that starts or in one that is taken up again."""

    call: str
    number: int
    error: str | None
    resumed: bool

    @property
    def injection(self) -> str:
        fault = f"error={self.error}" if self.error else "signal=SIGKILL"
        return f"{self.call}:{fault}:when={self.number}"


@dataclass(frozen=True)
class Stage:
    """A scenario with its undisturbed run, and a folder that was killed half-way, to be copied for faults during resume.

    `calls`: those that touch the run folder, of a run that starts (False) and of a resumed one (True); see `_calls`.
    """

    scenario: Scenario
    known: Reference
    half: Path
    calls: dict[bool, list[tuple[str, int, bool]]]


def run_kills(size: int, seed: int, root: Path) -> dict[str, Any]:
    """A kill at every call that touches the run folder, in a run that starts and in a resumed one."""
    return _sweep(root, size, lambda call, writes: (None,), -9)


def run_errors(size: int, seed: int, root: Path) -> dict[str, Any]:
    """Every error that may meet it at every call that touches the run folder, in a run that starts and in a resumed one."""
    return _sweep(root, size, lambda call, writes: ERRORS[f"{call} to write" if writes else call], int(Exit.IO))


def _sweep(root: Path, size: int, errors_of: Callable[[str, bool], Iterable[str | None]], usual: int) -> dict[str, Any]:
    """Every point, or `size` of them (0: all), evenly spaced. Most have to end with the `usual` code, or nothing was hit."""
    need("strace")
    stage = prepare(root)
    points = [
        Point(call, number, error, resumed)
        for resumed, calls in stage.calls.items()
        for call, number, writes in calls
        for error in errors_of(call, writes)
    ]
    codes: Counter[int] = Counter()
    bad: list[str] = []
    count = min(size or len(points), len(points))
    chosen = [points[i * len(points) // count] for i in range(count)]
    for index, point in enumerate(chosen):
        code, faults = strike(stage, point, root / f"point-{index}")
        codes[code] += 1
        bad += [f"{point.injection}{' in a resumed run' if point.resumed else ''}: {fault}" for fault in faults]
    if codes[usual] < count // 4:
        bad.append(f"only {codes[usual]} of {count} runs ended with {usual}: the faults of this round prove nothing")
    return {
        "points": len(chosen),
        "of": len(points),
        "exit_codes": {str(code): count for code, count in sorted(codes.items())},
        "bad": bad,
    }


def prepare(root: Path) -> Stage:
    """The undisturbed run, a half-done one, and the calls that either makes."""
    scenario = short_scenario()
    known = reference(scenario, root / "reference")
    half = root / "half"
    run_and_kill(lambda: do_run(scenario.config), half, Aim(0.0, "save", 2))
    again = root / "again"
    shutil.copytree(half, again)
    calls = {False: _calls(scenario, root / "counted"), True: _calls(scenario, again)}
    return Stage(scenario, known, half, calls)


def _calls(scenario: Scenario, place: Path) -> list[tuple[str, int, bool]]:
    """The calls that touch the run folder, in their order: kind, number among all of its kind, whether it opens to write."""
    trace, folder = place.with_name(f"{place.name}-trace.txt"), scenario.folder(place).name
    traced(scenario, place, ["-y", "-e", f"trace={','.join(CALLS)}", "-o", str(trace)])
    seen: Counter[str] = Counter()
    found = []
    for call, rest in re.findall(r"^\d+ +(\w+)\((.*)$", trace.read_text(errors="replace"), re.MULTILINE):
        seen[call] += 1
        if folder in rest:
            found.append((call, seen[call], call == "openat" and "O_CREAT" in rest))
    return found


def traced(scenario: Scenario, place: Path, options: list[str]) -> End:
    """A run under strace, attached before it begins."""
    began = time.monotonic()
    gate, opener = os.pipe()
    child = fork(lambda: do_run(scenario.config), place, gate=gate)
    command = ["strace", "-f", "-p", str(child), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as tracer:
        while "TracerPid:\t0\n" in Path(f"/proc/{child}/status").read_text():
            if tracer.poll() is not None:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise RuntimeError(f"strace cannot attach: {tracer.stderr.read().decode() if tracer.stderr else ''}")
            time.sleep(0.001)
        os.write(opener, b"x")
        os.close(opener)
        os.close(gate)
        end = finish(child, began)
        tracer.wait()
    return end


def strike(stage: Stage, point: Point, place: Path) -> tuple[int, list[str]]:
    """One fault, then the same command again on a healthy disk: the exit code, and what was wrong."""
    if point.resumed:
        shutil.copytree(stage.half, place)
    quiet = ["-o", "/dev/null", "-e", f"trace={point.call}", "-e", f"inject={point.injection}"]
    end = traced(stage.scenario, place, quiet)
    faults = list(_lies(stage, point, place, end))
    code = run_once(lambda: do_run(stage.scenario.config), place).code
    faults += judge(stage.scenario.folder(place), stage.known, code, place)
    if not faults:
        shutil.rmtree(place)
    return end.code, faults


def _lies(stage: Stage, point: Point, place: Path, end: End) -> Iterator[str]:
    """Right after the fault: an exit code that is none of the table's, or a 'done' that is not true."""
    folder = stage.scenario.folder(place)
    if point.error is None:
        if end.code not in (-9, 0):
            yield f"killed, but ended with {end.code}"
    elif end.code not in HONEST:
        yield f"ended with {end.code}: {tail(place)}"
    if end.code == 0 or status_of(folder).get("state") == "done":
        try:
            differing = set(fingerprint(folder).differences(stage.known.print)) - {"litter"}
        except (OSError, IndexError, RunnerError) as error:
            differing = {f"what can be read: {error!r}"}
        if differing:
            yield f"says done, but differs in {', '.join(differing)}"
