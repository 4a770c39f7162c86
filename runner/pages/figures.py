"""The Bokeh figures of a page: curves and heat maps that share one x axis, one crosshair and one look.

Colours are names (`train`, `val`, ...) that page.js looks up in page.css. Text on the canvas is our own, or a
label drawn by a glyph, which shows characters and interprets none of them.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
from bokeh.core.json_encoder import serialize_json
from bokeh.core.properties import value
from bokeh.document import Document
from bokeh.models import (
    BasicTicker,
    BoxZoomTool,
    CDSView,
    ColumnDataSource,
    CrosshairTool,
    DataRange1d,
    FactorRange,
    FixedTicker,
    HoverTool,
    IndexFilter,
    LinearAxis,
    NumeralTickFormatter,
    Range1d,
)
from bokeh.models.annotations.geometry import Span
from bokeh.models.annotations.legends import ColorBar
from bokeh.models.renderers.glyph_renderer import GlyphRenderer
from bokeh.plotting import figure

from runner.pages.page import embedded_json, text
from runner.pages.scales import colours, largest, spans_decades

MARKERS_PER_CURVE = 12
MOST_CELLS = 20_000


@dataclass(frozen=True)
class Series:
    """One curve: the column it shows, its name, and the colour, dash and marker that tell it from others."""

    column: str
    label: str
    colour: str = "single"
    dash: str = "solid"
    marker: str = "circle"


@dataclass(frozen=True)
class Panel:
    """One chart: its title, its curves, their unit, and how it is drawn."""

    key: str
    title: str
    series: tuple[Series, ...]
    unit: str = ""
    size: str = "minor"
    step: Literal["before", "after"] | None = (
        None  # 'before': a value holds until its point; 'after': from its point on
    )
    from_zero: bool = False
    phase_names: Literal["above", "below"] | None = None  # where they are in nobody's way

    @property
    def heading(self) -> str:
        """What stands above the chart."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


@dataclass(frozen=True)
class Band:
    """A range behind the curves of a chart: columns low and high of a source with positions, and its name."""

    source: ColumnDataSource
    label: str
    colour: str


@dataclass(frozen=True)
class Axis:
    """A choice of what the x axis counts; every source has a column x_<name> for it."""

    label: str
    end: float


@dataclass
class Sheet:
    """All figures of one page, in one document, so that their x axes and crosshairs move together."""

    axes: dict[str, Axis]
    phases: pd.DataFrame = field(default_factory=pd.DataFrame)
    document: Document = field(default_factory=Document)
    hosts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.x_range = Range1d(start=0, end=1, name="x")
        self.crosshair = Span(dimension="height", line_dash="dashed", line_width=1)
        self.phase_source = source_of(self.phases)

    def curves(
        self, panel: Panel, source: ColumnDataSource, summary: str,
        best: ColumnDataSource | None = None, band: Band | None = None,
    ) -> str:  # fmt: skip
        """Add one chart; returns its HTML. `best` holds the point to ring, `band` what lies behind the curves."""
        logarithmic = panel.key == "lr" and spans_decades(source.data[panel.series[0].column])
        grounded = panel.from_zero and not logarithmic
        plot = self.plot(DataRange1d(start=0, range_padding=0.2) if grounded else DataRange1d(), logarithmic)
        if not logarithmic and max(largest(source.data[series.column]) for series in panel.series) < 1e4:
            plot.yaxis.formatter = NumeralTickFormatter(format="0,0.[0000000]")
        self._mark_phases(plot, panel.phase_names)
        if band is not None:
            area = plot.varea("x", "low", "high", source=band.source, fill_alpha=0.18, muted_alpha=0.04)
            area.tags = [band.colour, f"{panel.key}:band"]
        names = [f"{panel.key}:{series.column}" for series in panel.series]
        for index, (series, name) in enumerate(zip(panel.series, names, strict=True)):
            line = _curve(plot, panel, series, name, source, index)
            if index == 0:
                plot.add_tools(_curve_tooltip(panel, line))
        keys = [_key(series, name) for series, name in zip(panel.series, names, strict=True)]
        if best is not None:
            ring = plot.scatter("x", "y", source=best, size=15, marker="circle", fill_alpha=0, line_width=2.5)
            ring.tags = ["single", f"{panel.key}:best"]
            keys.append(_key(Series("best", "best", "single"), f"{panel.key}:best", shape="ring"))
        if band is not None:
            keys.append(_key(Series("band", band.label, band.colour), f"{panel.key}:band", shape="band"))
        title = f"{panel.heading}, logarithmic" if logarithmic else panel.heading
        return self.host(plot, panel.key, title, panel.size, summary, keys if len(keys) > 1 else [])

    def heat_map(
        self, key: str, title: str, column: str, source: ColumnDataSource, layers: Sequence[str], hidden: bool
    ) -> str:
        """Add a map of layer x time whose colour is `column`; returns its HTML."""
        plot = self.plot(FactorRange(factors=list(reversed(layers)), range_padding=0), logarithmic=False)
        mapper, landmarks = colours(source.data[column])
        cells = plot.hbar(
            y="row", left="left", right="right", height=1, source=source, line_width=1,
            fill_color={"field": column, "transform": mapper}, line_color={"field": column, "transform": mapper},
        )  # fmt: skip
        tips = [("layer", "@layer"), ("epoch", "@epoch{0}"), (title, f"@{column}{{%.6g}}")]
        plot.add_tools(HoverTool(renderers=[cells], tooltips=tips, formatters={f"@{column}": "printf"}))
        bar = ColorBar(
            color_mapper=mapper, height=10, padding=4, background_fill_alpha=0, bar_line_alpha=0,
            ticker=FixedTicker(ticks=landmarks), formatter=NumeralTickFormatter(format="0.[0000000]a"),
            major_tick_line_alpha=0, major_label_text_font_size="12px", margin=0,
        )  # fmt: skip
        plot.add_layout(bar, "above")
        plot.ygrid.visible = False
        summary = f"Heat map of {len(layers)} layers over time: {title}. The last epoch is in the table below."
        height = 110 + 20 * len(layers)
        return self.host(plot, key, title, "heat-map", summary, [], hidden=hidden, height=height)

    def embed(self, **facts: object) -> str:
        """The document and what the page's scripts need to know, ready to stand inside a script element."""
        document = serialize_json(self.document.to_json(deferred=False))
        return embedded_json(f'{{{json.dumps(self.facts() | facts)[1:-1]}, "document": {document}}}')

    def facts(self) -> dict[str, object]:
        """The choices of the x axis, and where the figures go."""
        axes = {name: {"label": axis.label, "end": [0, axis.end * 1.03 or 1]} for name, axis in self.axes.items()}
        return {"axes": axes, "hosts": self.hosts}

    def plot(self, y_range: DataRange1d | FactorRange, logarithmic: bool) -> figure:
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
        plot.xaxis.formatter = NumeralTickFormatter(format="0.[00]a")
        if isinstance(y_range, DataRange1d) and not logarithmic:
            plot.yaxis.ticker = BasicTicker(desired_num_ticks=5)
            plot.yaxis.formatter = NumeralTickFormatter(format="0.[0000000]a")
        plot.xgrid.visible = False
        set_type(plot)
        return plot

    def _mark_phases(self, plot: figure, names: Literal["above", "below"] | None) -> None:
        if len(self.phases) < 2:
            return
        shaded = CDSView(filter=IndexFilter(indices=list(range(1, len(self.phases), 2))))
        band = plot.vstrip("left", "right", source=self.phase_source, view=shaded, line_alpha=0, level="underlay")
        band.tags = ["band"]
        border = plot.vspan("left", source=self.phase_source, line_dash="dotted", level="underlay")
        border.tags = ["rule"]
        if names:
            plot.extra_y_ranges = {"unit": Range1d(start=0, end=1)}
            edge, baseline = (1, "top") if names == "above" else (0, "bottom")
            label = plot.text(
                "right", edge, "label", source=self.phase_source, y_range_name="unit", text_baseline=baseline,
                text_font=value("system-ui, sans-serif"), text_font_size="12px", text_align="right",
                x_offset=-4, y_offset=6 if edge else -4,
            )  # fmt: skip
            label.tags = ["quiet"]

    def host(
        self, plot: figure, key: str, title: str, size: str, summary: str, keys: list[str],
        *, hidden: bool = False, height: int | None = None,
    ) -> str:  # fmt: skip
        self.document.add_root(plot)
        self.hosts.append(f"plot-{key}")
        style = f' style="height: {height}px"' if height else ""
        legend = f'<div class="keys">{"".join(keys)}</div>' if keys else ""
        return (
            f'<figure class="{size}"{" hidden" if hidden else ""}><figcaption><h3>{text(title)}</h3>{legend}'
            f'</figcaption><div class="plot" id="plot-{key}" role="img" aria-label="{text(summary)}"{style}>'
            f"</div></figure>"
        )


def _columns(table: pd.DataFrame) -> dict[str, Any]:
    """A table as Bokeh columns; numbers without infinities, which no axis could show."""
    finite = table.replace([np.inf, -np.inf], np.nan)
    columns = {str(name): finite[name] for name in finite}
    return {
        name: column.to_numpy() if pd.api.types.is_numeric_dtype(column) else column.to_list()
        for name, column in columns.items()
    }


def source_of(table: pd.DataFrame) -> ColumnDataSource:
    """A data source with positions x (or left, right) that page.js fills from x_<axis>."""
    return ColumnDataSource(_columns(table))


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


def _curve(
    plot: figure, panel: Panel, series: Series, name: str, source: ColumnDataSource, index: int
) -> "GlyphRenderer[Any]":
    style: dict[str, Any] = {"line_width": 2.2, "line_dash": series.dash, "muted_alpha": 0.12}
    line: GlyphRenderer[Any]
    if panel.step:
        line = plot.step("x", series.column, source=source, mode=panel.step, **style)
    else:
        line = plot.line("x", series.column, source=source, **style)
    line.tags = [series.colour, name]
    shown = np.flatnonzero(~np.isnan(np.asarray(source.data[series.column], dtype=float)))
    every = math.ceil(len(shown) / MARKERS_PER_CURVE) or 1
    chosen = shown[(index * every // max(len(panel.series), 1)) :: every]
    if panel.step is None or len(shown) <= 2:
        dots = plot.scatter(
            "x", series.column, source=source, view=CDSView(filter=IndexFilter(indices=[int(i) for i in chosen])),
            marker=series.marker, size=7, muted_alpha=0.12,
        )  # fmt: skip
        dots.tags = [series.colour, name]
    return line


def _curve_tooltip(panel: Panel, line: "GlyphRenderer[Any]") -> HoverTool:
    columns = [series.column for series in panel.series]
    tips = [("epoch", "@epoch{0}"), ("step", "@step{0,0}"), ("phase", "@phase")]
    tips += [(series.label, f"@{series.column}{{%.8g}}") for series in panel.series]
    printf: dict[str, Any] = {f"@{column}": "printf" for column in columns}
    return HoverTool(renderers=[line], mode="vline", tooltips=tips, formatters=printf, line_policy="nearest")


def _key(series: Series, name: str, *, shape: Literal["curve", "ring", "band"] = "curve") -> str:
    """One entry of the legend: a real button, so that it can be reached and read without a mouse."""
    dash = {"solid": "", "dashed": "6 3", "dotted": "2 3"}[series.dash]
    marker = {
        "circle": '<circle cx="18" cy="6" r="4"/>',
        "square": '<rect x="14" y="2" width="8" height="8"/>',
        "triangle": '<path d="M18 1l5 9h-10z"/>',
    }[series.marker]
    if shape == "band":
        drawing = '<rect y="1" width="36" height="10" stroke="none" opacity=".3"/>'
    elif shape == "ring":
        drawing = '<circle cx="18" cy="6" r="5.5" fill="none" stroke-width="2"/>'
    else:
        drawing = f'<path d="M0 6h36" stroke-width="2.2" stroke-dasharray="{dash}"/>{marker}'
    colour = f"var(--{series.colour})"
    return (
        f'<button type="button" aria-pressed="true" data-series="{name}">'
        f'<svg viewBox="0 0 36 12" aria-hidden="true" stroke="{colour}" fill="{colour}">{drawing}</svg>'
        f"{text(series.label)}</button>"
    )
