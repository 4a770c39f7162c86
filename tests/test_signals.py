"""Stops, and what status.json says after each: while a run starts, in its last test, and twice."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import runner.job
from runner.compose import config_from
from runner.faults import Preempted
from runner.folder import RunFolder, run_path, status_of
from runner.schema import RunConfig
from runner.signals import StopRequest

WORDS = "dataset=synthetic dataset.size=16 dataset.samples=40 dataset.test_samples=16 batch_size=8 epochs=1".split()
WORDS += [
    "model.hidden=8",
    "model.channels=[2,3]",
    "trainer.progress=none",
    "trainer.dashboard=none",
    "trainer.threads=1",
]


def in_child(work: Callable[[], None]) -> int:
    """The exit code of a process that does this (99: it came to the end)."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        work()
    finally:
        os._exit(99)


def send(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return config_from([*WORDS, f"outputs={tmp_path}"])


def status(config: RunConfig) -> dict[str, Any]:
    return dict(json.loads((run_path(config) / "status.json").read_text()))


def test_before_training_a_stop_breaks_off_what_takes_long(own_signals: None) -> None:
    StopRequest()
    began = time.monotonic()
    with pytest.raises(Preempted, match="stopped by SIGTERM"):
        subprocess.run(["sh", "-c", f"kill -TERM {os.getpid()}; sleep 60"], check=True)
    assert time.monotonic() - began < 50


def test_what_a_stop_left_half_loaded_is_the_stop_s_doing(
    config: RunConfig, own_signals: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modules swallow exceptions while they are imported, and fail later, in ways of their own."""

    def half_loaded(*_: Any, **__: Any) -> None:
        with suppress(Exception):
            send()
        raise RecursionError("maximum recursion depth exceeded")

    monkeypatch.setattr("runner.run.load", half_loaded)
    with pytest.raises(Preempted, match="stopped by SIGTERM"):
        runner.job.train(config)
    assert (status(config)["state"], status(config)["exit_code"]) == ("preempted", 75)


HALF_LOADED = """
import os, signal, sys
then = sys.argv.pop()
class Finder:
    def find_spec(self, name, *_):
        if name == "runner.job":
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except Exception:
                pass
            if then == "fails":
                raise ImportError("cannot load module more than once per process")
sys.meta_path.insert(0, Finder())
from runner.cli import main
main()
"""


@pytest.mark.parametrize("then", ["fails", "goes on"])
def test_a_stop_that_an_import_swallows_is_a_stop(config: RunConfig, then: str) -> None:
    command = [sys.executable, "-c", HALF_LOADED, *WORDS, f"outputs={config.outputs}", then]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 75, done.stderr
    assert status(config)["state"] == "preempted"


def test_in_training_a_stop_waits_until_it_is_asked_for(own_signals: None) -> None:
    stop = StopRequest()
    stop.finish_steps()
    send(signal.SIGINT)
    with pytest.raises(Preempted, match="stopped by SIGINT"):
        stop.check()


@pytest.mark.parametrize(
    ("first", "second", "code"), [("TERM", "TERM", 143), ("INT", "TERM", 143), ("TERM", "INT", 130)]
)
def test_a_second_signal_leaves_at_once_and_says_so(config: RunConfig, first: str, second: str, code: int) -> None:
    def work() -> None:
        folder, stop = RunFolder(run_path(config)), StopRequest()
        stop.last_words = lambda sent: runner.job._last_words(folder, sent)
        folder.status("running")
        stop.finish_steps()
        send(signal.Signals[f"SIG{first}"])
        send(signal.Signals[f"SIG{second}"])

    assert in_child(work) == code
    assert (status(config)["state"], status(config)["exit_code"]) == ("interrupted", code)


def test_a_killed_run_does_not_count_as_running(config: RunConfig) -> None:
    def work() -> None:
        RunFolder(run_path(config)).status("running")
        send(signal.SIGKILL)

    assert in_child(work) == -signal.SIGKILL
    assert status(config)["state"] == "running", "it could not write any more"
    assert status_of(run_path(config))["state"] == "interrupted"


def test_a_run_that_works_counts_as_running(config: RunConfig) -> None:
    folder = RunFolder(run_path(config))
    folder.status("running")
    assert status_of(run_path(config))["state"] == "running"
    folder.close()
    assert status_of(run_path(config))["state"] == "interrupted"


@pytest.mark.parametrize("part", ["load", "evaluate"])
def test_a_stop_while_data_is_read_or_in_the_last_test_ends_with_75(
    config: RunConfig, own_signals: None, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    owner = {"load": "runner.run.load", "evaluate": "runner.job.evaluate"}[part]
    inner = {"load": runner.run.load, "evaluate": runner.job.evaluate}[part]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        send()
        return inner(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, interrupted)
        with pytest.raises(Preempted):
            runner.job.train(config)
    assert (status(config)["state"], status(config)["exit_code"]) == ("preempted", 75)
    assert not (run_path(config) / "summary.json").exists()
    runner.job.train(config)
    assert status(config)["state"] == "done"


def test_checkpoints_by_minutes(config: RunConfig, own_signals: None) -> None:
    """A tenth of a second is rounded up to the shortest pause; an hour leaves the one at the end."""
    words = [*WORDS, f"outputs={config.outputs}", "epochs=2"]
    folder = runner.job.train(config_from([*words, "trainer.checkpoint_every=60min"]))
    assert len(list(folder.glob("checkpoints/step-*.json"))) == 1


def test_how_exact_a_resume_would_be_is_said_at_the_start(
    tmp_path: Path, own_signals: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for word in WORDS if word != "trainer.progress=none"]
    config = config_from([*words, f"outputs={tmp_path}", "trainer.progress=plain", "trainer.checkpoint_every=1"])
    folder = runner.job.train(config)
    assert "exact resume: yes" in capsys.readouterr().out
    told = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps(told | {"state": "preempted"}))
    from test_checkpoint import rewritten

    for manifest in (folder / "checkpoints").glob("*.json"):
        environment = json.loads(manifest.read_text())["environment"]
        rewritten(manifest, environment=environment | {"torch": "1.0", "threads": 64})
    runner.job.train(config)
    said = capsys.readouterr().out
    assert "exact resume: no, because torch was 1.0, is " in said
    assert "threads was 64, is 1" in said
