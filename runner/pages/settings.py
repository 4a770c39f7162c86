"""Configs as flat keys, the way a command line names them."""

import json
from collections.abc import Mapping
from functools import lru_cache

from runner.config import IRRELEVANT

MOST_KEYS = 2_000
CHOSEN = ("model", "quant", "dataset")
REMARKS = (".why", ".optional")  # of the rules of a quantizer
# Keys that cannot change a number of the result. `recompute` changes none either, but what a run costs: it is shown.
_KEYS = {
    ".".join(filter(None, [path.removesuffix(".arguments"), key])) for path, keys in IRRELEVANT.items() for key in keys
}
NO_SETTINGS = frozenset({"plugins", *_KEYS} - {"trainer.recompute"})


def flatten(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """A nested mapping as dotted keys, at most a page full of them.

    >>> flatten({"regime": {"phases": [{"epoch": 0, "lr": 0.1}]}, "seed": 1})
    {'regime.phases.0.epoch': 0, 'regime.phases.0.lr': 0.1, 'seed': 1}
    """
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if len(flat) >= MOST_KEYS:
            break
        if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, dict) and value:
            flat |= flatten({str(name): item for name, item in value.items()}, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def settings_of(config: Mapping[str, object], summary: Mapping[str, object]) -> dict[str, str]:
    """The settings that can change a number of the result, each as its YAML says it; without a config, what the summary knows."""
    flat = flatten(config) or _told_by(summary)
    if flat.get("dataset.name") == "folder":  # its place is all that tells it from another
        flat["dataset.name"] = f"folder {flat.get('dataset.root')}"
    return {key: shown(value) for key, value in flat.items() if key not in NO_SETTINGS and not key.endswith(REMARKS)}


def _told_by(summary: Mapping[str, object]) -> dict[str, object]:
    """The settings that a summary repeats."""
    names = {f"{group}.name": summary[group] for group in CHOSEN if group in summary}
    return names | ({"seed": summary["seed"]} if "seed" in summary else {})


def usual_settings(config: Mapping[str, object]) -> Mapping[str, object]:
    """The tree that conf/ makes of the model, quantizer and data set of a flat config: what differs, somebody has changed."""
    return _composed(*(str(config.get(f"{group}.name")) for group in CHOSEN))


@lru_cache(maxsize=64)
def _composed(*names: str) -> Mapping[str, object]:
    from runner.compose import choices_of, compose_words
    from runner.config import check, flat
    from runner.faults import ConfigError

    choices = choices_of()
    words = [f"{group}={name}" for group, name in zip(CHOSEN, names, strict=True) if name in choices[group]]
    composed = compose_words(words)
    raw = composed.raw
    asked = {**raw, "dataset": {**raw["dataset"], **({"download": True} if "download" in raw["dataset"] else {})}}
    try:  # what a check fills in stands in the config of a run, too; its data need not be here
        return flat(check(asked, skip=composed.wrong)) | flatten({"dataset": raw["dataset"]})
    except ConfigError:
        return raw | {"trainer": raw["trainer"] | {"epochs": raw["regime"]["epochs"]}}


def shown(value: object) -> str:
    """A config value as it stands in YAML."""
    return value if isinstance(value, str) and value else json.dumps(value, default=str)
