"""The harness in tests/torture, a level a test: TORTURE=short asks for a round of some minutes, TORTURE=long for a long one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    "TORTURE" not in os.environ, reason="takes some minutes of a quiet machine: set TORTURE=short"
)


def level(name: str, folder: Path) -> dict[str, Any]:
    """The figures of one level, in a process of its own: a fork needs a parent with one thread."""
    command = [sys.executable, "-m", "tests.torture", name, "--out", str(folder), "--workplace", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (folder / "figures.json").exists(), done.stderr
    found: dict[str, Any] = json.loads((folder / "figures.json").read_text())[name]
    print(json.dumps(found))
    if "skipped" in found:
        pytest.skip(f"{name} did not run here: {found['skipped']}")
    assert found["bad"] == []
    assert done.returncode == 0
    return found


def test_random_kills_leave_no_trace(tmp_path: Path) -> None:
    found = level("kills", tmp_path)
    assert found["kills"] >= 100
    assert found["identical"] == found["runs"]
    assert found["rows_lost"] == found["rows_repeated"] == found["rows_torn"] == 0


def test_a_kill_at_any_system_call_leaves_no_trace(tmp_path: Path) -> None:
    assert level("syscall_kills", tmp_path)["exit_codes"].get("-9", 0) > 50


def test_an_error_at_any_system_call_is_told_and_healed(tmp_path: Path) -> None:
    assert level("syscall_errors", tmp_path)["exit_codes"].get("74", 0) > 20


def test_a_power_cut_loses_no_commit(tmp_path: Path) -> None:
    found = level("power_cuts", tmp_path)
    assert found["identical"] == found["cuts"] > 0
    assert found["lost_commits"] == 0


def test_signals_to_real_command_lines(tmp_path: Path) -> None:
    found = level("command_lines", tmp_path)
    assert found["identical"] == found["runs"] > 0
    assert found["stops_saved"] == found["stops_asked"]


def test_no_mutant_of_a_checkpoint_is_accepted(tmp_path: Path) -> None:
    found = level("mutants", tmp_path)
    assert found["refused"] > 0.9 * found["mutants"]


def test_no_malicious_file_runs_its_code(tmp_path: Path) -> None:
    found = level("malicious", tmp_path)
    assert found["files"] >= 50
    assert found["executed"] == 0


def test_any_config_is_a_run_or_refused(tmp_path: Path) -> None:
    found = level("configs", tmp_path)
    assert min(found["refused"], found["accepted"], found["ran"]) > 0


def test_every_part_of_the_state_is_missed_when_it_is_left_out(tmp_path: Path) -> None:
    found = level("ablation", tmp_path)
    assert found["seen"] == found["parts"] >= 18


def test_the_harness_sees_naive_storage_fail(tmp_path: Path) -> None:
    assert level("control_kills", tmp_path)["failed"] > 0


def test_the_harness_sees_a_missing_fsync(tmp_path: Path) -> None:
    assert level("control_power", tmp_path)["lost_commits"] > 0


def test_the_table_of_faults_names_tests_that_exist_and_is_up_to_date() -> None:
    code = "from tests.torture import coverage as c; assert not c.unknown(), c.unknown(); print(c.page(), end='')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (ROOT / "tests" / "torture" / "README.md").read_text(encoding="utf-8")
