"""Runs that are stopped and taken up again, as real processes: they leave byte for byte what an uninterrupted run leaves."""

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from conftest import Runner, environment

from runner.checkpoint import Checkpoints, load
from runner.job import KNOWN_EARLY

# A clean process that has imported torch makes the others: they start at once, and can be killed for good.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["runner.job"])

SMALL = ["dataset=synthetic", "dataset.size=28", "dataset.channels=1", "dataset.samples=200", "dataset.test_samples=40",
         "dataset.augment.flip=true", "dataset.augment.crop=2",
         "batch_size=16", "epochs=4", "trainer.checkpoint_every=3"]  # fmt: skip
QUIET = ["trainer.progress=none", "trainer.dashboard=none", "trainer.threads=1"]
TINY = ["plugins=[made_dropout]", "model=made_dropout"]
ADAM = "{epoch: 0, optimizer: Adam, lr: 0.003, betas: [0.8, 0.9]}"
SWITCH = f"regime.phases=[{ADAM}, {{epoch: 1, optimizer: SGD, lr: 0.02, momentum: 0.9}}]"
WARMUP = "lr: {schedule: warmup, from: 0, to: 0.001}"
WITHIN = f"regime.phases=[{{step: 0, optimizer: RMSprop, {WARMUP}}}, {{step: 7, optimizer: AdamW}}]"
CASES = {
    "optimizer and average": ["quant=xnor", SWITCH, "trainer.ema=0.9", "dataset.augment.cutout=6"],
    "mixed images": ["quant=xnor", "trainer.mixup=0.4", "trainer.cutmix=1.0", "trainer.accumulate=2"],
    "dropout and step sizes": [*TINY, "quant=lsq", WITHIN, "trainer.accumulate=2", "trainer.label_smoothing=0.1"],
    "computed twice": [*TINY, "quant=xnor", SWITCH, "trainer.recompute=blocks"],
    "stochastic rounding": [*TINY, "quant=8bit-rangebn", "classifier=fixed", "trainer.grad_clip=1", "seed=3"],
}
KILLS = [(4, signal.SIGTERM, 75), (10, signal.SIGKILL, -signal.SIGKILL), (17, signal.SIGKILL, -signal.SIGKILL)]
DROPOUT = """
    from models.base import register
    from torch import nn

    @register("made_dropout")
    def made_dropout(*, in_channels: int, num_classes: int, image_size: int, rate: float = 0.5) -> nn.Module:
        side = image_size // 4
        return nn.Sequential(
            nn.Conv2d(in_channels, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(rate),
            nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(rate),
            nn.Linear(8 * side * side, 32), nn.ReLU(), nn.Linear(32, num_classes),
        )
"""


def work(words: list[str], path: str) -> None:
    """What a process does: a command line, in silence."""
    sys.path.insert(0, path)
    from runner.cli import run

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = run(words)
    sys.exit(code)


def started(words: list[str], path: Path) -> ForkServerProcess:
    folders = [f"--config-dir={path}/own"] if (path / "own").is_dir() else []
    process = PROCESSES.Process(target=work, args=([*words, *folders], str(path)))
    process.start()
    return process


def folder_of(outputs: Path) -> Path:
    (folder,) = (outputs / "runs").iterdir()
    return folder


def wait_for_step(outputs: Path, step: int, patience: float = 300) -> None:
    """Until a checkpoint of that step, or a later one, is committed."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        steps = [int(path.stem.split("-")[1]) for path in outputs.glob("runs/*/checkpoints/step-*.json")]
        if max(steps, default=0) >= step:
            return
        time.sleep(0.001)
    raise AssertionError(f"step {step} was not reached")


def equal(a: Any, b: Any) -> bool:
    """Whether two states are the same to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def same_run(a: Path, b: Path) -> None:
    for name in ("metrics.csv", "quant.csv", "layers.csv", "weights.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    states = [load(Checkpoints(folder / "checkpoints").manifests()[0]).state for folder in (a, b)]
    for state in states:
        del state["progress"]["seconds"]
    assert [key for key in states[0] if not equal(states[0][key], states[1][key])] == []
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (a, b)]
    for key in ("best_val_top1", "best_epoch", "test_loss", "test_top1", "steps", "epochs", "config_hash"):
        assert summaries[0][key] == summaries[1][key], key


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    (tmp_path / "made_dropout.py").write_text(dedent(DROPOUT))
    own = tmp_path / "own" / "model" / "made_dropout.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("name: made_dropout\nrate: 0.5\n")
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_is_stopped_and_killed_leaves_what_an_uninterrupted_one_leaves(case: str, plugin: Path) -> None:
    words = [*SMALL, *QUIET, *CASES[case]]
    whole, broken = [*words, f"outputs={plugin}/whole"], [*words, f"outputs={plugin}/broken"]
    first = started(whole, plugin)
    for step, number, code in KILLS:
        process = started(broken, plugin)
        wait_for_step(plugin / "broken", step)
        os.kill(process.pid or 0, number)
        process.join()
        assert process.exitcode == code, step
        assert not (folder_of(plugin / "broken") / "summary.json").exists()
    last = started(broken, plugin)
    last.join()
    first.join()
    assert (first.exitcode, last.exitcode) == (0, 0)
    same_run(folder_of(plugin / "whole"), folder_of(plugin / "broken"))


def fingerprint(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file, with its content and its time."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in files}


class CommandLine:
    """`python -m runner` of its own, that can be held, stopped and asked."""

    def __init__(self, words: list[str], cwd: Path) -> None:
        command = [sys.executable, "-m", "runner", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(
            command, cwd=cwd, env=environment(cwd), text=True, start_new_session=True, **pipes
        )

    def hold(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def release(self, *signals: signal.Signals) -> tuple[int, str]:
        """Deliver signals, let it go on, and wait: exit code, and what it said on stderr."""
        for number in signals:
            self.process.send_signal(number)
        self.process.send_signal(signal.SIGCONT)
        _, error = self.process.communicate(timeout=120)
        return self.process.returncode, error


def test_the_life_of_a_run_on_the_command_line(tmp_path: Path, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started, started twice, stopped, stopped twice at once, finished, started again: codes, status, and not a byte too many."""
    words = [*SMALL, "trainer.progress=plain", "trainer.threads=1"]
    out, whole = tmp_path / "outputs", started([*words, f"outputs={tmp_path}/whole"], tmp_path)
    first = CommandLine(words, tmp_path)
    wait_for_step(out, 4)
    first.hold()
    folder = folder_of(out)

    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    second = runner(*words)
    monkeypatch.delenv("PYTHONPROFILEIMPORTTIME")
    assert second.returncode == 73
    imports, said = (
        [line for line in second.stderr.splitlines() if line.startswith("import time:") is told]
        for told in (True, False)
    )
    assert any(line.endswith(" runner.folder") for line in imports)
    assert not any(line.endswith(" torch") for line in imports), "seconds of work"
    assert len(said) == 1
    assert f"another process works here: pid {first.process.pid} on " in said[0]

    code, error = first.release(signal.SIGTERM)
    assert code == 75
    assert error == "runner: stopped by SIGTERM; run the same command again to go on from here\n"
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["steps_total"]) == ("preempted", 75, 40)
    assert "SIGTERM" in status["reason"]
    told = {key: status[key] for key in KNOWN_EARLY}
    assert told["command"] == ["python", "-m", "runner", *words]
    assert told["environment"]["threads"] == 1
    newest = load(Checkpoints(folder / "checkpoints").manifests()[0])
    assert newest.state["progress"]["step"] >= 4

    again = CommandLine(words, tmp_path)
    wait_for_step(out, newest.manifest["step"] + 6)
    again.hold()
    assert again.release(signal.SIGINT, signal.SIGTERM)[0] in {130, 143}, "a second signal leaves at once"

    third = runner(*words)
    assert third.returncode == 0, third.stderr
    assert "exact resume: yes" in third.stdout
    assert third.stdout.splitlines()[-1] == f"dashboard: {folder / 'dashboard.html'}"
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    assert json.loads((folder / "summary.json").read_text()).items() >= told.items()

    untouched = fingerprint(folder)
    fourth = runner(*words)
    assert fourth.returncode == 0
    assert fingerprint(folder) == untouched

    whole.join()
    same_run(folder_of(tmp_path / "whole"), folder)


def test_a_checkpoint_of_another_config_or_of_other_data_is_refused(tmp_path: Path, own_signals: None) -> None:
    """The folder's name keeps configs apart; a folder that somebody renamed, or data that changed, is found out."""
    from runner.compose import config_from
    from runner.faults import BadData
    from runner.folder import run_path
    from runner.job import train

    words = [*SMALL, *QUIET, f"outputs={tmp_path}", "epochs=1"]
    folder = train(config_from(words))
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps(status | {"state": "preempted"}))
    other = config_from([*words, "seed=1"])
    folder.rename(run_path(other))
    with pytest.raises(BadData, match="another config"):
        train(other)
    run_path(other).rename(folder)
    (manifest,) = Checkpoints(folder / "checkpoints").manifests()[:1]
    from test_checkpoint import rewritten

    rewritten(manifest, data="of other images")
    with pytest.raises(BadData, match="the data set changed"):
        train(config_from(words))
