"""A run as one row of a comparison: what it reached, what it cost, how it was set, and its curves.

Rows are plain data for compare.js. Settings are told as differences from a base, the most common value of every key, so
that ten thousand runs with a hundred keys each stay small.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from runner.pages.page import number
from runner.pages.records import Run
from runner.pages.settings import settings_of

CURVES = ("val_top1", "train_top1", "val_loss", "train_loss", "lr")
MOST_CURVES = 2_000
ALL_POINTS, MOST_POINTS, FEWEST_POINTS = 40_000, 200, 20


@dataclass(frozen=True)
class Cost:
    """What a run cost: its name, the unit it is drawn in, and how much of the unit in the files that is."""

    title: str
    unit: str
    scale: float = 1.0


COSTS = {
    "weight_bits": Cost("Weight bits", "mean over parameters"),
    "packed_bytes": Cost("Packed size", "KiB", 1024.0),
    "bit_operations": Cost("Bit operations per image", "billions", 1e9),
    "float_macs": Cost("MACs per image left in float", "millions", 1e6),
    "saved_bytes": Cost("Saved for backward", "KiB per sample", 1024.0),
    "peak_memory": Cost("Peak memory", "MiB", 1024.0**2),
    "epoch_seconds": Cost("Time of an epoch", "s"),
}
Entry = dict[str, Any]
Costs = dict[str, float | None]
Column = npt.NDArray[np.float64]
NOTHING: Column = np.empty(0)


def identity(folder: Path) -> str:
    """What a link calls a run: no path can be made of it.

    >>> identity(Path("/runs/a")) == identity(Path("/runs/a")) != identity(Path("/runs/b"))
    True
    """
    return hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]


def base_of(settings: Iterable[dict[str, str]]) -> dict[str, str]:
    """The most common value of every key.

    >>> base_of([{"a": "1", "b": "2"}, {"a": "1", "b": "3"}, {"a": "4", "b": "3"}])
    {'a': '1', 'b': '3'}
    """
    counts: dict[str, Counter[str]] = {}
    for one in settings:
        for key, value in one.items():
            counts.setdefault(key, Counter())[value] += 1
    return {key: values.most_common(1)[0][0] for key, values in counts.items()}


def encoded(entry: Entry, base: dict[str, str]) -> str:
    """A row as compact JSON, of its settings only what is not as in the base; null for a key that the run does not have."""
    settings = entry["settings"]
    differing = {key: value for key, value in settings.items() if base.get(key) != value}
    differing |= {key: None for key in base if key not in settings}
    return json.dumps(entry | {"settings": differing}, separators=(",", ":"), allow_nan=False)


def brief_of(run: Run, link: str, base: dict[str, str]) -> Entry:
    """The row of a run of which only the summary was read: it stands alone until its settings are known."""
    entry = entry_of(run, link, 0)
    return entry | {"settings": base | entry["settings"]}


def entry_of(run: Run, link: str, points: int) -> Entry:
    """The row of a run with all of its settings; `points` is how many points a curve may have.

    Without a config nobody knows them all: such a run is told from every other by a setting `run`, its name.
    """
    metrics, summary = run.metrics, run.summary
    settings = settings_of(run.config, run.summary) | ({} if run.config else {"run": run.name})
    return {
        "id": identity(run.folder),
        "name": run.name,
        "link": link,
        "state": run.state if len(metrics) or run.state != "unknown" else "broken",
        "problems": run.problems if run.state in ("unknown", "done") else [],
        "reason": str(run.status.get("reason") or ""),
        "updated": str(run.status.get("updated") or ""),
        "seed": settings.get("seed", ""),
        "settings": settings,
        "epochs": number(_largest(metrics, "epoch") + 1) if len(metrics) else 0,
        "planned": number(run.status.get("epochs", summary.get("epochs"))),
        "reached": {
            "test": number(summary.get("test_top1")),
            "best": _rounded(_largest(metrics, "val_top1") if len(metrics) else summary.get("best_val_top1")),
            "last": _rounded(metrics["val_top1"].iloc[-1] if len(metrics) else summary.get("final_val_top1")),
        },
        "costs": _costs(run),
        "curve": _curve(run, points) if points else {},
    }


def points_for(runs: int) -> int:
    """How many points each curve of that many runs may have."""
    return max(FEWEST_POINTS, min(MOST_POINTS, ALL_POINTS // max(runs, 1)))


def _costs(run: Run) -> Costs:
    known, timing, layers = run.status | run.summary, run.timing, run.layers
    macs = known.get("macs")
    seconds = _column(timing, "seconds")
    return {
        "weight_bits": _rounded(_weight_bits(layers)),
        "packed_bytes": number(known.get("packed_bytes")),
        "bit_operations": _rounded(_bit_operations(layers)),
        "float_macs": number(macs.get("float")) if isinstance(macs, dict) else None,
        "saved_bytes": number(known.get("saved_bytes_per_sample", _largest(timing, "saved_bytes_per_sample"))),
        "peak_memory": number(known.get("peak_memory_bytes", _largest(timing, "peak_memory_bytes"))),
        "epoch_seconds": _rounded(np.median(seconds[~np.isnan(seconds)])) if np.isfinite(seconds).any() else None,
    }


# Below, columns are plain arrays: with ten thousand runs, what pandas does around a sum takes minutes.


def _column(table: pd.DataFrame, name: str) -> Column:
    return table[name].to_numpy(np.float64) if len(table) else NOTHING


def _columns(table: pd.DataFrame, *names: str) -> list[Column]:
    """Columns of a table, of the rows in which none of them is missing."""
    if not len(table):
        return [NOTHING] * len(names)
    columns = np.stack([_column(table, name) for name in names])
    return list(columns[:, ~np.isnan(columns).any(axis=0)])


def _largest(table: pd.DataFrame, name: str) -> float:
    """The largest number of a column; NaN where it has none."""
    values = _column(table, name)
    return float(np.nanmax(values)) if np.isfinite(values).any() else math.nan


def _weight_bits(layers: pd.DataFrame) -> float | None:
    """Bits a parameter, on average over the layers."""
    bits, parameters = _columns(layers, "weight_bits", "parameters")
    return float(bits @ parameters / parameters.sum()) if parameters.sum() else None


def _bit_operations(layers: pd.DataFrame) -> float | None:
    """MACs times weight bits times activation bits: what a product costs in hardware that is as wide as it has to be."""
    bits, act_bits, macs = _columns(layers, "weight_bits", "act_bits", "macs")
    return float((bits * act_bits * macs).sum()) if len(macs) else None


def _curve(run: Run, points: int) -> dict[str, list[float | None]]:
    """Every 2^k-th epoch and the last: runs of different lengths keep epochs in common."""
    known = ~np.isnan(_column(run.metrics, "epoch"))
    if not known.any():
        return {}
    rows = {name: _column(run.metrics, name)[known] for name in ("epoch", "step", *CURVES)}
    rows["time"] = _time_of(run.timing, rows["epoch"])
    places, count = np.arange(known.sum()), known.sum()
    stride = 2 ** max(0, math.ceil(math.log2(count / points)))
    kept = ((rows["epoch"] + 1) % stride == 0) | (places == 0) | (places == count - 1)
    rows["epoch"] = rows["epoch"] + 1  # a row speaks of the end of its epoch
    shown = {name: rows[name][kept] for name in ("epoch", "step", "time", *CURVES)}
    return {name: [_rounded(value) for value in column] for name, column in shown.items() if not np.isnan(column).all()}


def _time_of(timing: pd.DataFrame, epochs: Column) -> Column:
    """Seconds from the start of the run to the end of each epoch; of an epoch told twice, the last row counts."""
    trained, evaluated = (_column(timing, name) for name in ("seconds", "eval_seconds"))
    taken = dict(zip(_column(timing, "epoch"), trained + np.nan_to_num(evaluated), strict=True))
    seconds = np.array([taken.get(epoch, math.nan) for epoch in epochs])
    return np.where(np.isnan(seconds), math.nan, np.nancumsum(seconds))


def _rounded(value: object) -> float | None:
    """A finite number to six digits, which is more than a chart shows."""
    figure = number(value)
    return None if figure is None else float(f"{figure:.6g}")
