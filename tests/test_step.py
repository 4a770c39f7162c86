"""What a run does at each step, looked at from within: every promise of the config has a place where it is kept."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant.regularizer import Penalty
from quant.surgery import quantized_layers
from runner import job, run, train
from runner.accelerate import accelerate, cpp_compiler
from runner.checkpoint import Checkpoints, load
from runner.compose import config_from
from runner.faults import Preempted
from runner.objective import Objective
from runner.optim import average_of
from runner.regime import timeline
from runner.rows import Result
from runner.weights import read_weights

SMALL = ["dataset=synthetic", "dataset.size=28", "dataset.channels=1", "dataset.samples=96", "dataset.test_samples=32"]
SMALL += ["batch_size=32", "trainer.progress=none", "trainer.dashboard=none", "trainer.threads=1"]
SGD = "regime.phases=[{epoch: 0, optimizer: SGD, lr: 1.0}]"


@dataclass
class Seen:
    """A run, and what it held just before the gradients of each step."""

    run: Any = None
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)
    sharpness: list[float] = field(default_factory=list)

    def parameters(self, step: int) -> Tensor:
        """All that is learned, in a row: before that step, or at the end of the run (-1)."""
        state = self.run.model.state_dict() if step == -1 else self.weights[step]
        return torch.cat([state[name].flatten() for name, _ in self.run.model.named_parameters()])


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own_signals: None) -> Iterator[Callable[..., Seen]]:
    """Runs the words to their end and tells what was seen; at step `stop_at` the run is asked to stop."""
    threads, gradients_of = torch.get_num_threads(), train.gradients_of

    def watched(*words: str, stop_at: int | None = None) -> Seen:
        seen = Seen()

        def look(run: Any, optimizer: Any, images: Tensor, *rest: Any) -> Any:
            seen.run = run
            seen.weights.append({name: value.clone() for name, value in run.model.state_dict().items()})
            seen.images.append(images.clone())
            seen.rates.append(optimizer.param_groups[0]["lr"])
            seen.settings.append(dict(run.setting()))
            seen.sharpness += [float(b) for name, b in run.model.named_buffers() if name == "conv2.sharpness"]
            if len(seen.images) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            loss, right = gradients_of(run, optimizer, images, *rest)
            seen.losses.append(float(loss))
            return loss, right

        monkeypatch.setattr(train, "gradients_of", look)
        job.train(config_from([*SMALL, f"outputs={tmp_path}", *words]))
        return seen

    yield watched
    torch.set_num_threads(threads)


def test_a_seed_decides_the_first_weights_the_order_and_the_mixture(watch: Callable[..., Seen]) -> None:
    first, second = (watch(f"seed={seed}", "trainer.max_steps=1") for seed in (0, 1))
    assert not torch.equal(first.parameters(0), second.parameters(0))
    assert not torch.equal(first.images[0], second.images[0])
    first, second = (watch(f"seed={seed}", "trainer.max_steps=1", "trainer.mixup=0.2") for seed in (0, 1))
    batch = torch.arange(8.0).view(8, 1, 1, 1), torch.arange(8)
    mixtures = [seen.run.mixed(*batch)[0] for seen in (first, second, first)]
    assert torch.equal(mixtures[0], mixtures[2])
    assert not torch.equal(mixtures[0], mixtures[1])


def test_a_run_has_the_threads_that_it_asked_for(watch: Callable[..., Seen]) -> None:
    for threads in (2, 1):
        seen = watch(f"trainer.threads={threads}", "trainer.max_steps=1", f"name=threads-{threads}")
        assert torch.get_num_threads() == threads
        assert seen.run.environment["threads"] == threads


def test_a_stop_is_followed_by_a_checkpoint_of_that_step(watch: Callable[..., Seen], tmp_path: Path) -> None:
    with pytest.raises(Preempted, match="SIGTERM"):
        watch("trainer.checkpoint_every=1000", stop_at=2)
    (folder,) = (tmp_path / "runs").iterdir()
    newest = load(Checkpoints(folder / "checkpoints").manifests()[0])
    assert newest.manifest["step"] == newest.state["progress"]["step"] == 2


def test_without_an_interval_a_checkpoint_is_taken_as_often_as_it_is_cheap(
    watch: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    monkeypatch.setattr(run.Run, "save", lambda self: saved.append(self.progress.step))
    watch("epochs=2", "name=rare")
    assert saved == [6], "within a second nothing is due but the end"
    monkeypatch.setattr(run, "SHORTEST_PAUSE", 0.0)
    saved.clear()
    watch("epochs=2", "name=often")
    assert saved == [1, 2, 3, 4, 5, 6, 6]


def test_a_schedule_goes_on_within_an_epoch(watch: Callable[..., Seen]) -> None:
    seen = watch("epochs=1")
    assert len(set(seen.rates)) == 3
    assert seen.rates == [setting["lr"] for setting in seen.settings]


def test_a_schedule_of_the_quantizer_reaches_its_layers_at_every_step(watch: Callable[..., Seen]) -> None:
    seen = watch("quant.ste=reste", "+regime.phases.0.quant.sharpness={schedule: linear, from: 1, to: 3}", "epochs=2")
    driven = seen.sharpness
    assert driven == pytest.approx([setting["quant.sharpness"] for setting in seen.settings])
    assert driven == pytest.approx([1 + 2 * step / 6 for step in range(6)])


def test_a_regularizer_is_part_of_the_loss(watch: Callable[..., Seen]) -> None:
    plain, kept_away = (
        watch("quant=lsq", "trainer.max_steps=1", *words) for words in ([], ["regularizer=rounding_margin"])
    )
    assert torch.equal(plain.images[0], kept_away.images[0])
    assert kept_away.losses[0] > plain.losses[0] + 1e-3


def test_gradients_are_clipped_to_the_norm_that_was_asked_for(watch: Callable[..., Seen]) -> None:
    seen = watch("quant=none", SGD, "trainer.grad_clip=0.01", "trainer.max_steps=1")
    moved = seen.parameters(-1) - seen.parameters(0)
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)


def test_what_a_quantizer_keeps_of_its_weights_is_kept_after_every_step(watch: Callable[..., Seen]) -> None:
    seen = watch(SGD, "lr=30", "quant.centre=none", "trainer.max_steps=2", "name=clamped")
    weights = [layer.weight for layer in quantized_layers(seen.run.model).values()]
    assert max(float(weight.detach().abs().max()) for weight in weights) == 1.0
    seen = watch(SGD, "quant.clamp=false", "trainer.max_steps=2", "name=centred")
    assert float(seen.run.model.conv2.weight.detach().mean(1).abs().max()) < 1e-6


def test_parts_of_a_batch_give_the_loss_and_the_gradients_of_the_whole() -> None:
    """Seven images in three parts are of two sizes."""
    torch.manual_seed(0)
    model, images, labels = nn.Linear(5, 3).double(), torch.randn(7, 5).double(), torch.randint(0, 3, (7,))
    found = []
    for parts in (1, 3):
        config = config_from([*SMALL, f"trainer.accumulate={parts}", "trainer.label_smoothing=0.1"])
        trainee: Any = SimpleNamespace(
            config=config, device=torch.device("cpu"), model=model, forward=model, penalty=Penalty(), ema=None,
            objective=Objective(config.trainer), scaler=torch.amp.GradScaler("cpu", enabled=False),
        )  # fmt: skip
        loss, right = train.gradients_of(trainee, torch.optim.SGD(model.parameters(), 0.1), images, labels)
        found.append([loss.clone(), right.clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == 4
    for whole, part in zip(*found, strict=True):
        assert torch.allclose(whole, part, rtol=1e-6, atol=1e-9)


def test_a_teacher_never_trains(watch: Callable[..., Seen], tmp_path: Path) -> None:
    watch("trainer.max_steps=3", "name=teacher")
    (folder,) = (tmp_path / "runs").iterdir()
    taught = watch(f"distill={folder}", "trainer.max_steps=2", "name=pupil")
    teacher = taught.run.teacher
    assert not any(module.training for module in teacher.modules())
    stored = read_weights(folder).tensors
    assert all(torch.equal(value, stored[name]) for name, value in teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_phases_behind_the_last_step_are_told(watch: Callable[..., Seen], capsys: pytest.CaptureFixture[str]) -> None:
    phases = "regime.phases=[{epoch: 0, optimizer: SGD, lr: 0.1}, {epoch: 2, lr: 0.01}]"
    seen = watch(phases, "epochs=4", "trainer.max_steps=5", "trainer.progress=plain")  # three steps an epoch
    assert seen.run.epochs_begun == 2
    assert "the run ends at epoch 2; phases of the regime at epoch 2 never begin" in capsys.readouterr().out
    assert [row["step"] for row in timeline(seen.run.config, 96 - 9)] == [0, 3]


def test_a_teacher_is_as_fast_as_its_pupil(watch: Callable[..., Seen], tmp_path: Path) -> None:
    watch("trainer.max_steps=1", "name=teacher")
    (folder,) = (tmp_path / "runs").iterdir()
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runner.run.accelerate", lambda model, *rest: asked.append(model) or accelerate(model, *rest))
        taught = watch(f"distill={folder}", "trainer.max_steps=1", "trainer.amp=bf16", "name=pupil")
    assert any(model is taught.run.teacher for model in asked)


def test_the_weights_of_the_best_epoch_are_tested_and_kept(
    watch: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of three epochs is said to be the best."""
    said, ends, tested = iter((50.0, 90.0, 70.0)), [], []

    def validate(model: nn.Module, *_: Any) -> Result:
        ends.append({name: value.clone() for name, value in model.state_dict().items()})
        return Result(1.0, next(said), 100.0)

    def test(model: nn.Module, *_: Any) -> Result:
        tested.append({name: value.clone() for name, value in model.state_dict().items()})
        return Result(1.0, 80.0, 100.0)

    monkeypatch.setattr(train, "evaluate", validate)
    monkeypatch.setattr(job, "evaluate", test)
    watch("epochs=3")
    assert not torch.equal(ends[1]["fc2.weight"], ends[2]["fc2.weight"])
    assert all(torch.equal(tested[0][name], value) for name, value in ends[1].items())


def test_an_average_of_the_weights_is_the_one_of_its_formula() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    average = average_of(model, 0.9)
    assert average is not None
    average.update_parameters(model)  # the first takes the weights as they are
    for value in (2.0, 4.0):
        nn.init.constant_(model.weight, value)
        average.update_parameters(model)
    assert float(average.module.weight.detach()) == pytest.approx(0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 4)


def test_another_layout_trains_the_same_network(watch: Callable[..., Seen]) -> None:
    words = ["quant=none", "trainer.max_steps=1"]
    plain, last = watch(*words), watch(*words, "trainer.channels_last=true")
    assert last.run.model.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert last.losses == pytest.approx(plain.losses, rel=1e-4)


@pytest.mark.skipif(cpp_compiler() is None, reason="needs a C++ compiler")
def test_a_compiled_network_answers_as_the_plain_one() -> None:
    config = config_from([*SMALL, "trainer.compile=true"]).trainer
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    assert torch.allclose(accelerate(model, config, torch.device("cpu"))(x), model(x), atol=1e-6)
