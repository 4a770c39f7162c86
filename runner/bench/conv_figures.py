"""The figures of `bench conv`: speedup over one size of the convolution, measured beside computed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bokeh.models import ColumnDataSource, FixedTicker, HoverTool, NumeralTickFormatter, Range1d
from bokeh.plotting import figure

from runner.bench.page import Charts, style
from runner.pages.charts import Series, legend_key
from runner.pages.page import plain

if TYPE_CHECKING:
    from runner.bench.conv_contest import Row


@dataclass(frozen=True)
class Line(Series):
    """One curve; `only` chooses rows by out_channels. What is computed has no markers."""

    only: int | None = None


FIG4 = (
    Line("paper", "formula of the paper", "s7", "dashed", ""),
    Line("machine", "formula, this processor", "s7", "dotted", ""),
    Line("kernel_speedup", "kernel", "s1"),
    Line("alpha_speedup", "with packing and alpha", "s2", marker="square"),
    Line("alpha_k_speedup", "with alpha and K", "s3", marker="triangle"),
    Line("kernel_over_best", "kernel, over the best float library", "s4", "dashed"),
)
MARKERS = ("circle", "square", "triangle")
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
    keys = "".join(legend_key(line, f"{name}:{index}") for index, line in enumerate(lines))
    chart = charts.add(name, title, summary, plot, size="even-part")
    return chart.replace("</figcaption>", f'<div class="keys">{keys}</div></figcaption>')


def _by_outputs(rows: Sequence["Row"]) -> tuple[Line, ...]:
    """A curve for each number of output channels, below the formula, which does not depend on it."""
    outputs = sorted({row.out_channels for row in rows})
    curves = (
        Line("alpha_speedup", f"{o} outputs", f"s{i % 6 + 1}", ("solid", "dashed")[i % 2], MARKERS[i // 2 % 3], o)
        for i, o in enumerate(outputs)
    )
    return Line("paper", "formula of the paper", "s7", "dotted", "", outputs[0]), *curves


def _rows_of(line: Line, rows: Sequence["Row"]) -> list["Row"]:
    return [row for row in rows if line.only in (None, row.out_channels)]


def _draw(plot: figure, line: Line, rows: Sequence["Row"], x: str, series: str) -> None:
    columns: dict[str, Any] = {"x": [getattr(r, x) for r in rows], "y": [getattr(r, line.column) for r in rows]}
    source = ColumnDataSource(columns)
    curve = plot.line("x", "y", source=source, line_width=2.2, line_dash=line.dash, muted_alpha=0.12)
    curve.tags = [line.colour, series]
    if line.marker:
        plot.scatter("x", "y", source=source, size=7, marker=line.marker, muted_alpha=0.12).tags = curve.tags
    plot.add_tools(HoverTool(renderers=[curve], tooltips=[(line.label, "@y{0.0}"), ("at", "@x")]))
