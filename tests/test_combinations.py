"""Settings that meet: what one promises must hold beside the other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from runner import run as run_module
from runner.cli import run
from runner.compose import config_from
from runner.faults import ConfigError, Diverged
from runner.job import train
from runner.optim import optimizer_for
from runner.weights import read_weights
from tests.made_data import write_images

QUIET = ["trainer.progress=none", "trainer.dashboard=none", "trainer.threads=1"]
SMALL = ["dataset.limit=64", "epochs=1", *QUIET]


@pytest.fixture
def trained(tmp_path: Path, own_signals: None) -> Any:
    """Trains on a few digits; a word later in the list counts."""

    def trained(*words: str) -> Path:
        return train(config_from([*SMALL, f"outputs={tmp_path}", *words]))

    return trained


class Teacher(nn.Module):
    """Answers nothing, sees images upside down, and keeps what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    @staticmethod
    def input_transform(images: Tensor) -> Tensor:
        return -images

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        return images.new_zeros(len(images), 10)


def test_a_teacher_sees_the_images_in_its_own_way(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, shown = Teacher(), []
    mixed = run_module.Run.mixed
    monkeypatch.setattr(run_module, "teacher_of", lambda *_, **__: teacher)
    monkeypatch.setattr(run_module.Run, "mixed", lambda *a: shown.append(mixed(*a)) or shown[-1])
    trained("trainer.max_steps=2", "trainer.mixup=0.2")
    assert len(teacher.seen) == len(shown) == 2
    assert all(torch.equal(seen, -images) for seen, (images, _) in zip(teacher.seen, shown, strict=True))


def test_a_teacher_must_take_every_size_of_the_schedule(trained: Any) -> None:
    teacher = trained("quant=none", "name=teacher")
    sizes = "data_regime.phases=[{epoch: 0, batch_size: 32, input_size: 28}, {epoch: 1, input_size: 16}]"
    pupil = ["model=resnet", "model.depth=20", "quant=none", "epochs=2", "name=pupil", sizes]
    with pytest.raises(ConfigError, match=r"distill: 16: the network cannot take images of 16 x 16"):
        trained(*pupil, f"distill={teacher}")


def test_a_run_that_ends_early_is_tested_as_it_was_trained(trained: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A data regime whose last phase never begins has no say in the test, nor in a later evaluation."""
    sizes = "data_regime.phases=[{epoch: 0, batch_size: 32, input_size: 16}, {epoch: 2, input_size: 28}]"
    net = ["model=resnet", "model.depth=20", "quant=none"]
    found = trained(*net, "epochs=3", sizes, "trainer.max_steps=2", "trainer.progress=plain")
    assert "phases of the data_regime at epoch 2 never begin" in " ".join(capsys.readouterr().out.split())
    plain = sizes.partition(", {epoch: 2")[0] + "]"
    short = trained(*net, "epochs=3", plain, "trainer.max_steps=2", "name=short")
    losses = [json.loads((folder / "summary.json").read_bytes())["test_loss"] for folder in (found, short)]
    assert losses[0] == losses[1]
    assert run(["evaluate", f"checkpoint={found}", "trainer.progress=none"]) == 0
    assert json.loads((found / "evaluation.json").read_bytes())["test_loss"] == losses[0]


def test_what_is_left_out_is_told_every_time(tmp_path: Path, trained: Any, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "photos", ["a", "b"], 12, (28, 28))
    (tmp_path / "photos/a/999.png").write_text("no image")
    words = ["dataset=folder", f"dataset.root={tmp_path / 'photos'}", "dataset.on_bad=skip", "batch_size=8"]
    for seed in range(2):  # the second one reads the stored copy
        found = trained(*words, f"seed={seed}", "trainer.progress=plain")
        assert "left out because they cannot be decoded: 1 of " in " ".join(capsys.readouterr().out.split())
        assert sum(json.loads((found / "status.json").read_bytes())["images_left_out"].values()) == 1
    assert (tmp_path / "cache").is_dir(), "beside the runs"


def test_steps_of_another_parameter_are_set_anew(trained: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """0.05 means another step to softplus."""
    for change in ("0.1", "null"):
        first = trained("quant=lsq", f"quant.step_change={change}", "name=first")
        capsys.readouterr()
        softplus = ["quant=lsq", "quant.step_param=softplus", "trainer.max_steps=1", "trainer.progress=plain"]
        trained(*softplus, f"pretrained={first}", f"name=other-{change}")
        assert "are those of the file" not in " ".join(capsys.readouterr().out.split())
        trained(
            "quant=lsq", "trainer.max_steps=1", "trainer.progress=plain", f"pretrained={first}", f"name=same-{change}"
        )
        assert "layers are those of the file" in " ".join(capsys.readouterr().out.split())


def test_a_teacher_may_have_been_regularized(trained: Any) -> None:
    margin = ["quant=lsq", "regularizer=rounding_margin"]
    scheduled = "+regime.phases.0.regularizer={schedule: linear, from: 0, to: 1}"
    teacher = trained(*margin, scheduled, "trainer.max_steps=2", "name=teacher")
    trained("quant=xnor", f"distill={teacher}", "trainer.max_steps=1", "name=pupil")


def test_pretrained_steps_stay_where_their_number_of_bits_does(trained: Any) -> None:
    first = trained("quant=lsq", "name=first")
    still = ["epochs=1", "lr=1e-20", f"pretrained={first}"]
    again = read_weights(trained("quant=lsq", "name=again", *still)).tensors
    fewer = read_weights(trained("quant=lsq", "quant.weight_bits=2", "name=fewer", *still)).tensors
    steps = {name: value for name, value in read_weights(first).tensors.items() if name.endswith("quantizer.step")}
    assert len(steps) > 4
    for name, step in steps.items():
        torch.testing.assert_close(again[name], step)
    assert not torch.equal(fewer["fc1.weight_quantizer.step"], steps["fc1.weight_quantizer.step"])


@pytest.mark.parametrize("words", [["trainer.recompute=blocks"], ["trainer.backward=bf16", "trainer.amp=bf16"]])
def test_what_only_training_knows_is_no_matter_of_export(trained: Any, words: list[str], tmp_path: Path) -> None:
    folder = trained("quant=xnor", *words)
    assert run(["export", f"checkpoint={folder}", "format=packed", "trainer.progress=none"]) == 0
    assert run(["evaluate", f"checkpoint={folder}", "trainer.progress=none"]) == 0


SWITCHES = [
    ("RMSprop", {"momentum": 0.9}),
    ("RMSprop", {"centered": True}),
    ("Adam", {"amsgrad": True}),
    ("AdamW", {"amsgrad": True}),
    ("SGD", {"momentum": 0.9}),
]


@pytest.mark.parametrize(("name", "switch"), SWITCHES)
def test_a_phase_may_switch_on_what_has_a_buffer_of_its_own(name: str, switch: dict[str, Any]) -> None:
    model = nn.Linear(3, 2)
    setting: dict[str, Any] = {"optimizer": name, "lr": 0.01}
    optimizer = None
    for said in (setting, setting | switch, setting | switch):
        optimizer = optimizer_for(model, said, optimizer)
        model.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_weights_that_are_lost_in_the_last_step_end_the_run_as_diverged(trained: Any) -> None:
    blows_up = "regime.phases=[{step: 0, optimizer: SGD, lr: 0.01}, {step: 1, lr: 1.0e+30}]"
    with pytest.raises(Diverged, match=r"not finite|the weights are lost"):
        trained("quant=none", "trainer.select=last", "trainer.max_steps=2", blows_up)


def test_half_precision_needs_a_gpu_also_where_the_device_is_found(trained: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        trained("trainer.amp=fp16")


def test_a_weight_of_no_regularizer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"regime.phases.0.regularizer: there is no regularizer"):
        config_from(["regime.phases.0.regularizer=1.0"])


def test_images_are_normalised_as_in_training_whatever_is_evaluated(
    trained: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, said = trained("quant=none"), []
    for words in ([], ["dataset.limit=32"], ["dataset.validation=test"]):
        assert run(["evaluate", f"checkpoint={folder}", "trainer.progress=plain", *words]) == 0
        said += [line for line in capsys.readouterr().out.splitlines() if line.startswith("test: loss")]
    assert len(said) == 3
    assert len(set(said)) == 1
