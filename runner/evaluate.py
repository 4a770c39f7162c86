"""Figures of a stored model. Its config is stored with it; words on the command line change what they name."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.build import build
from runner.compose import compose_words, keys_of
from runner.config import check
from runner.data import load
from runner.environment import environment, pick_device, prepare
from runner.faults import ConfigError
from runner.files import write_json
from runner.screen import Screen
from runner.train import evaluate
from runner.weights import Weights, load_exactly, read_weights


def evaluate_stored(words: Sequence[str], config_dirs: Sequence[str] = ()) -> dict[str, Any]:
    """Measure validation and test set; print the figures, save them beside the weights, and return them."""
    composition = compose_words(words, config_dirs)
    given = composition.raw.get("checkpoint")
    if composition.faults or not given:
        check(composition.raw, skip=composition.wrong_sections)
        raise ConfigError(composition.faults)
    weights = read_weights(Path(str(given)))
    config = check(_with_stored(composition.raw, weights, keys_of(words)))
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
    sizes = {"batch_size": 256, "input_size": data.image_size}
    val, test = evaluate(model, data.val, sizes), evaluate(model, data.test, sizes)
    figures = {
        "weights": str(weights.source),
        "dataset": config.dataset.name,
        **{f"val_{k}": v for k, v in vars(val).items()},
        **{f"test_{k}": v for k, v in vars(test).items()},
        "environment": environment(device),
    }
    target = (weights.source if weights.source.is_dir() else weights.source.parent) / "evaluation.json"
    write_json(target, figures)
    screen.say(f"validation: loss {val.loss:.4f}, top1 {val.top1:.2f} %, top5 {val.top5:.2f} %")
    screen.say(f"test: loss {test.loss:.4f}, top1 {test.top1:.2f} %, top5 {test.top5:.2f} %")
    screen.say(f"saved: {target.resolve()}")
    return figures


def _with_stored(raw: Mapping[str, Any], weights: Weights, said: Sequence[str]) -> dict[str, Any]:
    """The stored config, with what was said on the command line on top; the command line alone for a foreign file."""
    if not weights.config:
        return dict(raw)
    merged: dict[str, Any] = dict(weights.config)
    for key in [*said, "mode", "checkpoint"]:
        _copy(raw, merged, key.split("."))
    return merged


def _copy(source: Any, target: Any, path: list[str]) -> None:
    head, rest = path[0], path[1:]
    index: Any = int(head) if isinstance(source, list) else head
    if rest and isinstance(target, dict | list):
        _copy(source[index], target[index], rest)
    else:
        target[index] = source[index]
