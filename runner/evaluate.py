"""Figures of a stored model. Its config is stored with it; words on the command line change what they name."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from runner.build import build, phases_of
from runner.config import check
from runner.data import load
from runner.environment import environment, pick_device, prepare
from runner.faults import ConfigError, Fault
from runner.files import write_json
from runner.regime import data_setting_at
from runner.schema import RunConfig
from runner.screen import Screen
from runner.train import evaluate
from runner.weights import Weights, load_exactly, read_weights


def evaluate_stored(raw: Mapping[str, Any], said: Sequence[str]) -> dict[str, Any]:
    """Measure validation and test set; print the figures, save them beside the weights, and return them.

    `raw` is what the command line composes, `said` the keys that it names: these change the stored config.
    """
    weights = read_weights(Path(str(raw["checkpoint"])))
    config = check(_with_stored(raw, weights, said))
    screen, device = Screen(config.trainer.progress), pick_device(config.trainer.device)
    prepare(config.seed, config.trainer.threads, device)
    data = load(config.dataset, device=device)
    built = build(
        config.model_copy(update={"pretrained": None}),
        in_channels=data.in_channels,
        num_classes=len(data.classes),
        image_size=data.image_size,
    )
    load_exactly(built.model, weights)
    model = built.model.to(device)
    sizes = _sizes(config, model, data.image_size)
    val, test = evaluate(model, data.val, sizes), evaluate(model, data.test, sizes)
    figures = {
        "weights": str(weights.source),
        "dataset": config.dataset.name,
        **{f"val_{k}": v for k, v in vars(val).items()},
        **{f"test_{k}": v for k, v in vars(test).items()},
        "environment": environment(device),
    }
    target = (weights.source if weights.source.is_dir() else weights.source.parent) / "evaluation.json"
    screen.say(f"validation: loss {val.loss:.4f}, top1 {val.top1:.2f} %, top5 {val.top5:.2f} %")
    screen.say(f"test: loss {test.loss:.4f}, top1 {test.top1:.2f} %, top5 {test.top5:.2f} %")
    write_json(target, figures)
    screen.say(f"saved: {target.resolve()}")
    return figures


def _sizes(config: RunConfig, model: nn.Module, image_size: int) -> dict[str, int]:
    """Batch and input size of the last epoch: those of the run's own test, so that the figures agree to the last digit."""
    setting = data_setting_at(phases_of(config, model)[1], config.total_epochs - 1)
    return {
        "batch_size": setting["batch_size"],
        "input_size": setting["input_size"] or image_size,
    }


def _with_stored(raw: Mapping[str, Any], weights: Weights, said: Sequence[str]) -> dict[str, Any]:
    """The stored config, with what was said on the command line on top; the command line alone for a foreign file."""
    if not weights.config:
        return dict(raw)
    merged: dict[str, Any] = copy.deepcopy(weights.config)
    if merged.get("plugins") and "plugins" not in said:
        message = f"the stored model needs {merged['plugins']}; a plugin is code, so say plugins= to have it run"
        raise ConfigError([Fault("plugins", message)])
    for key in [*said, "mode", "checkpoint", "trainer.progress"]:
        try:
            _copy(raw, merged, key.split("."))
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                [Fault(key, "changes nothing of a stored model: its config has no such place")]
            ) from error
    return merged


def _copy(source: Any, target: Any, path: list[str]) -> None:
    """Copy what lies at `path`, or the smallest part around it that both have."""
    index: Any = int(path[0]) if isinstance(source, list) else path[0]
    below = source[index]
    if len(path) > 1 and isinstance(below, dict | list) and type(target[index]) is type(below):
        _copy(below, target[index], path[1:])
    else:
        target[index] = below
