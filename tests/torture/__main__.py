"""The harness as a program: every level, two at a time; figures.json at the end, and exit code 1 if anything was bad.

A round may come in pieces: each level's figures say of which commit they are, and those of other levels stay.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # before torch: a fork copies one thread, and no GPU

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    options = _options()
    from tests.torture.forks import BOARD, prepare  # imports torch
    from tests.torture.levels import LEVELS
    from tests.torture.needs import Skipped
    from tests.torture.scenarios import short_scenarios

    unknown = set(options.levels) - {level.name for level in LEVELS}
    if unknown:
        sys.exit(f"no level {', '.join(sorted(unknown))}; known: {', '.join(level.name for level in LEVELS)}")
    about = {"commit": _commit(), "seed": options.seed, "short": options.short}
    options.out.mkdir(parents=True, exist_ok=True)
    prepare([scenario.config for scenario in short_scenarios()])

    def work(level: Any, place: Path) -> dict[str, Any]:
        BOARD.renew()
        size = options.kills if options.kills and level.name == "kills" else level.size(options.short)
        began = time.monotonic()
        try:
            found = level.run(size, options.seed, place)
        except Skipped as reason:
            found = {"skipped": str(reason)}
        spent = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        cost = {"seconds": round(time.monotonic() - began, 1), "processor_seconds": round(spent, 1)}
        return found | cost | about | {"date": _now()}

    with tempfile.TemporaryDirectory(prefix="torture-", dir=options.workplace, ignore_cleanup_errors=True) as folder:
        chosen = {level.name: level for level in LEVELS if level.size(options.short) is not None}
        chosen = {name: level for name, level in chosen.items() if not options.levels or name in options.levels}
        found = at_once(options.jobs, chosen, lambda name, place: work(chosen[name], place), Path(folder))
    path = options.out / "figures.json"
    figures = (json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}) | found
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return _say(found, path)


Work = Callable[[str, Path], dict[str, Any]]


def at_once(jobs: int, names: Mapping[str, Any], work: Work, folder: Path) -> dict[str, dict[str, Any]]:
    """What `work` says of each name, each in a child of its own, `jobs` of them at a time."""
    waiting, running, found = list(names), dict[int, str](), dict[str, dict[str, Any]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            running[_started(name, work, folder)] = name
        name = running.pop(_ended(running))
        answer = folder / f"{name}.json"
        found[name] = json.loads(answer.read_text()) if answer.exists() else {"bad": ["the level itself ended early"]}
        print(f"{name}: {json.dumps(found[name])}", flush=True)
    return found


def _ended(children: Iterable[int]) -> int:
    """The first of these that ends; other children of this process are somebody else's."""
    while True:
        for child in children:
            if os.waitpid(child, os.WNOHANG)[0]:
                return child
        time.sleep(0.05)


def _started(name: str, work: Work, folder: Path) -> int:
    """The pid of a child that leaves what it found in a file, whole or not at all."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    try:
        answer = folder / f"{name}.json"
        answer.with_suffix(".part").write_text(json.dumps(work(name, folder / name)))
        answer.with_suffix(".part").rename(answer)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _say(found: Mapping[str, Mapping[str, Any]], path: Path) -> int:
    """The last lines: what did not run here, what was bad, where the figures are."""
    for name, figures in found.items():
        if "skipped" in figures:
            print(f"SKIPPED {name}: {figures['skipped']}")
        for fault in figures.get("bad", []):
            print(f"BAD {name}: {fault}")
    bad = sum(len(figures.get("bad", [])) for figures in found.values())
    print(f"{f'{bad} BAD' if bad else 'nothing bad'}; figures: {path}")
    return int(bad > 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("levels", nargs="*", help="which ones; all where none is named")
    parser.add_argument("--kills", type=int, help="random SIGKILLs of the level `kills`")
    parser.add_argument("--short", action="store_true", help="the round of every push, some minutes; else the long one")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="levels at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "torture")
    parser.add_argument("--workplace", help="where the runs lie meanwhile; the disk that is tortured")
    return parser.parse_args()


def _commit() -> str:
    """The commit of the code, with a + where files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    sys.exit(main())
