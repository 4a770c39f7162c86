"""T5: real command lines in sessions of their own, with random KILL, TERM or INT, to the process or to its whole group."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.faults import Exit
from runner.folder import status_of
from tests.torture.forks import log_of, tail
from tests.torture.kills import Reference, judge
from tests.torture.scenarios import SWITCH, Scenario, fingerprint

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120.0
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
BEFORE_TORCH = {-signal.SIGTERM, -signal.SIGINT, 130, 143}  # a stop before the run began: nothing to save yet
STATES = {int(Exit.DONE): "done", int(Exit.PREEMPTED): "preempted"}
LONG = ("quant=8bit-rangebn", "epochs=3", "dataset.samples=320", "trainer.checkpoint_every=20", SWITCH)


@dataclass
class Tally:
    """What the signals did."""

    runs: int = 0
    identical: int = 0
    stops_asked: int = 0
    stops_saved: int = 0


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


def run(runs: int, seed: int, root: Path) -> dict[str, Any]:
    """So many runs, each disturbed until it is done."""
    rng, tally, bad = random.Random(seed), Tally(), []
    codes: Counter[int] = Counter()
    scenario = Scenario("command line", LONG)
    began = time.monotonic()
    code = finished(start(scenario.command, root / "reference"))
    assert code == 0, tail(root / "reference")
    seconds = time.monotonic() - began
    known = Reference(
        scenario.folder(root / "reference"), fingerprint(scenario.folder(root / "reference")), seconds, {}
    )
    for number in range(runs):
        bad += _disturbed(scenario, known, root / f"run-{number}", rng, codes, tally)
    return vars(tally) | {"exit_codes": {str(code): count for code, count in sorted(codes.items())}, "bad": bad}


def _disturbed(
    scenario: Scenario, known: Reference, place: Path, rng: random.Random, codes: Counter[int], tally: Tally
) -> list[str]:
    bad: list[str] = []
    for _ in range(2):  # signals; the third start is left alone
        sent, to_group = rng.choice(SIGNALS), rng.random() < 0.5
        process = start(scenario.command, place)
        time.sleep(rng.uniform(0.4, 1.0) * known.seconds)
        (os.killpg if to_group else os.kill)(process.pid, sent)
        code = finished(process)
        codes[code] += 1
        whom = f"{sent.name} to the {'group' if to_group else 'process'}"
        bad += [f"{whom}: {fault}" for fault in _wrong(code, sent, scenario, place, tally)]
        if code == 0:
            break
    code = finished(start(scenario.command, place))
    faults = judge(scenario.folder(place), known, code, place)
    tally.runs += 1
    tally.identical += not faults
    return bad + faults


def _wrong(code: int, sent: signal.Signals, scenario: Scenario, place: Path, tally: Tally) -> list[str]:
    """Whether the exit code is one that this signal may cause, and status.json says the same."""
    state = status_of(scenario.folder(place)).get("state")
    if sent == signal.SIGKILL:
        return [] if code in (0, -signal.SIGKILL) else [f"ended with {code}"]
    if code in BEFORE_TORCH:
        return [] if state != "done" else [f"ended with {code}, but is done"]
    if code not in STATES:
        return [f"ended with {code}: {tail(place)}"]
    tally.stops_asked += 1
    tally.stops_saved += state == STATES[code]
    return [] if state == STATES[code] else [f"ended with {code}, but status.json says {state}"]
