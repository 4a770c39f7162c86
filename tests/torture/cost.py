"""What safety costs: seconds of a checkpoint, its share of a run that is left to itself, and of looking at every gradient."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import runner.job
from runner.compose import config_from
from runner.nonfinite import Sentry
from runner.run import Run
from runner.schema import RunConfig
from runner.train import gradients_of, update
from tests.torture.forks import run_once, tail
from tests.torture.scenarios import QUIET

WORDS = "model=resnet18 quant=none dataset=synthetic dataset.samples=400 dataset.test_samples=10 batch_size=64 epochs=1".split()
WORDS += ["regime.phases=[{epoch: 0, optimizer: SGD, lr: 0.1, momentum: 0.9}]", *QUIET]


def run(saves: int, _: int, root: Path) -> dict[str, Any]:
    """Measures, judges nothing: a save of ResNet-18 with SGD, its share of the time by default, the look for NaN in a step."""
    config = config_from([*WORDS, f"outputs={root}"])
    answer = root / "cost.txt"
    end = run_once(lambda: _measured(config, saves, answer), root / "child")
    if end.code:
        return {"saves": 0, "bad": [tail(root / "child")]}
    megabytes, seconds, share, look = map(float, answer.read_text().split())
    return {
        "saves": saves,
        "megabytes": round(megabytes, 1),
        "seconds_to_save": round(seconds, 2),
        "share_of_time": round(100 * share, 1),
        "share_of_step": round(100 * look, 2),
        "bad": [],
    }


def _measured(config: RunConfig, saves: int, answer: Path) -> int:
    """Trains as a run does, but until it has saved a few times instead of an epoch."""
    figures: list[float] = []

    def fit(run: Run) -> None:
        batches = iter(run.train_batches())
        images, labels = next(batches)
        assert run.optimizer is not None
        step = [_timed(lambda: _step(run, images, labels)) for _ in range(saves)]
        sentry, loss = Sentry(run), torch.zeros(())
        look = [_timed(lambda: (sentry.remember(), sentry.passes(loss))) for _ in range(saves)]
        taken = [_timed(run.save) for _ in range(saves)]
        size = max(path.stat().st_size for path in run.checkpoints.folder.glob("step-*.pt"))
        share = _share_of_saving(run, images, labels)
        figures.extend([size / 1e6, median(taken), share, median(look) / median(step)])

    runner.job.fit = fit
    runner.job._conclude = lambda *_: None
    runner.job.train(config)
    answer.write_text(" ".join(map(str, figures)))
    return 0


def _share_of_saving(run: Run, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Of the time from one checkpoint to the end of the next, where the run itself says when it is due."""
    began, spent, last = time.monotonic(), 0.0, run._saved_at
    while run._saved_at == last:
        _step(run, images, labels)
        spent += _timed(run.save_if_due)
    return spent / (time.monotonic() - began)


def _step(run: Run, images: torch.Tensor, labels: torch.Tensor) -> None:
    assert run.optimizer is not None
    gradients_of(run, run.optimizer, images, labels)
    update(run, run.optimizer)


def _timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began
