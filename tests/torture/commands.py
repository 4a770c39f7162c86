"""T5: real command lines in sessions of their own, with random KILL, TERM or INT, to the process or to its whole group."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

from runner.faults import Exit
from runner.folder import status_of
from tests.torture.forks import log_of, tail
from tests.torture.kills import Reference, judge
from tests.torture.scenarios import SWITCH, Scenario, fingerprint

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 900.0
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
BEFORE_RUN = {-signal.SIGTERM, -signal.SIGINT, 130}  # a stop before anybody listens: there is nothing yet to save
STEPS = 54
LONG = ("quant=8bit-rangebn", "epochs=3", "dataset.samples=160", "trainer.checkpoint_every=3", SWITCH)


@dataclass
class Tally:
    """What the signals did."""

    lines: int = 0  # command lines that a signal was sent to
    runs: int = 0
    identical: int = 0
    stops_asked: int = 0
    stops_saved: int = 0
    codes: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)  # from a signal to the end of the process, where it saved

    def figures(self) -> dict[str, Any]:
        figures = {key: value for key, value in vars(self).items() if isinstance(value, int)}
        spread = quantiles(self.seconds, n=20) if len(self.seconds) > 1 else [0.0] * 19
        figures["seconds_to_stop"] = {"p50": round(spread[9], 2), "p95": round(spread[18], 2)}
        return figures | {"exit_codes": {str(code): count for code, count in sorted(self.codes.items())}}


def start(words: list[str], place: Path, **more: Any) -> subprocess.Popen[bytes]:
    """`python -m runner …` in the folder `place`, in a session of its own; its output goes to the file beside it."""
    place.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [*more.pop("prefix", []), sys.executable, "-m", "runner", *words]
    with log_of(place).open("ab") as log:
        return subprocess.Popen(
            command, cwd=place, env=environment, stdout=log, stderr=log, start_new_session=True, **more
        )


def finished(process: subprocess.Popen[bytes]) -> int:
    """The exit code; a run that hangs is ended, and its code says so."""
    try:
        return process.wait(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return -99


def run(lines: int, seed: int, root: Path) -> dict[str, Any]:
    """So many command lines, each sent a signal; two to a run, which is then left alone to finish."""
    rng, tally, bad = random.Random(seed), Tally(), []
    scenario = Scenario("command line", LONG)
    code = finished(start(scenario.command, root / "reference"))
    assert code == 0, tail(root / "reference")
    folder = scenario.folder(root / "reference")
    known = Reference(folder, fingerprint(folder), 0.0, {})
    while tally.lines < lines:
        bad += _disturbed(scenario, known, root / f"run-{tally.runs}", rng, tally)
    return tally.figures() | {"bad": bad}


def _disturbed(scenario: Scenario, known: Reference, place: Path, rng: random.Random, tally: Tally) -> list[str]:
    bad: list[str] = []
    for target in sorted(rng.choice((rng.randrange(STEPS), rng.randrange(STEPS), -1)) for _ in range(2)):
        sent, to_group = rng.choice(SIGNALS), rng.random() < 0.5
        process = start(scenario.command, place)
        _wait(process, scenario.folder(place), target, rng)
        began = time.monotonic()
        with suppress(ProcessLookupError):  # it may be over already
            (os.killpg if to_group else os.kill)(process.pid, sent)
        code = finished(process)
        tally.lines += 1
        tally.codes[code] += 1
        if code == Exit.PREEMPTED:
            tally.seconds.append(time.monotonic() - began)
        whom = f"{sent.name} to the {'group' if to_group else 'process'}, aimed at step {target}"
        bad += [f"{whom}: {fault}" for fault in _wrong(code, sent, scenario.folder(place), place, tally)]
    code = finished(start(scenario.command, place))
    faults = judge(scenario.folder(place), known, code, place)
    tally.runs += 1
    tally.identical += not faults
    return bad + faults


def _wait(process: "subprocess.Popen[bytes]", folder: Path, target: int, rng: random.Random) -> None:
    """Until the run has committed a step (-1: some time in its start), and a moment more."""
    if target < 0:
        time.sleep(rng.uniform(0, 4))
        return
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        committed = [int(path.stem.split("-")[1]) for path in folder.glob("checkpoints/step-*.json")]
        if max(committed, default=-1) >= target:
            break
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.03))


def _wrong(code: int, sent: signal.Signals, folder: Path, place: Path, tally: Tally) -> list[str]:
    """Whether the exit code is one that this signal may cause, and status.json tells the truth."""
    state = status_of(folder).get("state")
    if state == "running":
        return [f"ended with {code}, but status.json says that it is running"]
    if code == Exit.DONE:
        return [] if state == "done" else [f"ended with 0, but status.json says {state}"]
    if state == "done" and not (folder / "weights.safetensors").exists():
        return [f"ended with {code}: a false 'done'"]
    if sent == signal.SIGKILL:
        return [] if code == -signal.SIGKILL else [f"ended with {code}"]
    if code in BEFORE_RUN:
        return []
    tally.stops_asked += 1
    saved = code == Exit.PREEMPTED and state == "preempted"
    tally.stops_saved += saved
    return [] if saved else [f"ended with {code}, and status.json says {state}: {tail(place)}"]
