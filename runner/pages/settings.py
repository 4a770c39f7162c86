"""Configs as flat keys, the way a command line names them."""

import json
from collections.abc import Mapping

MOST_KEYS = 2_000


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


def shown(value: object) -> str:
    """A config value as it stands in YAML."""
    return value if isinstance(value, str) and value else json.dumps(value, default=str)
