"""The loop itself, in one process, on made images."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from runner.compose import config_from
from runner.faults import Diverged
from runner.job import train
from runner.optim import average_of, optimizer_for
from runner.train import batch_sums, drive_

SMALL = ["dataset=synthetic", "dataset.size=28", "dataset.channels=1", "dataset.samples=96", "dataset.test_samples=32"]
SMALL += ["batch_size=32"]
QUIET = ["trainer.progress=none", "trainer.dashboard=none", "trainer.threads=1"]


def run(folder: Path, *words: str) -> Path:
    return train(config_from([*SMALL, *QUIET, f"outputs={folder}", *words]))


def test_two_runs_of_one_config_are_the_same_to_the_last_bit(tmp_path: Path) -> None:
    first, second = (run(tmp_path / name, "epochs=2") for name in "ab")
    assert (first / "metrics.csv").read_bytes() == (second / "metrics.csv").read_bytes()
    assert (first / "quant.csv").read_bytes() == (second / "quant.csv").read_bytes()
    assert (first / "weights.safetensors").read_bytes() == (second / "weights.safetensors").read_bytes()


@pytest.mark.parametrize("decay", [0.9, 0.999, 0.9995, 0.9999])
def test_an_average_leaves_whole_numbers_whole(decay: float) -> None:
    """15 averaged with 15 is 14.9999 in float32, which is 14 as a whole number: a level less at every bit width."""
    model = nn.Linear(1, 1)
    model.register_buffer("levels", torch.tensor([1, 3, 7, 15, 31, 63, 127, 255]))
    average = average_of(model, decay)
    assert average is not None
    for _ in range(3):
        average.update_parameters(model)
    assert average.module.levels.tolist() == [1, 3, 7, 15, 31, 63, 127, 255]


def test_a_loss_that_is_no_number_stops_the_run_at_that_step(tmp_path: Path) -> None:
    words = ["quant=none", "model=vgg6", "dataset.size=16", "dataset.input_size=16"]
    with pytest.raises(Diverged, match=r"at step \d+ .*Try a lower lr="):
        run(tmp_path, *words, "regime=cosine", "lr=1e6", "epochs=3", "trainer.dashboard=write")
    (folder,) = (tmp_path / "runs").iterdir()
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("diverged", 20)
    assert not (folder / "summary.json").exists()
    assert "diverged" in (folder / "dashboard.html").read_text(encoding="utf-8")


def test_bytes_saved_for_backward_are_those_of_the_precision_that_trains(tmp_path: Path) -> None:
    words = ["quant=none", "epochs=1", "trainer.max_steps=1"]
    plain, half = (run(tmp_path / amp, *words, f"trainer.amp={amp}") for amp in ("none", "bf16"))
    kept, less = (json.loads((f / "summary.json").read_text())["saved_bytes_per_sample"] for f in (plain, half))
    assert less < 0.8 * kept


@pytest.mark.parametrize(("limit", "batch_size"), [(2, 2), (3, 2), (3, 3), (5, 2), (4, 4)])
def test_a_handful_of_images_is_enough_to_train_on(tmp_path: Path, limit: int, batch_size: int) -> None:
    """Also where the network normalises vectors, of which a batch of one has no variance."""
    found = run(tmp_path, "epochs=1", f"dataset.limit={limit}", f"batch_size={batch_size}")
    other = run(tmp_path / "more", "epochs=1", "trainer.max_steps=1")
    few, many = (json.loads((f / "summary.json").read_text())["saved_bytes_per_sample"] for f in (found, other))
    assert few == many


def test_an_average_of_the_weights_is_what_gets_evaluated(tmp_path: Path) -> None:
    plain, averaged = run(tmp_path / "a", "epochs=2"), run(tmp_path / "b", "epochs=2", "trainer.ema=0.99")
    a, b = (pd.read_csv(path / "metrics.csv") for path in (plain, averaged))
    assert list(a.train_loss) == list(b.train_loss)
    assert list(a.val_loss) != list(b.val_loss)


def test_max_steps_ends_a_run_within_an_epoch(tmp_path: Path) -> None:
    metrics = pd.read_csv(run(tmp_path, "trainer.max_steps=2", "epochs=5") / "metrics.csv")
    assert list(metrics.step) == [2]


def test_a_regime_may_change_the_optimizer_on_the_way(tmp_path: Path) -> None:
    phases = (
        "regime.phases=[{epoch: 0, optimizer: Adam, lr: 0.003}, {epoch: 1, optimizer: SGD, lr: 0.01, momentum: 0.9}]"
    )
    metrics = pd.read_csv(run(tmp_path, phases, "epochs=2") / "metrics.csv")
    assert list(metrics.phase) == [0, 1]
    assert list(metrics.lr) == [0.003, 0.01]


def test_a_phase_drives_the_buffer_of_its_name() -> None:
    from quant.base import find
    from quant.surgery import quantize_

    model = nn.Sequential(nn.Linear(4, 4))
    quantize_(model, find("xnor")(ste="ede"))
    drive_(model, {"quant.sharpness": 7.0, "lr": 0.1})
    assert float(model[0].sharpness) == 7.0


def test_weight_decay_leaves_alone_what_a_layer_keeps_from_it() -> None:
    from quant.base import find
    from quant.surgery import quantize_

    model = nn.Sequential(nn.Linear(4, 4))
    quantize_(model, find("lsq")())
    optimizer = optimizer_for(model, {"optimizer": "SGD", "lr": 0.1, "weight_decay": 0.5}, None)
    decay = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decay == {"decay": 0.5, "no_decay": 0.0}
    steps = [p for name, p in model.named_parameters() if "step" in name]
    kept = next(group["params"] for group in optimizer.param_groups if group["name"] == "no_decay")
    assert {id(p) for p in steps} == {id(p) for p in kept}


def test_the_optimizer_stays_and_follows_its_setting() -> None:
    model = nn.Linear(2, 2)
    first = optimizer_for(model, {"optimizer": "SGD", "lr": 0.1, "momentum": 0.9}, None)
    assert optimizer_for(model, {"optimizer": "SGD", "lr": 0.01, "momentum": 0.9}, first) is first
    assert first.param_groups[0]["lr"] == 0.01
    assert optimizer_for(model, {"optimizer": "Adam", "lr": 0.01}, first) is not first


def test_sums_of_a_batch() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    loss, top1, top5, count = batch_sums(logits, torch.tensor([0, 1])).tolist()
    assert (top1, top5, count) == (1, 2, 2)
    assert loss == pytest.approx(float(nn.functional.cross_entropy(logits, torch.tensor([0, 1]), reduction="sum")))
