"""T4: power cuts. The run works on an ext4 file system of its own; what had reached its image when the run was killed is all
that a machine would find after a power cut. A copy of the image is mounted, and the run goes on there.

SIGKILL alone loses nothing that was written; this level is the one that sees a missing fsync.
"""

import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.checkpoint import Checkpoints
from tests.torture.forks import KILLED, Aim, do_run, run_and_kill, run_once
from tests.torture.kills import Reference, judge, reference
from tests.torture.needs import need, shell
from tests.torture.scenarios import Scenario, scenarios

MEGABYTES = 24
MODES = ("data=ordered", "data=writeback")


@dataclass
class Cuts:
    """What the power cuts of a round did."""

    cuts: int = 0
    identical: int = 0
    lost_commits: int = 0  # cuts after which a checkpoint was gone whose save had returned
    bad: list[str] = field(default_factory=list)


def run(cuts: int, seed: int, root: Path) -> dict[str, Any]:
    """So many power cuts, over all scenarios and two modes of journalling."""
    prepare()
    rng, done, known = random.Random(seed), Cuts(), {}
    for number, scenario in enumerate(scenarios()):
        known[scenario.name] = reference(scenario, root / f"reference-{number}")
    while done.cuts < cuts:
        scenario = scenarios()[done.cuts % len(scenarios())]
        place = root / f"cut-{done.cuts}"
        cut(scenario, known[scenario.name], place, rng, done)
        shutil.rmtree(place, ignore_errors=True)
    if done.lost_commits:
        done.bad.append(f"{done.lost_commits} commits were lost")
    return {"cuts": done.cuts, "identical": done.identical, "lost_commits": done.lost_commits, "bad": done.bad}


def prepare() -> None:
    """Raise Skipped where file systems cannot be mounted here."""
    need("mkfs.ext4", "mount", "umount", root=True)
    if not Path("/dev/loop-control").exists():
        shell("modprobe loop")


def cut(
    scenario: Scenario,
    known: Reference,
    place: Path,
    rng: random.Random,
    done: Cuts,
    unsafe: Callable[[], None] | None = None,
) -> None:
    """One power cut at a random moment, and what the run makes of the rest. `unsafe` is called in the run that is cut."""

    def work() -> int:
        if unsafe is not None:
            unsafe()
        return do_run(scenario.config)

    place.mkdir(parents=True)
    image, copy, mode = place / "disk.img", place / "copy.img", MODES[done.cuts // 2 % 2]
    shell(f"truncate -s {MEGABYTES}M {image} && mkfs.ext4 -q -F {image}")
    with mounted(image, place / "disk", mode) as disk:
        end = run_and_kill(work, disk / "run", Aim(rng.uniform(0.2, 1.0) * known.seconds))
        shell(f"cp --sparse=always {image} {copy}")
    done.cuts += 1
    with mounted(copy, place / "found", mode) as disk:
        there = disk / "run"
        folder = scenario.folder(there)
        found = max(
            (int(path.stem.split("-")[1]) for path in Checkpoints(folder / "checkpoints").manifests()), default=-1
        )
        done.lost_commits += end.committed > found
        again = run_once(lambda: do_run(scenario.config), there)
        faults = judge(folder, known, again.code, there)
        if end.code not in KILLED | {0}:
            faults.append(f"ended with {end.code} before the cut")
    done.identical += not faults
    done.bad += [f"{scenario.name}, {mode}, committed {end.committed}, found {found}: {fault}" for fault in faults]


@contextmanager
def mounted(image: Path, where: Path, mode: str) -> Iterator[Path]:
    """An image as a file system, for as long as it is needed."""
    where.mkdir(exist_ok=True)
    shell(f"mount -o loop,{mode} {image} {where}")
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)
