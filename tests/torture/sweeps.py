"""Sweeps whose parent is killed again and again.

The parent alone gets SIGKILL, at a random moment of a random job, and the same command follows at once: jobs have to notice that
nobody waits for them, and none may be done twice.
"""

import random
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.folder import status_of
from tests.torture.commands import finished, start
from tests.torture.forks import tail
from tests.torture.scenarios import Fingerprint, Scenario, fingerprint

SMALL = Scenario("small", ("quant=none", "epochs=4", "dataset.samples=40", "trainer.checkpoint_every=4"))
SEEDS = 4
WORDS = ["-m", *SMALL.command, f"seeds={SEEDS}"]
AFTER = 1.5  # seconds, at most, from the start of a job to the kill: it loads, trains, saves or is over
WAIT = 100.0  # seconds for a job to begin


@dataclass
class Tally:
    """What came of the kills."""

    kills: int = 0
    sweeps: int = 0
    identical: int = 0
    jobs_over: Counter[int] = field(default_factory=Counter)  # how many jobs were done when the parent was killed

    def figures(self) -> dict[str, Any]:
        over = {str(jobs): count for jobs, count in sorted(self.jobs_over.items())}
        return {"kills": self.kills, "sweeps": self.sweeps, "identical": self.identical, "done_at_kill": over}


def run(kills: int, seed: int, root: Path) -> dict[str, Any]:
    """So many kills of the parent of a sweep of four jobs, three to a sweep, which then has to be as one left alone."""
    rng, tally, bad = random.Random(seed), Tally(), list[str]()
    if finished(start(WORDS, root / "alone")):
        return {"bad": [tail(root / "alone")]}
    known = prints(root / "alone")
    while tally.kills < kills:
        bad += _disturbed(min(3, kills - tally.kills), root / f"sweep-{tally.sweeps}", known, rng, tally)
    return tally.figures() | {"bad": bad}


def _disturbed(kills: int, place: Path, known: dict[str, Fingerprint], rng: random.Random, tally: Tally) -> list[str]:
    bad, done = list[str](), dict[str, int]()
    for _ in range(kills):
        parent = start(WORDS, place)
        _wait(parent, place, rng)
        if parent.poll() is not None:
            break  # over before it could be killed
        parent.kill()
        parent.wait()
        done = finals(place)
        tally.kills += 1
        tally.jobs_over[len(done)] += 1
    code = finished(start(WORDS, place))
    tally.sweeps += 1
    bad += [f"ended with {code}: {tail(place)}"] if code else []
    bad += [f"{name} was done again" for name, when in done.items() if finals(place).get(name) != when]
    found = prints(place)
    bad += [f"jobs {sorted(found)}, not {sorted(known)}"] if found.keys() != known.keys() else []
    differing = {name: found[name].differences(known[name]) for name in found.keys() & known.keys()}
    bad += [f"{name} differs in {', '.join(what)}" for name, what in differing.items() if what]
    tally.identical += not bad
    return bad


def _wait(parent: "subprocess.Popen[bytes]", place: Path, rng: random.Random) -> None:
    """Until a random one of the jobs that are not done has begun, and a moment more; or not at all, now and then."""
    number = rng.randrange(SEEDS + 1)
    deadline = time.monotonic() + WAIT
    while len(begun(place)) < number and parent.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, AFTER))


def begun(place: Path) -> list[Path]:
    return list(place.glob("outputs/runs/*/status.json"))


def finals(place: Path) -> dict[str, int]:
    """The jobs that are done, and when they were."""
    return {p.parent.name: p.stat().st_mtime_ns for p in begun(place) if status_of(p.parent).get("state") == "done"}


def prints(place: Path) -> dict[str, Fingerprint]:
    return {path.parent.name: fingerprint(path.parent) for path in begun(place)}
