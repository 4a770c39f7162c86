"""The harness in tests/torture itself: its page is current, and it tells when something is bad, skipped or dead.

The levels are no tests of this suite: `python -m tests.torture --short` runs them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.torture.__main__ import _say, at_once

ROOT = Path(__file__).resolve().parent.parent


def harness(*words: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_the_table_of_faults_names_tests_that_exist_and_is_up_to_date() -> None:
    code = "from tests.torture import coverage as c; assert not c.unknown(), c.unknown(); print(c.page(), end='')"
    done = harness("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (ROOT / "tests" / "torture" / "README.md").read_text(encoding="utf-8")


def test_every_fault_of_the_list_is_covered_or_says_why_not() -> None:
    done = harness(
        "-c", "from tests.torture import coverage as c; print(*[(row[0], row[3]) for row in c.table()], sep='\\n')"
    )
    rows = [line for line in done.stdout.splitlines() if line]
    wanted = {"F": 23, "C": 14, "D": 10, "G": 17, "L": 14}
    assert [row[2:5] for row in rows] == [f"{kind}{n:02}" for kind, last in wanted.items() for n in range(1, last + 1)]


def test_kills_leave_no_trace(tmp_path: Path) -> None:
    """A handful of kills and the control: the machinery works here. The rounds that count are larger."""
    done = harness("-m", "tests.torture", "kills", "mutants", "--kills", "3", "--short", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["kills"]["identical"] == found["kills"]["runs"] > 0
    assert found["mutants"]["mutants"] == 1_000
    assert all({"commit", "seed", "date"} <= level.keys() for level in found.values())


def test_a_level_that_dies_is_bad(tmp_path: Path) -> None:
    def work(name: str, _: Path) -> dict[str, list[str]]:
        if name == "dies":
            os._exit(0)
        return {"bad": []}

    found = at_once(2, {"lives": 1, "dies": 2, "lives too": 3}, work, tmp_path)
    assert found == {"lives": {"bad": []}, "dies": {"bad": ["the level itself ended early"]}, "lives too": {"bad": []}}
    assert _say(found, tmp_path) == 1


def test_what_did_not_run_is_told(tmp_path: Path, capsys: "object") -> None:
    assert _say({"power": {"skipped": "needs root"}}, tmp_path) == 0
    assert "SKIPPED power: needs root" in capsys.readouterr().out  # type: ignore[attr-defined]
