"""A stored model is measured as its run measured it; words change what they name; foreign and damaged files are refused."""

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
import yaml

from runner.cli import run
from runner.compose import config_from
from runner.config import flat
from runner.evaluate import _with_stored
from runner.faults import ConfigError
from runner.job import train
from runner.weights import Weights

SMALL = ["dataset=synthetic", "dataset.size=28", "dataset.channels=1", "dataset.samples=200", "dataset.test_samples=90",
         "dataset.noise=0.6", "batch_size=32"]  # fmt: skip
QUIET = ["trainer.progress=none", "trainer.dashboard=none", "trainer.threads=1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run whose last and best weights differ from one another, with an average and a data regime of two sizes."""
    import signal

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sizes = "data_regime.phases=[{epoch: 0, batch_size: 32}, {epoch: 1, batch_size: 20}]"
    words = [*SMALL, *QUIET, sizes, "epochs=3", "trainer.select=last", "trainer.ema=0.8", "seed=4"]
    yield train(config_from([*words, f"outputs={tmp_path_factory.mktemp('outputs')}"]))
    for number, handler in before.items():
        signal.signal(number, handler)


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())  # type: ignore[no-any-return]


def evaluated(*words: str) -> dict[str, Any]:
    """The figures that `runner evaluate` saves."""
    assert run(["evaluate", *words, "trainer.progress=none"]) == 0
    path = Path(next(word for word in words if word.startswith("checkpoint=")).removeprefix("checkpoint="))
    place = path if path.is_dir() else path.parent
    return json.loads((place / "evaluation.json").read_text())  # type: ignore[no-any-return]


def test_every_file_of_a_run_gives_the_figures_of_its_summary(finished: Path) -> None:
    said = summary(finished)
    (last,) = (path for path in (finished / "checkpoints").glob(f"step-{said['steps']}.json"))
    state = last.with_name(json.loads(last.read_text())["file"])  # a step that was saved twice has another name
    for path in (finished, finished / "weights.safetensors", last, state):
        found = evaluated(f"checkpoint={path}")
        assert {key: found[key] for key in ("test_top1", "test_top5", "test_loss")} == {
            key: said[key] for key in ("test_top1", "test_top5", "test_loss")
        }, path
        assert found["val_top1"] == said["final_val_top1"]


def test_the_best_weights_give_the_best_figure(finished: Path) -> None:
    (best,) = (finished / "checkpoints").glob("best-*.pt")
    assert evaluated(f"checkpoint={best}")["val_top1"] == summary(finished)["best_val_top1"]


def test_a_run_without_its_shared_weights_is_measured_from_its_checkpoints(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "weights.safetensors").unlink()
    assert run(["evaluate", f"checkpoint={copy}", "trainer.progress=none"]) == 0
    found = json.loads((copy / "checkpoints" / "evaluation.json").read_text())
    assert found["val_top1"] == summary(finished)["best_val_top1"]


def test_words_change_what_they_name_and_nothing_else(finished: Path) -> None:
    other = evaluated(f"checkpoint={finished}", "dataset.test_samples=40", "dataset.seed=1")
    assert other["test_top1"] % 2.5 == 0, "of 40 images"
    assert other["test_loss"] != summary(finished)["test_loss"]
    parts = evaluated(f"checkpoint={finished}", "batch_size=7")
    assert parts["test_top1"] == pytest.approx(summary(finished)["test_top1"], abs=1.2)
    whole = evaluated(
        f"checkpoint={finished}", "dataset=synthetic", "dataset.size=28", "dataset.channels=1", "mode=evaluate"
    )
    assert whole["test_top1"] != summary(finished)["test_top1"], "the whole section, with the defaults of its file"


def test_another_data_set_is_scaled_as_in_training(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As by a packed file of the same run: the mean and the deviation belong to the weights."""
    assert run(["export", f"checkpoint={finished}", "format=packed", "trainer.progress=none"]) == 0
    packed = finished / "model.packed.safetensors"
    words = ["dataset=synthetic", "dataset.size=28", "dataset.channels=1", "dataset.seed=3", "dataset.noise=0.9"]
    assert run(["evaluate", f"checkpoint={packed}", *words, "trainer.progress=none"]) == 0
    by_packed = json.loads(packed.with_name(f"{packed.name}.evaluation.json").read_text())
    by_run = evaluated(f"checkpoint={finished}", *words)
    assert by_run["test_loss"] == pytest.approx(by_packed["test_loss"], rel=1e-4)
    own = evaluated(f"checkpoint={finished}", *words, "dataset.mean=null", "dataset.std=null")
    assert own["test_loss"] != pytest.approx(by_run["test_loss"], rel=1e-4)
    assert run(["evaluate", f"checkpoint={finished}", "dataset=synthetic", "dataset.channels=3"]) == 65
    assert "made for 1 channels, which the images of synthetic do not have" in capsys.readouterr().err


def test_an_evaluation_knows_its_words_and_warns_of_images_that_were_trained_on(
    tmp_path: Path, own_signals: None, capsys: pytest.CaptureFixture[str]
) -> None:
    found = train(config_from([*QUIET, "epochs=1", "trainer.max_steps=2", f"outputs={tmp_path}"]))
    assert run(["export", f"checkpoint={found}", "format=packed"]) == 0
    packed = found / "model.packed.safetensors"
    for stored, saved in ((found, found / "evaluation.json"), (packed, found / f"{packed.name}.evaluation.json")):
        for words, warned in (
            (["batch_size=64"], ""),
            (["dataset=synthetic", "dataset.channels=1", "dataset.size=28", "dataset.split_seed=1"], ""),
            (["dataset.test_seed=1"], "warning: dataset.test_seed: not as in training; images"),
            (["dataset=digits", "dataset.test_fraction=0.5", "dataset.split_seed=1"],
             "warning: dataset.test_fraction, dataset.split_seed: not as in training; images"),
        ):  # fmt: skip
            assert run(["evaluate", f"checkpoint={stored}", *words]) == 0
            said = capsys.readouterr().out
            assert warned in said
            assert ("warning" in said) == bool(warned)
            assert json.loads(saved.read_text())["words"] == words


def test_what_only_training_needs_is_not_asked_for(finished: Path) -> None:
    """Fewer training images than a batch: the figures are of the test set, which is whole."""
    for limit in (10, 1):
        few = evaluated(f"checkpoint={finished}", f"dataset.limit={limit}", "dataset.drop_last=true")
        assert few["test_top1"] == summary(finished)["test_top1"]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["checkpoint={run}", "model=vgg_small"], 65, "belongs to another network"),
        (["checkpoint={run}", "quant=none"], 65, "belongs to another network"),
        (["checkpoint={run}", "dataset=mnist", "dataset.root=/nowhere"], 66, "dataset.root: mnist"),
        (["checkpoint={run}", "dataset.evil=1"], 78, "dataset.evil: unknown key"),
        (["checkpoint={run}", "evil=1"], 78, "evil"),
        (["checkpoint={run}", "quant.gradient=exat"], 78, "Did you mean 'exact'"),
        (["checkpoint={run}", "model=lenet"], 78, "Did you mean 'lenet5'"),
        (["checkpoint={run}", "model.a.b.c=1"], 78, "model.a"),
        (["checkpoint=/nowhere"], 66, "/nowhere: no such file or folder"),
        (["checkpoint={tmp}"], 66, "is it a run folder?"),
        (["checkpoint={run}/metrics.csv"], 65, "metrics.csv"),
        (["checkpoint={run}/config.yaml"], 65, "config.yaml"),
        (["checkpoint={tmp}/half.safetensors"], 65, "half.safetensors"),
        (["checkpoint={tmp}/flipped.safetensors"], 65, "checksum"),
        (["checkpoint={tmp}/foreign.pt"], 65, "belongs to another network"),
        ([], 78, "say which stored model: checkpoint=PATH"),
        (["checkpoint=5"], 78, "checkpoint: value should be a valid string"),
        (["checkpoint=null"], 78, "say which stored model: checkpoint=PATH"),
    ],
)
def test_what_cannot_be_measured(
    words: list[str], code: int, says: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (finished / "weights.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "flipped.safetensors").write_bytes(whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:])
    torch.save({"weight": torch.ones(3)}, tmp_path / "foreign.pt")
    lines = [word.format(run=finished, tmp=tmp_path) for word in words]
    assert run(["evaluate", *lines]) == code
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error


def test_a_stored_config_has_no_say_in_where_copies_are_kept_and_may_lack_what_came_later() -> None:
    raw = flat(config_from([]))
    stored = copy.deepcopy(raw)
    del stored["trainer"]["sync_norm"]
    stored["dataset"] |= {"cache": "/planted", "download": True, "val_fraction": 0.3}
    merged = _with_stored(raw, Weights({}, stored), [])
    assert merged["trainer"]["sync_norm"] is True
    assert (merged["dataset"]["cache"], merged["dataset"]["download"]) == (raw["dataset"].get("cache"), False)
    assert merged["dataset"]["val_fraction"] == 0.3


def test_mode_evaluate_means_the_same_however_it_is_said(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And it prints, although the run itself was told to be quiet."""
    for words in (["mode=evaluate"], ["++mode=evaluate"], ["mode='evaluate'"]):
        assert run([*words, f"checkpoint={finished}"]) == 0
        assert f"top1 {summary(finished)['test_top1']:.2f} %" in capsys.readouterr().out


def test_a_plugin_of_a_stored_model_runs_only_when_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_signals: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A weights file names modules to import: that is code, and somebody else's file must not choose it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "made_small.py").write_text(
        dedent("""
        from models.base import register
        from torch import nn

        @register("made_small")
        def made_small(*, in_channels: int, num_classes: int, image_size: int, hidden: int = 8) -> nn.Module:
            layers = nn.Linear(in_channels * image_size**2, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)
            return nn.Sequential(nn.Flatten(), *layers)
    """)
    )
    own = tmp_path / "own" / "model" / "made_small.yaml"
    own.parent.mkdir(parents=True)
    own.write_text(yaml.safe_dump({"name": "made_small", "hidden": 12}))
    words = [
        *SMALL,
        "epochs=1",
        "plugins=[made_small]",
        "model=made_small",
        "quant=none",
        f"outputs={tmp_path}/outputs",
    ]
    folder = train(config_from(words, [str(tmp_path / "own")]))
    assert run(["evaluate", f"checkpoint={folder}"]) == 78
    assert "a plugin is code, so say plugins= to have it run" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"distill: .*a plugin is code, so say plugins= to have it run"):
        train(config_from([*SMALL, *QUIET, "epochs=1", f"distill={folder}", f"outputs={tmp_path}/pupil"]))
    found = evaluated(f"checkpoint={folder}", "plugins=[made_small]")
    assert found["test_top1"] == summary(folder)["test_top1"]
