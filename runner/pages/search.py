"""The page of a search: its trials as points, the best of them ringed or joined as a Pareto front, and all numbers as a table."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from bokeh.models import BasicTicker, ColumnDataSource, DataRange1d, HoverTool, NumeralTickFormatter
from bokeh.plotting import figure

from runner.pages.figures import Sheet, set_type
from runner.pages.page import Column, page, table, text, write_page

TITLES = {
    "best_val_top1": "best validation top-1, %",
    "weight_bits": "mean bits of a weight",
    "packed_bytes": "bytes of the packed network",
    "saved_bytes_per_sample": "bytes saved for backward, an image",
    "train_seconds": "training, s",
    "images_per_s": "images/s",
}
Row = dict[str, Any]


def write_search_page(folder: Path) -> Path:
    """Draw search.html from trials.csv and search.json."""
    facts = json.loads((folder / "search.json").read_bytes())
    rows = [_typed(row) for row in csv.DictReader(io.StringIO((folder / "trials.csv").read_text(encoding="utf-8")))]
    goals, dimensions = list(facts["objectives"]), list(facts["dimensions"])
    complete = [row for row in rows if row["state"] == "complete"]
    sheet = Sheet(axes={})
    charts = ""
    if complete and len(goals) > 1:
        charts = "".join(_front(sheet, complete, goals[0], cost) for cost in goals[1:])
    elif complete:
        charts = "".join(_slice(sheet, complete, goals[0], name) for name in ["trial", *dimensions])
    states = [str(row["state"]) for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
    columns = [
        Column(name, name, name not in ("state", "best", "run", "reason", *dimensions))
        for name in ["trial", "state", "best", *goals, *dimensions, "run", "reason"]
    ]
    body = (
        f"<header><h1>{text(facts['name'])}</h1><p>{len(rows)} trials: {text(counts)}</p></header><main>"
        f"<section>{charts}</section>{table(columns, rows, 'Trials', sortable=True, tall=True)}</main>"
    )
    return write_page(folder / "search.html", page(str(facts["name"]), body, sheet.embed()))


def _typed(row: dict[str, str]) -> Row:
    return {key: _number(value) for key, value in row.items()} | {"best": "best" if row["best"] == "True" else ""}


def _number(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value


def _front(sheet: Sheet, rows: list[Row], goal: str, cost: str) -> str:
    """Every trial at its cost; those that none beats are joined."""
    plot = _plot(TITLES[cost], TITLES[goal])
    front = sorted((row for row in rows if row["best"]), key=lambda row: float(row[cost]))
    line: dict[str, Any] = {"x": [row[cost] for row in front], "y": [row[goal] for row in front]}
    plot.step("x", "y", source=ColumnDataSource(line), mode="after", line_dash="dotted", line_width=1.5).tags = [
        "single"
    ]
    _points(plot, rows, cost, goal)
    summary = f"{len(rows)} trials, {len(front)} of them on the Pareto front; the numbers are in the table."
    return sheet.host(plot, f"front-{cost}", f"{TITLES[goal]} against {TITLES[cost]}", "major", summary, [])


def _slice(sheet: Sheet, rows: list[Row], goal: str, name: str) -> str:
    """What was reached with each value of one dimension."""
    shown = [row for row in rows if isinstance(row[name], float)]
    values = [float(row[name]) for row in shown]
    logarithmic = bool(values) and min(values) > 0 and max(values) / min(values) > 20 and name != "trial"
    plot = _plot(name, TITLES[goal], logarithmic)
    _points(plot, shown, name, goal)
    return sheet.host(plot, f"slice-{name}", name, "minor", f"{TITLES[goal]} of every trial against {name}.", [])


def _plot(x: str, y: str, logarithmic: bool = False) -> figure:
    plot = figure(
        x_range=DataRange1d(range_padding=0.1), y_range=DataRange1d(range_padding=0.1), tools="", toolbar_location=None,
        x_axis_type="log" if logarithmic else "auto", sizing_mode="stretch_both", background_fill_alpha=0,
        border_fill_alpha=0, outline_line_alpha=0, min_border_left=56, min_border_right=14,
    )  # fmt: skip
    plot.xaxis.axis_label, plot.yaxis.axis_label = x, y
    if not logarithmic:
        plot.xaxis.ticker = BasicTicker(desired_num_ticks=5)
        plot.xaxis.formatter = NumeralTickFormatter(format="0,0.[000]")
    set_type(plot)
    return plot


def _points(plot: figure, rows: list[Row], x: str, y: str) -> None:
    columns: dict[str, Any] = {
        "x": [row[x] for row in rows],
        "y": [row[y] for row in rows],
        "trial": [int(row["trial"]) for row in rows],
        "size": [13 if row["best"] else 7 for row in rows],
    }
    drawn = plot.scatter("x", "y", source=ColumnDataSource(columns), size="size", fill_alpha=0.5)
    drawn.tags = ["single"]
    tips = [("trial", "@trial"), (x, "@x{%.6g}"), (y, "@y{%.6g}")]
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=tips, formatters={"@x": "printf", "@y": "printf"}))
