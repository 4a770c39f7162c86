"""The figures of `bench conv`: speedup over one size of the convolution, measured beside computed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bokeh.models import ColumnDataSource, FixedTicker, HoverTool, NumeralTickFormatter, Range1d
from bokeh.plotting import figure

from runner.bench.page import Charts, style
from runner.pages.page import plain, text

if TYPE_CHECKING:
    from runner.bench.conv_contest import Row


@dataclass(frozen=True)
class Line:
    """One curve: its name, colour (of page.css), dash, and the column it shows; `only` chooses rows by out_channels."""

    label: str
    column: str
    colour: str
    dash: str = "solid"
    only: int | None = None


FIG4 = (
    Line("formula of the paper", "paper", "s7", "dashed"),
    Line("formula, this processor", "machine", "s7", "dotted"),
    Line("kernel", "kernel_speedup", "s1"),
    Line("with packing and alpha", "alpha_speedup", "s2"),
    Line("with alpha and K", "alpha_k_speedup", "s3"),
    Line("kernel, over the best float library", "kernel_over_best", "s4", "dashed"),
)
TICKS = {
    1,
    4,
    7,
    10,
    13,
    16,
    19,
    64,
    256,
    1024,
}  # of the places measured; more would run into each other on a telephone
DASHES = {"solid": "", "dashed": "6 3", "dotted": "2 3"}


def speedups(charts: Charts, name: str, title: str, rows: Sequence["Row"], x: str, facts: dict[str, Any]) -> str:
    """One chart of the rows measured for figure `name`; empty where there are none."""
    mine = [row for row in rows if row.figure == name]
    if not mine:
        return ""
    lines = FIG4 if name != "lenet5" else _by_outputs(mine)
    places = sorted({getattr(row, x) for row in mine})
    wide = places[-1] >= 64 * places[0]
    top = 1.06 * max(getattr(row, line.column) for line in lines for row in _rows_of(line, mine))
    plot = figure(
        x_range=Range1d(start=places[0] / 1.2, end=places[-1] * 1.2) if wide else Range1d(places[0] - 0.5, places[-1] + 0.5),
        y_range=Range1d(start=0, end=top), x_axis_type="log" if wide else "linear",
        sizing_mode="stretch_both", toolbar_location=None, tools="", min_border_right=14,
        background_fill_alpha=0, border_fill_alpha=0, outline_line_alpha=0,
    )  # fmt: skip
    for index, line in enumerate(lines):
        _draw(plot, line, _rows_of(line, mine), x, f"{name}:{index}")
    style(plot)
    plot.xaxis.ticker = FixedTicker(ticks=[place for place in places if place in TICKS or len(places) < 10])
    plot.xaxis.formatter = NumeralTickFormatter(format="0")
    plot.xaxis.axis_label = {"in_channels": "input channels", "kernel": "filter width"}[x]
    plot.ygrid.visible = True
    plot.xgrid.visible = False
    summary = f"{title}: " + "; ".join(
        f"{line.label} {plain(round(getattr(_rows_of(line, mine)[-1], line.column), 1))} at {places[-1]}"
        for line in lines
    )
    keys = "".join(_key(line, f"{name}:{index}") for index, line in enumerate(lines))
    chart = charts.add(name, title, summary, plot, size="even-part")
    return chart.replace("</figcaption>", f'<div class="keys">{keys}</div></figcaption>')


def _by_outputs(rows: Sequence["Row"]) -> tuple[Line, ...]:
    """A curve for each number of output channels, below the formula, which does not depend on it."""
    outputs = sorted({row.out_channels for row in rows})
    curves = (
        Line(f"{o} outputs", "alpha_speedup", f"s{i % 6 + 1}", ("solid", "dashed")[i % 2], o)
        for i, o in enumerate(outputs)
    )
    return Line("formula of the paper", "paper", "s7", "dotted", outputs[0]), *curves


def _rows_of(line: Line, rows: Sequence["Row"]) -> list["Row"]:
    return [row for row in rows if line.only in (None, row.out_channels)]


def _draw(plot: figure, line: Line, rows: Sequence["Row"], x: str, series: str) -> None:
    columns: dict[str, Any] = {"x": [getattr(r, x) for r in rows], "y": [getattr(r, line.column) for r in rows]}
    source = ColumnDataSource(columns)
    curve = plot.line("x", "y", source=source, line_width=2.2, line_dash=line.dash, muted_alpha=0.12)
    dots = plot.scatter("x", "y", source=source, size=5 if line.dash == "solid" else 0, muted_alpha=0.12)
    curve.tags = dots.tags = [line.colour, series]
    plot.add_tools(HoverTool(renderers=[curve], tooltips=[(line.label, "@y{0.0}"), ("at", "@x")]))


def _key(line: Line, series: str) -> str:
    """One entry of the legend: a real button, so that it can be reached and read without a mouse."""
    drawing = f'<path d="M0 6h36" stroke-width="2.2" stroke-dasharray="{DASHES[line.dash]}"/>'
    colour = f"var(--{line.colour})"
    return (
        f'<button type="button" aria-pressed="true" data-series="{series}">'
        f'<svg viewBox="0 0 36 12" aria-hidden="true" stroke="{colour}" fill="{colour}">{drawing}</svg>'
        f"{text(line.label)}</button>"
    )
