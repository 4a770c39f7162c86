"""The Bokeh figures of a page: they share one x axis, one crosshair and one look.

Colours are names (`train`, `val`, ...) that page.js looks up in page.css. Text on the canvas is our own, or a
label drawn by a glyph, which shows characters and interprets none of them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pandas as pd
from bokeh.core.json_encoder import serialize_json
from bokeh.document import Document
from bokeh.models import (
    BasicTicker,
    BoxZoomTool,
    ColumnDataSource,
    CrosshairTool,
    DataRange1d,
    FactorRange,
    IndexFilter,
    LinearAxis,
    NumeralTickFormatter,
    Range1d,
)
from bokeh.models.annotations.geometry import Span
from bokeh.plotting import figure

from runner.pages.page import embedded_json, text


@dataclass(frozen=True)
class Axis:
    """A choice of what the x axis counts; every table has a column x_<name> for it."""

    label: str
    end: float


class Chart(Protocol):
    """A chart that was described; two that are equal are built in the same way."""

    def draw(self, sheet: "Sheet") -> figure: ...


@dataclass
class Sheet:
    """All figures of one page, in one document, so that their x axes and crosshairs move together."""

    axes: dict[str, Axis]
    document: Document = field(default_factory=Document)
    hosts: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)  # described, drawn by `draw`
    moving: dict[str, dict[str, Any]] = field(default_factory=dict)  # properties of their models, by the models' names

    @cached_property
    def x_range(self) -> Range1d:
        return Range1d(start=0, end=1, name="x")

    @cached_property
    def crosshair(self) -> Span:
        return Span(dimension="height", line_dash="dashed", line_width=1)

    @cached_property
    def sources(self) -> dict[str, ColumnDataSource]:
        return {name: ColumnDataSource(name=name, **found) for name, found in self.moving.items() if "data" in found}

    @cached_property
    def filters(self) -> dict[str, IndexFilter]:
        """The points that are shown of a table."""
        return {name: IndexFilter(name=name, **found) for name, found in self.moving.items() if "indices" in found}

    def keep(self, name: str, table: pd.DataFrame) -> None:
        """Take up a table with positions x (or left, right) that page.js fills from x_<axis>."""
        self.moving[name] = {"data": columns_of(table)}

    def draw(self) -> None:
        """Build the figures of what was described."""
        with self.document.models.freeze():  # else every figure that is added looks at all the others again
            for chart in self.charts:
                self.document.add_root(chart.draw(self))

    def embed(self, **facts: object) -> str:
        """The document and what the page's scripts need to know, ready to stand inside a script element."""
        self.draw()
        document = serialize_json(self.document.to_json(deferred=False))
        return embedded_json(f'{{{json.dumps(self.facts() | facts)[1:-1]}, "document": {document}}}')

    def facts(self) -> dict[str, object]:
        """The choices of the x axis, and where the figures go."""
        axes = {name: {"label": axis.label, "end": [0, axis.end * 1.03 or 1]} for name, axis in self.axes.items()}
        return {"axes": axes, "hosts": self.hosts}

    def plot(self, y_range: DataRange1d | FactorRange, logarithmic: bool) -> figure:
        """An empty figure in the look of the page."""
        plot = figure(
            x_range=self.x_range, y_range=y_range, y_axis_type="log" if logarithmic else "auto",
            sizing_mode="stretch_both", toolbar_location=None, tools="", window_axis="x", min_border_right=14,
            background_fill_alpha=0, border_fill_alpha=0, outline_line_alpha=0, min_border_left=56, lod_threshold=None,
        )  # fmt: skip
        zoom = BoxZoomTool(dimensions="width")
        plot.add_tools(zoom, CrosshairTool(overlay=self.crosshair))
        plot.toolbar.active_drag = zoom
        plot.xaxis.name = "x"
        plot.xaxis.ticker = BasicTicker(name="x", desired_num_ticks=6)
        plot.xaxis.formatter = amounts()
        if isinstance(y_range, DataRange1d):
            if not logarithmic:
                plot.yaxis.ticker = BasicTicker(desired_num_ticks=5)
            plot.yaxis.formatter = amounts()
        plot.xgrid.visible = False
        set_type(plot)
        return plot

    def host(self, plot: figure, key: str, title: str, size: str, summary: str) -> str:
        """Take up a figure; returns the HTML of its place."""
        self.document.add_root(plot)
        return self.frame(key, title, size, summary)

    def frame(
        self, key: str, title: str, size: str, summary: str, keys: Sequence[str] = (),
        *, hidden: bool = False, height: int | None = None,
    ) -> str:  # fmt: skip
        """The place of the next figure: its title and legend, and what is said of it."""
        self.hosts.append(f"plot-{key}")
        style = f' style="height: {height}px"' if height else ""
        legend = f'<div class="keys">{"".join(keys)}</div>' if keys else ""
        return (
            f'<figure class="{size}"{" hidden" if hidden else ""}><figcaption><h3>{text(title)}</h3>{legend}'
            f'</figcaption><div class="plot" id="plot-{key}" role="img" aria-label="{text(summary)}"{style}>'
            f"</div></figure>"
        )


def columns_of(table: pd.DataFrame) -> dict[str, Any]:
    """A table as Bokeh columns; numbers without infinities, which no axis could show."""
    finite = table.replace([np.inf, -np.inf], np.nan)
    columns = {str(name): finite[name] for name in finite}
    return {
        name: column.to_numpy() if pd.api.types.is_numeric_dtype(column) else column.to_list()
        for name, column in columns.items()
    }


def amounts() -> NumeralTickFormatter:
    """Writes the numbers of an axis as the cards do, with k, M and G; page.js knows it by its tag."""
    return NumeralTickFormatter(tags=["amounts"])


def set_type(plot: figure) -> None:
    """Letters and lines as everywhere."""
    for axis in [*plot.xaxis, *plot.yaxis]:
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font_size = axis.major_label_text_font_size = "12px"
        axis.axis_label_text_font = axis.major_label_text_font = "system-ui, sans-serif"
        axis.minor_tick_line_alpha = 0
        axis.axis_label_standoff = 4
        if not isinstance(axis, LinearAxis):
            axis.major_tick_line_alpha = 0
