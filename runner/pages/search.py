"""The page of a search: its trials as points, the best of them ringed or joined as a Pareto front, and all numbers as a table."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bokeh.models import BasicTicker, ColumnDataSource, DataRange1d, FixedTicker, HoverTool
from bokeh.plotting import figure

from runner.pages.figures import Sheet, amounts, set_type
from runner.pages.page import Column, page, table, text, write_page
from runner.pages.scales import round_powers

TITLES = {
    "best_val_top1": ("Best validation top-1", "%", 1.0),
    "weight_bits": ("Bits of a weight", "mean over parameters", 1.0),
    "packed_bytes": ("Packed size", "KiB", 1024.0),
    "saved_bytes_per_sample": ("Saved for backward", "KiB per image", 1024.0),
    "train_seconds": ("Training time", "s", 1.0),
    "images_per_s": ("Speed", "images/s", 1.0),
}  # name, unit, and how much of the unit in the file that is
FORMS = {
    "best_val_top1": ".2f",
    "weight_bits": ".3f",
    "packed_bytes": ",.1f",
    "saved_bytes_per_sample": ",.1f",
    "train_seconds": ",.1f",
}
BEST = {True: "Large points: trials that none beats at the same or a lower cost; the dotted line joins them.",
        False: "The large point is the best trial."}  # fmt: skip
Row = dict[str, Any]


def write_search_page(folder: Path) -> Path:
    """Draw search.html from trials.csv and search.json."""
    facts = json.loads((folder / "search.json").read_bytes())
    rows = [_typed(row) for row in csv.DictReader(io.StringIO((folder / "trials.csv").read_text(encoding="utf-8")))]
    goals, dimensions = list(facts["objectives"]), list(facts["dimensions"])
    complete = [row for row in rows if row["state"] == "complete"]
    sheet = Sheet(axes={})
    charts = _charts(sheet, complete, goals, dimensions) if complete else ""
    words = [name for name in dimensions if any(isinstance(row[name], str) and row[name] for row in rows)]
    states = [str(row["state"]) for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
    reasons = ["reason"] if any(row["reason"] for row in rows) else []
    columns = [
        Column(
            name,
            _heading(name),
            name not in ("state", "best", "run", "reason", *words),
            name == "reason",
            FORMS.get(name, ""),
        )
        for name in ["trial", "state", "best", *goals, *dimensions, "run", *reasons]
    ]
    shown = [row | {goal: _scaled(row, goal) for goal in goals} for row in rows]
    numbers = table(columns, shown, "All trials; a click on a heading sorts", sortable=True, tall=True)
    body = (
        f"<header><h1>{text(facts['name'])}</h1><p>{len(rows)} trials: {text(counts)}</p></header><main>"
        f"{charts}<h2>Trials</h2><div class='trials'>{numbers}</div></main>"
    )
    return write_page(folder / "search.html", page(str(facts["name"]), body, sheet.embed()))


def _charts(sheet: Sheet, rows: list[Row], goals: list[str], dimensions: list[str]) -> str:
    """With several goals their Pareto fronts, with one what it was at every value of every dimension."""
    if len(goals) > 1:
        charts = "".join(_front(sheet, rows, goals[0], cost) for cost in goals[1:])
    else:
        drawn = [name for name in ("trial", *dimensions) if any(isinstance(row[name], float) for row in rows)]
        charts = "".join(_slice(sheet, rows, goals[0], name, str(index)) for index, name in enumerate(drawn))
    return f'<p class="small quiet">{BEST[len(goals) > 1]}</p><div class="even">{charts}</div>'


def _heading(name: str, in_text: bool = False) -> str:
    title, unit, _ = TITLES.get(name, (name, "", 1.0))
    title = title.lower() if in_text else title
    return f"{title} ({unit})" if unit else title


def _scaled(row: Row, name: str) -> Any:
    """A figure in the unit of its heading; whatever else stands there as it is."""
    return row[name] / TITLES[name][2] if isinstance(row[name], float) and name in TITLES else row[name]


def _typed(row: dict[str, str]) -> Row:
    return {key: _number(value) for key, value in row.items()} | {"best": "best" if row["best"] == "True" else ""}


def _number(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value


def _front(sheet: Sheet, rows: list[Row], goal: str, cost: str) -> str:
    """Every trial at its cost; those that none beats are joined."""
    plot = _plot(_heading(cost), _heading(goal))
    front = sorted((row for row in rows if row["best"]), key=lambda row: float(row[cost]))
    line: dict[str, Any] = {"x": [_scaled(row, cost) for row in front], "y": [row[goal] for row in front]}
    step = plot.step("x", "y", source=ColumnDataSource(line), mode="after", line_dash="dotted", line_width=1.5)
    step.tags = ["quiet"]
    _points(plot, rows, cost, goal)
    summary = f"{len(rows)} trials, {len(front)} of them on the Pareto front; the numbers are in the table."
    return sheet.host(
        plot, f"front-{cost}", f"{_heading(goal)} against {_heading(cost, in_text=True)}", "major", summary
    )


def _slice(sheet: Sheet, rows: list[Row], goal: str, name: str, key: str) -> str:
    """What was reached with each value of one dimension."""
    shown = [row for row in rows if isinstance(row[name], float)]
    values = [float(row[name]) for row in shown]
    logarithmic = bool(values) and min(values) > 0 and max(values) / min(values) > 20 and name != "trial"
    plot = _plot(name, _heading(goal), round_powers(values, most=5) if logarithmic else None)
    _points(plot, shown, name, goal)
    return sheet.host(plot, f"slice-{key}", name, "minor", f"{_heading(goal)} of every trial against {name}.")


def _plot(x: str, y: str, ticks: Sequence[float] | None = None) -> figure:
    """An empty figure; `ticks`: what stands along its x axis where that is logarithmic."""
    plot = figure(
        x_range=DataRange1d(range_padding=0.1), y_range=DataRange1d(range_padding=0.2), tools="", toolbar_location=None,
        x_axis_type="log" if ticks else "auto", sizing_mode="stretch_both", background_fill_alpha=0,
        border_fill_alpha=0, outline_line_alpha=0, min_border_left=56, min_border_right=14,
    )  # fmt: skip
    plot.xaxis.axis_label, plot.yaxis.axis_label = x, y
    plot.xaxis.ticker = FixedTicker(ticks=ticks) if ticks else BasicTicker(desired_num_ticks=5)
    plot.xaxis.formatter = amounts()
    set_type(plot)
    return plot


def _points(plot: figure, rows: list[Row], x: str, y: str) -> None:
    columns: dict[str, Any] = {
        "x": [_scaled(row, x) for row in rows],
        "y": [row[y] for row in rows],
        "trial": [int(row["trial"]) for row in rows],
        "size": [13 if row["best"] else 7 for row in rows],
    }
    drawn = plot.scatter("x", "y", source=ColumnDataSource(columns), size="size", fill_alpha=0.5)
    drawn.tags = ["val"]
    tips = [("trial", "@trial"), (_heading(x), "@x{%.6g}"), (_heading(y), "@y{%.6g}")]
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=tips, formatters={"@x": "printf", "@y": "printf"}))
