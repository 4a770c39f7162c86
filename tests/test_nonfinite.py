"""What happens at a loss or gradient that is not finite: where it began, and what each `trainer.on_nan` makes of it."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from runner.compose import config_from
from runner.faults import Diverged
from runner.job import train
from runner.nonfinite import PATIENCE, first_unsound
from runner.weights import read_weights

CONF = str(Path(__file__).parent / "torture" / "conf")
WORDS = "dataset=synthetic dataset.size=8 dataset.channels=1 dataset.samples=96 dataset.test_samples=16 batch_size=8".split()
WORDS += ["model=torture", "plugins=[tests.torture.tiny]", "quant=none", "regime=cosine", "lr=0.01"]
WORDS += ["trainer.progress=none", "trainer.dashboard=none", "trainer.threads=1", "trainer.checkpoint_every=1"]


@pytest.fixture
def run(tmp_path: Path, own_signals: None) -> Any:
    return lambda *words: train(config_from([*WORDS, f"outputs={tmp_path}", *words], [CONF]))


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float, gradient: float) -> Tensor:
        ctx.gradient = gradient
        return x * factor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.gradient, None, None


class Scale(nn.Module):
    """x * factor; its gradient may be another number altogether."""

    def __init__(self, factor: float, gradient: float) -> None:
        super().__init__()
        self.factor, self.gradient = factor, gradient

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Scale.apply(x, self.factor, self.gradient)
        return y


def three(factor: float = 1.0, gradient: float = 1.0) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), Scale(factor, gradient), nn.ReLU(inplace=True), nn.Linear(2, 2))


def place_of(model: nn.Module, images: Tensor | None = None) -> str:
    images = torch.ones(3, 2) if images is None else images
    return first_unsound(model, lambda: model(images).sum().backward())


def test_a_sound_batch_begins_nowhere() -> None:
    assert place_of(three()) == ""


def test_it_begins_where_the_first_layer_overflows() -> None:
    assert place_of(three(factor=float("inf"))) == "the output of layer 1 (Scale)"


def test_it_begins_in_the_weights() -> None:
    model = three()
    with torch.no_grad():
        model[3].bias[1] = torch.nan
    assert place_of(model) == "the weights 3.bias"


def test_it_begins_in_the_images() -> None:
    assert place_of(three(), torch.full((3, 2), torch.nan)) == "the input of layer 0 (Linear)"


def test_it_begins_in_a_gradient_although_all_outputs_are_finite() -> None:
    assert place_of(three(gradient=float("nan"))) == "the gradient that layer 0 (Linear) takes"


class Recomputed(nn.Module):
    """Computes its layers again in backward."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layers, x, use_reentrant=False)  # type: ignore[no-any-return]


def test_looking_keeps_nothing_that_recomputing_would_miss() -> None:
    model = nn.Sequential(Recomputed(three(factor=float("inf"))), nn.Linear(2, 2))
    assert place_of(model) == "the output of layer 0.layers.1 (Scale)"


def test_stop_names_the_layer_and_keeps_the_checkpoint_before(run: Any, tmp_path: Path) -> None:
    with pytest.raises(Diverged) as stopped:
        run("model.poison=0.3", "epochs=2")
    said = str(stopped.value)
    assert "begins in the output of layer 2 (Poison)" in said
    assert "Try a lower lr=" in said
    (folder,) = (tmp_path / "runs").iterdir()
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("diverged", 20)
    newest = max((int(p.stem.split("-")[1]) for p in folder.glob("checkpoints/step-*.json")), default=0)
    assert f"at step {newest} " in said
    assert (f"is kept: step-{newest}" in said) == (newest > 0)


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss stays finite: nothing but the gradient tells."""
    monkeypatch.setattr("runner.train.F.cross_entropy", _steep(nn.functional.cross_entropy))
    with pytest.raises(Diverged, match=r"the gradient is not finite at step 3 .*begins in the gradient of 11\.bias"):
        run("epochs=1")
    (folder,) = (tmp_path / "runs").iterdir()
    state = torch.load(folder / "checkpoints" / "step-3.pt", weights_only=True)
    assert all(bool(tensor.isfinite().all()) for tensor in state["model"].values())


def _steep(inner: Any) -> Any:
    """A loss whose gradient is NaN from its sixth call on: the first two are those that measure memory."""
    calls = iter(range(1000))

    def loss(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if logits.requires_grad and next(calls) >= 5:
            logits.register_hook(lambda grad: grad * torch.nan)
        return inner(logits, *args, **kwargs)

    return loss


def test_skip_leaves_the_batch_out_and_counts_it(run: Any) -> None:
    folder = run("model.poison=0.3", "epochs=3", "trainer.on_nan=skip")
    metrics = pd.read_csv(folder / "metrics.csv")
    assert 0 < metrics.skipped_steps.iloc[-1] < metrics.step.iloc[-1]
    assert metrics.skipped_steps.is_monotonic_increasing
    assert metrics.train_loss.notna().all()
    assert all(bool(tensor.isfinite().all()) for tensor in read_weights(folder).tensors.values())


def test_lower_lr_halves_it_for_each_step_left_out(run: Any) -> None:
    words = ["model.poison=0.2", "epochs=3", "regime.phases=[{epoch: 0, optimizer: SGD, lr: 0.01}]"]
    metrics = pd.read_csv(run(*words, "trainer.on_nan=lower_lr") / "metrics.csv")
    assert metrics.skipped_steps.iloc[-1] > 0
    before = metrics.skipped_steps.shift(fill_value=0)  # an epoch's row has the learning rate that it began with
    assert list(metrics.lr) == pytest.approx(0.01 * 0.5**before)


def test_where_every_batch_is_bad_skipping_ends(run: Any) -> None:
    with pytest.raises(Diverged, match=rf"at step {PATIENCE - 1} .*{PATIENCE - 1} steps before it were left out"):
        run("model.poison=1.0", "epochs=9", "trainer.on_nan=skip")


def test_what_is_done_about_nan_is_no_other_run_while_nothing_is_nan(run: Any) -> None:
    stop, skip = run("epochs=1"), run("epochs=1", "trainer.on_nan=skip")
    assert (stop / "metrics.csv").read_bytes() == (skip / "metrics.csv").read_bytes()
    stopped, skipped = (read_weights(folder).tensors for folder in (stop, skip))
    assert all(torch.equal(stopped[name], skipped[name]) for name in stopped.keys() | skipped.keys())
