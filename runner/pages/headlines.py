"""The cards at the head of a run page: what the run reached and what it cost, each number with its unit."""

from collections.abc import Mapping

import pandas as pd

from runner.pages.page import NOTHING, amount, duration, number, plain, size, text
from runner.pages.records import Run, find_runs, read_config, read_summary
from runner.pages.settings import settings_of

MOST_NEIGHBOURS = 1_000
SAME = ("model", "dataset", "epochs", "seed")
GROUND = ("model.", "classifier.", "dataset.")  # settings of the network and of its data


def headlines(run: Run) -> str:
    """The numbers one looks for first; before the end, those that the CSV files already tell."""
    summary, metrics, timing = run.summary, run.metrics, run.timing
    best = _first(summary.get("best_val_top1"), metrics["val_top1"].max())
    last = _first(summary.get("final_val_top1"), _last(metrics["val_top1"]))
    best_epoch = _first(summary.get("best_epoch"), _epoch_of_best(metrics))
    seconds = _first(summary.get("train_seconds"), timing["seconds"].sum() if len(timing) else None)
    speed = _first(summary.get("images_per_s"), timing["images_per_s"].median())
    memory = _first(summary.get("peak_memory_bytes"), timing["peak_memory_bytes"].max())
    known = run.status | summary
    saved = _first(known.get("saved_bytes_per_sample"), timing["saved_bytes_per_sample"].max())
    top5 = number(summary.get("test_top5"))
    beside, name = float_beside(run)
    gap = _gap(summary.get("best_val_top1"), beside.get("best_val_top1"))
    test_gap = _gap(summary.get("test_top1"), beside.get("test_top1"), name)
    test_note = f"top-5 {_joined(_percent(top5))}, " if top5 is not None else ""
    cards = [
        (
            "Best validation accuracy",
            _percent(best),
            f"{gap}{_after(best_epoch)}; last {_joined(_percent(last))}",
        ),
        (
            "Test accuracy",
            _percent(number(summary.get("test_top1"))),
            f"{test_gap}{test_note}{_checkpoint(summary)}",
        ),
        ("Training time", duration(seconds), f"{_joined(duration(_per_epoch(run, seconds)))} an epoch"),
        ("Speed", amount(speed, "images/s"), "while training"),
        ("Peak memory", size(memory), "most in use at once"),
        ("Saved for backward", size(saved), "per sample"),
        _packed(known),
        _macs(known),
    ]
    items = "".join(_card(*card) for card in cards)
    return f'<dl class="headlines">{items}</dl>'


def float_beside(run: Run) -> tuple[dict[str, object], str]:
    """The summary and the folder of a float run beside a finished one, with the same network, data, epochs and seed.

    Of several, the one whose training differs in the fewest settings.
    """
    mine = run.summary
    if not mine or mine.get("quant") == "none":
        return {}, ""
    own, beside = settings_of(run.config, mine), []
    for folder in find_runs(run.folder.parent)[:MOST_NEIGHBOURS]:
        other = read_summary(folder)
        if other.get("quant") != "none" or any(other.get(key) != mine.get(key) for key in SAME):
            continue
        differing = _different(own, settings_of(read_config(folder), other))
        if not any(key.startswith(GROUND) for key in differing):
            beside.append((len(differing), folder.name, other))
    _, name, other = min(beside, key=lambda one: one[0], default=(0, "", {}))
    return other, name


def _different(a: Mapping[str, str], b: Mapping[str, str]) -> set[str]:
    return {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}


def _gap(mine: object, floats: object, *which: str) -> str:
    """How far an accuracy is from that of a float run, and which one that is."""
    reached, found = number(mine), number(floats)
    if reached is None or found is None:
        return ""
    points = f"{reached - found:+.2f}".replace("-", "\N{MINUS SIGN}")
    return f"{points} points to float ({', '.join((_joined(_percent(found)), *which))}); "


def _card(label: str, figure: tuple[str, str], note: str) -> str:
    value, unit = figure
    known = value != NOTHING
    units = f' <span class="unit">{text(unit)}</span>' if unit else ""
    return (
        f'<div><dt>{text(label)}</dt><dd class="figure">{text(value)}{units}</dd>'
        f'<dd class="note">{text(note if known else "not measured")}</dd></div>'
    )


def _packed(known: dict[str, object]) -> tuple[str, tuple[str, str], str]:
    packed, unpacked = number(known.get("packed_bytes")), number(known.get("float_bytes"))
    parameters = amount(known.get("parameters"))
    note = f"{_joined(parameters)} parameters" if parameters[0] != NOTHING else "on disk"
    if packed and unpacked and packed < unpacked:
        note = f"{unpacked / packed:.3g} times smaller than {_joined(size(unpacked))} in float; {note}"
    return "Packed size", size(packed), note


def _macs(known: dict[str, object]) -> tuple[str, tuple[str, str], str]:
    macs = known.get("macs")
    kinds = {str(kind): number(count) for kind, count in macs.items()} if isinstance(macs, dict) else {}
    counted = {kind: count for kind, count in kinds.items() if count}
    note = ", ".join(f"{_joined(amount(count))} {kind}" for kind, count in counted.items())
    return "MACs per image", amount(sum(counted.values()) if counted else None), note


def _first(*values: object) -> float | None:
    return next((found for found in map(number, values) if found is not None), None)


def _last(column: "pd.Series[float]") -> float | None:
    known = column.dropna()
    return float(known.iloc[-1]) if len(known) else None


def _epoch_of_best(metrics: pd.DataFrame) -> float | None:
    known = metrics.dropna(subset=["val_top1"]).sort_values("val_top1", ascending=False, kind="stable")
    return float(known["epoch"].iloc[0]) if len(known) else None


def _per_epoch(run: Run, seconds: float | None) -> float | None:
    epochs = number(run.summary.get("epochs")) or len(run.timing)
    return seconds / epochs if seconds is not None and epochs else None


def _checkpoint(summary: dict[str, object]) -> str:
    return f"{summary.get('test_checkpoint', 'last')} checkpoint"


def _percent(value: float | None) -> tuple[str, str]:
    return (NOTHING, "") if value is None else (f"{value:.2f}", "%")


def _joined(figure: tuple[str, str]) -> str:
    """A figure and its unit, which no line break parts."""
    return "\N{NO-BREAK SPACE}".join(filter(None, figure))


def _after(epoch: float | None) -> str:
    """Epochs count from 0 in the files, charts count those that are over."""
    return f"after epoch {plain(None if epoch is None else epoch + 1)}"
