"""The harness as a program: `python -m tests.torture --kills 2000` writes figures.json and ends with 1 if anything was bad."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # before torch: a fork copies one thread, and no GPU

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    options = _options()
    from tests.torture.levels import LEVELS  # imports torch
    from tests.torture.needs import Skipped

    sizes = {level.name: level.size(options.size) for level in LEVELS}
    sizes["kills"] = options.kills or sizes["kills"]
    figures: dict[str, Any] = {"commit": _commit(), "seed": options.seed, "size": options.size, "date": _now()}
    bad = 0
    with tempfile.TemporaryDirectory(prefix="torture-", dir=options.workplace, ignore_cleanup_errors=True) as place:
        for level in LEVELS:
            if options.levels and level.name not in options.levels:
                continue
            began = time.monotonic()
            try:
                found = level.run(sizes[level.name], options.seed, Path(place) / level.name)
            except Skipped as reason:
                found = {"skipped": str(reason)}
            figures[level.name] = found | {"seconds": round(time.monotonic() - began, 1)}
            bad += len(found.get("bad", []))
            print(f"{level.name}: {json.dumps(figures[level.name])}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(f"{'nothing bad' if not bad else f'{bad} BAD'}; figures: {options.out / 'figures.json'}")
    return int(bad > 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("levels", nargs="*", help="which ones; all where none is named")
    parser.add_argument("--kills", type=int, help="random SIGKILLs of the first level")
    parser.add_argument("--size", choices=("short", "long"), default=os.environ.get("TORTURE", "short"))
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
