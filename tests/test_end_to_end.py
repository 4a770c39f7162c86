"""The commands of the README, as a stranger types them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from runner.checkpoint import Checkpoints, read_manifest

METRICS = (
    "epoch step phase lr batch_size input_size train_loss train_top1 val_loss val_top1 val_top5 best_val_top1".split()
)
METRICS += ["skipped_steps"]
FILES = {"config.yaml", "metrics.csv", "timing.csv", "layers.csv", "status.json", "summary.json", "dashboard.html"}


def runner(*words: str, folder: Path, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    command = [sys.executable, "-m", "runner", *words, f"outputs={folder}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)


def only_run(folder: Path) -> Path:
    (run,) = (folder / "runs").iterdir()
    return run


@pytest.fixture(scope="module")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("outputs")
    done = runner(folder=folder)
    assert done.returncode == 0, done.stderr
    return only_run(folder), done.stdout


def test_the_default_run_learns_the_digits_and_says_where_its_dashboard_lies(default_run: tuple[Path, str]) -> None:
    run, said = default_run
    summary = json.loads((run / "summary.json").read_text())
    assert summary["best_val_top1"] >= 95
    assert summary["test_top1"] >= 95
    assert said.rstrip().splitlines()[-1] == f"dashboard: {(run / 'dashboard.html').resolve()}"


def test_the_run_folder_explains_itself(default_run: tuple[Path, str]) -> None:
    run, said = default_run
    assert {path.name for path in run.iterdir()} >= FILES
    metrics = pd.read_csv(run / "metrics.csv")
    assert list(metrics.columns) == METRICS
    assert list(metrics.epoch) == list(range(len(metrics)))
    assert (metrics.best_val_top1 == metrics.val_top1.cummax()).all()
    layers = pd.read_csv(run / "layers.csv").set_index("layer")
    assert layers.becomes.to_dict() == {"conv1": "kept", "conv2": "BinaryConv2d", "fc1": "BinaryLinear", "fc2": "kept"}
    assert layers.macs.to_dict() == {
        "conv1": 24**2 * 25 * 20,
        "conv2": 8**2 * 25 * 20 * 50,
        "fc1": 800 * 500,
        "fc2": 5000,
    }
    assert "BinaryConv2d" in said
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert yaml.safe_load((run / "config.yaml").read_text())["quant"]["gradient"] == "exact"


def test_what_is_done_is_not_done_again(default_run: tuple[Path, str]) -> None:
    run, _ = default_run
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*") if path.is_file()}
    again = runner(folder=run.parent.parent)
    assert again.returncode == 0
    assert "done already" in again.stdout
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*") if path.is_file()}


def test_a_stored_model_is_evaluated_without_its_config(default_run: tuple[Path, str], tmp_path: Path) -> None:
    run, _ = default_run
    done = runner("mode=evaluate", f"checkpoint={run}", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert f"test: loss {summary['test_loss']:.4f}, top1 {summary['test_top1']:.2f} %" in done.stdout


def test_a_sweep_makes_a_folder_for_each_configuration(tmp_path: Path) -> None:
    words = ["-m", "model=lenet5", "quant=none,xnor", "seed=0,1", "trainer.epochs=1", "dataset.limit=64"]
    done = runner(*words, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = sorted(path.name.rsplit("-", 1)[0] for path in (tmp_path / "runs").iterdir())
    assert runs == ["lenet5-none-digits-s0", "lenet5-none-digits-s1", "lenet5-xnor-digits-s0", "lenet5-xnor-digits-s1"]
    assert all({p.name for p in run.iterdir()} >= FILES for run in (tmp_path / "runs").iterdir())


def test_float_weights_start_a_binary_network(tmp_path: Path) -> None:
    trial = ["dataset.limit=64", "epochs=1"]
    assert runner("quant=none", *trial, folder=tmp_path / "float").returncode == 0
    done = runner(f"pretrained={only_run(tmp_path / 'float')}", *trial, folder=tmp_path / "binary")
    assert done.returncode == 0, done.stderr
    assert "tensors loaded by name" in done.stdout
    assert "kept as initialised: conv2.norm.bias" in done.stdout


def test_a_binary_network_learns_from_a_float_teacher(tmp_path: Path) -> None:
    trial = ["dataset.limit=64", "epochs=1", "name=x"]
    assert runner("quant=none", *trial, folder=tmp_path / "float").returncode == 0
    teacher = only_run(tmp_path / "float")
    driven = (
        "regime.phases.0.quant={tau: {schedule: linear, from: 0.85, to: 0.99}}"  # which the teacher knows nothing of
    )
    ways = {"alone": [], "taught": [f"distill={teacher}", "quant.tau=0.85", driven], "mixed": ["trainer.mixup=0.5"]}
    for folder, words in ways.items():
        done = runner(*words, *trial, folder=tmp_path / folder)
        assert done.returncode == 0, done.stderr
    losses = {
        name: pd.read_csv(only_run(tmp_path / name) / "metrics.csv").train_loss[0]
        for name in ("alone", "taught", "mixed")
    }
    assert len(set(losses.values())) == 3
    (newest, *_) = Checkpoints(only_run(tmp_path / "taught") / "checkpoints").manifests()
    assert len(read_manifest(newest)["environment"]["teacher"]) == 64, "another teacher would be no exact resume"
    missing = runner(f"distill={tmp_path}/nothing", *trial, folder=tmp_path / "none")
    assert missing.returncode == 66
    assert "nothing: no such file" in missing.stderr


def test_a_teacher_must_say_what_network_it_is(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(2, 2)}, tmp_path / "bare.pt")
    done = runner(f"distill={tmp_path}/bare.pt", "dataset.limit=64", "epochs=1", folder=tmp_path)
    assert done.returncode == 65
    assert "give a run folder" in done.stderr


def test_a_deep_network_takes_two_steps_of_cifar(tmp_path: Path) -> None:
    words = ["model=resnet18", "quant=xnor", "dataset=synthetic", "dataset.size=32", "dataset.samples=64"]
    words += ["dataset.test_samples=16", "trainer.max_steps=2", "batch_size=8"]
    done = runner(*words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    layers = pd.read_csv(only_run(tmp_path) / "layers.csv")
    assert (layers[layers.becomes == "BinaryConv2d"].kind == "Conv2d").all()
    assert len(layers[layers.becomes == "BinaryConv2d"]) == 16
    assert set(layers[layers.layer.str.contains("shortcut")].becomes) == {"kept"}
