"""The negative control: the same harness over storage as it is often written.

It must be seen to fail, or the harness proves nothing.
"""

import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import runner.files
import runner.weights
from runner.checkpoint import Checkpoint, Checkpoints
from runner.log import CsvLog
from runner.schema import RunConfig
from tests.torture import power
from tests.torture.forks import do_run
from tests.torture.kills import Tally, reference, torture
from tests.torture.scenarios import scenarios


def use_naive_storage() -> None:
    """For the rest of this process: torch.save over the last file, rows that are only ever appended, files written in place."""
    Checkpoints.save = _save  # type: ignore[method-assign]
    Checkpoints.newest = _newest  # type: ignore[method-assign]
    CsvLog.rewind = CsvLog.clear = lambda *_: None  # type: ignore[method-assign, assignment]
    runner.weights.write_atomic = runner.files.write_atomic = _write  # type: ignore[attr-defined]


def _save(self: Checkpoints, step: int, state: Mapping[str, Any], best: Any, facts: Mapping[str, Any]) -> None:
    torch.save({"state": dict(state), "best": best[1] if best else None, "facts": dict(facts)}, self.folder / "last.pt")


def _newest(self: Checkpoints) -> Checkpoint | None:
    if not (self.folder / "last.pt").exists():
        return None
    found = torch.load(self.folder / "last.pt", weights_only=True)
    return Checkpoint(found["facts"], found["state"], found["best"])


def _write(path: Path, content: bytes, *, durable: bool = True) -> None:
    path.write_bytes(content)


def naive_run(config: RunConfig) -> int:
    use_naive_storage()
    return do_run(config)


def forget_fsync() -> None:
    """For the rest of this process nothing is forced to the disk."""
    os.fsync = os.fdatasync = lambda _: None  # type: ignore[assignment]


def run_kills(kills: int, seed: int, root: Path) -> dict[str, Any]:
    """Random kills over naive storage; bad is if all runs come out the same."""
    rng, tally, known = random.Random(seed), Tally(), {}
    for number, scenario in enumerate(scenarios()):
        known[scenario.name] = reference(scenario, root / f"reference-{number}", naive_run)
    while tally.kills < kills:
        scenario = scenarios()[tally.runs % len(scenarios())]
        torture(scenario, known[scenario.name], root / f"run-{tally.runs}", rng, tally, naive_run)
    failed = tally.runs - tally.identical
    bad = [] if failed else ["naive storage survived: the kills of this round prove nothing"]
    examples = sorted({fault.splitlines()[-1][-160:] for fault in tally.bad})[:5]
    return {"kills": tally.kills, "runs": tally.runs, "failed": failed, "examples": examples, "bad": bad}


def run_power(cuts: int, seed: int, root: Path) -> dict[str, Any]:
    """Power cuts of a run that never calls fsync; bad is if no commit is lost."""
    power.prepare()
    rng, done, scenario = random.Random(seed), power.Cuts(), scenarios()[0]
    known = reference(scenario, root / "reference")
    while done.cuts < cuts:
        place = root / f"cut-{done.cuts}"
        power.cut(scenario, known, place, rng, done, unsafe=forget_fsync)
        shutil.rmtree(place, ignore_errors=True)
    bad = [] if done.lost_commits else ["without fsync no commit was lost: the cuts of this round prove nothing"]
    return {"cuts": done.cuts, "lost_commits": done.lost_commits, "bad": bad}
