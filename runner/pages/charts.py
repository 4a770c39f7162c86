"""The charts of a run: described in words and numbers first, and drawn as Bokeh figures where somebody wants figures.

What decides how a chart is built is a frozen value; what changes while a run goes on stands beside it in `Sheet.moving`. A
live page compares the first and sends the second, without building a figure.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from bokeh.core.properties import value
from bokeh.models import (
    CDSView,
    DataRange1d,
    FactorRange,
    FixedTicker,
    HoverTool,
    LinearColorMapper,
    LogColorMapper,
    Model,
    Range1d,
)
from bokeh.models.annotations.legends import ColorBar
from bokeh.models.renderers.glyph_renderer import GlyphRenderer
from bokeh.plotting import figure

from runner.pages.figures import Sheet, amounts, columns_of
from runner.pages.page import text
from runner.pages.scales import colours, round_powers, spans_decades

MARKERS_PER_CURVE = 12
TOLD_OF: dict[str | None, Literal["prev", "next", "nearest"]] = {"after": "prev", "before": "next", None: "nearest"}


@dataclass(frozen=True)
class Series:
    """One curve: the column it shows, its name, and the colour, dash and marker (or none) that tell it from others."""

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
    """A range behind the curves of a chart: columns low and high of a table with positions, and its name."""

    table: pd.DataFrame
    label: str
    colour: str


@dataclass(frozen=True)
class Curves:
    """A chart of curves over the columns of `points`."""

    panel: Panel
    logarithmic: bool
    phases: bool
    best: bool
    band: str  # its colour

    def draw(self, sheet: Sheet) -> figure:
        """The figure."""
        panel, points = self.panel, sheet.sources["points"]
        grounded = panel.from_zero and not self.logarithmic
        plot = sheet.plot(DataRange1d(start=0, range_padding=0.2) if grounded else DataRange1d(), self.logarithmic)
        if self.logarithmic:
            ticks = f"ticks {panel.key}"
            plot.yaxis.ticker = FixedTicker(name=ticks, **sheet.moving[ticks])
        if self.phases:
            _mark_phases(plot, sheet, panel.phase_names)
        drawn: list[Model] = []
        if self.band:
            area = plot.varea(
                "x", "low", "high", source=sheet.sources[f"band {panel.key}"], fill_alpha=0.18, muted_alpha=0.04
            )
            area.tags = [self.band, f"{panel.key}:band"]
            drawn.append(area)
        for index, series in enumerate(panel.series):
            style: dict[str, Any] = {"line_width": 2.2, "line_dash": series.dash, "muted_alpha": 0.12}
            line: GlyphRenderer[Any] = (
                plot.step("x", series.column, source=points, mode=panel.step, **style)
                if panel.step
                else plot.line("x", series.column, source=points, **style)
            )
            marks = f"marks {panel.key}:{series.column}"
            dots = plot.scatter(
                "x", series.column, source=points, view=CDSView(filter=sheet.filters[marks]),
                marker=series.marker, size=7, muted_alpha=0.12,
            )  # fmt: skip
            line.tags = dots.tags = [series.colour, f"{panel.key}:{series.column}"]
            drawn.append(line)
            if index == 0:
                # Steps notice no mouse: an unseen line over the same points does.
                felt = plot.line("x", series.column, source=points, line_alpha=0) if panel.step else line
                plot.add_tools(_curve_tooltip(panel, felt, sheet))
        if self.best:
            source = sheet.sources[f"best {panel.key}"]
            ring = plot.scatter("x", "y", source=source, size=15, marker="circle", fill_alpha=0, line_width=2.5)
            ring.tags = ["single", f"{panel.key}:best"]
        assert isinstance(plot.y_range, DataRange1d)
        plot.y_range.renderers = drawn  # not the names of phases, which stand at 0 or 1 of a range of their own
        return plot


@dataclass(frozen=True)
class HeatMap:
    """A map of layer x time, whose colour is a column of `health`."""

    column: str
    title: str
    layers: tuple[str, ...]
    logarithmic: bool

    def draw(self, sheet: Sheet) -> figure:
        """The figure."""
        column, health = self.column, sheet.sources["health"]
        plot = sheet.plot(FactorRange(factors=list(reversed(self.layers)), range_padding=0), logarithmic=False)
        scale = LogColorMapper if self.logarithmic else LinearColorMapper
        name = f"colours {column}"
        mapper = scale(palette="Viridis256", nan_color="#80808040", name=name, **sheet.moving[name])
        cells = plot.hbar(
            y="row", left="left", right="right", height=1, source=health, line_width=1,
            fill_color={"field": column, "transform": mapper}, line_color={"field": column, "transform": mapper},
        )  # fmt: skip
        # Files count epochs from 0, charts those that are over.
        tips = [("layer", "@layer"), ("epochs completed", "@right_epoch{0}"), (self.title, f"@{column}{{%.6g}}")]
        plot.add_tools(HoverTool(renderers=[cells], tooltips=tips, formatters={f"@{column}": "printf"}))
        landmarks = f"landmarks {column}"
        bar = ColorBar(
            color_mapper=mapper, height=10, padding=4, background_fill_alpha=0, bar_line_alpha=0,
            ticker=FixedTicker(name=landmarks, **sheet.moving[landmarks]),
            formatter=amounts(),
            major_tick_line_alpha=0, major_label_text_font_size="12px", major_label_text_font="system-ui, sans-serif", margin=0,
        )  # fmt: skip
        plot.add_layout(bar, "above")
        plot.ygrid.visible = False
        return plot


def add_curves(
    sheet: Sheet, panel: Panel, summary: str, best: pd.DataFrame | None = None, band: Band | None = None
) -> str:
    """Add one chart over the table `points`; returns its HTML. `best`: the point to ring; `band`: what lies behind the curves."""
    columns = [sheet.moving["points"]["data"][series.column] for series in panel.series]
    logarithmic = panel.key == "lr" and spans_decades(columns[0])
    if logarithmic:
        sheet.moving[f"ticks {panel.key}"] = {"ticks": round_powers(columns[0])}
    names = [f"{panel.key}:{series.column}" for series in panel.series]
    for index, (name, column) in enumerate(zip(names, columns, strict=True)):
        sheet.moving[f"marks {name}"] = {"indices": _marked(column, index, panel)}
    keys = [legend_key(series, name) for series, name in zip(panel.series, names, strict=True)]
    if best is not None:
        sheet.keep(f"best {panel.key}", best)
        keys.append(legend_key(Series("best", "best", "single"), f"{panel.key}:best", shape="ring"))
    if band is not None:
        sheet.keep(f"band {panel.key}", band.table)
        keys.append(legend_key(Series("band", band.label, band.colour), f"{panel.key}:band", shape="band"))
    phases = len(sheet.moving["phases"]["data"].get("left", ())) > 1
    sheet.charts.append(Curves(panel, logarithmic, phases, best is not None, band.colour if band else ""))
    title = f"{panel.heading}, logarithmic" if logarithmic else panel.heading
    return sheet.frame(panel.key, title, panel.size, summary, keys if len(keys) > 1 else [])


def add_heat_map(sheet: Sheet, column: str, title: str, layers: Sequence[str], hidden: bool) -> str:
    """Add a map over the table `health`, whose column `row` names a layer; returns its HTML."""
    logarithmic, low, high, landmarks = colours(sheet.moving["health"]["data"][column])
    sheet.moving[f"colours {column}"] = {"low": low, "high": high}
    sheet.moving[f"landmarks {column}"] = {"ticks": landmarks}
    sheet.charts.append(HeatMap(column, title, tuple(layers), logarithmic))
    summary = f"Heat map of {len(layers)} layers over time: {title}. The last epoch is in the table below."
    height = 110 + 20 * len(layers)
    return sheet.frame(f"health-{column}", title, "heat-map", summary, [], hidden=hidden, height=height)


def keep_phases(sheet: Sheet, phases: pd.DataFrame) -> None:
    """The phases of a regime, one a row with its borders on every axis; every other one is shaded."""
    sheet.moving["phases"] = {"data": columns_of(phases)}
    sheet.moving["shaded"] = {"indices": list(range(1, len(phases), 2))}


def _mark_phases(plot: figure, sheet: Sheet, names: Literal["above", "below"] | None) -> None:
    phases = sheet.sources["phases"]
    shaded = CDSView(filter=sheet.filters["shaded"])
    band = plot.vstrip("left", "right", source=phases, view=shaded, line_alpha=0, level="underlay")
    band.tags = ["band"]
    border = plot.vspan("left", source=phases, line_dash="dotted", level="underlay")
    border.tags = ["rule"]
    if names:
        plot.extra_y_ranges = {"unit": Range1d(start=0, end=1)}
        edge, baseline = (1, "top") if names == "above" else (0, "bottom")
        label = plot.text(
            "right", edge, "label", source=phases, y_range_name="unit", text_baseline=baseline,
            text_font=value("system-ui, sans-serif"), text_font_size="12px", text_align="right",
            x_offset=-4, y_offset=6 if edge else -4,
        )  # fmt: skip
        label.tags = ["quiet"]


def _marked(column: object, index: int, panel: Panel) -> list[int]:
    """The points of a curve that carry its marker: a dozen, not those of the curve beside it; of steps only a single one."""
    shown = np.flatnonzero(~np.isnan(np.asarray(column, dtype=float)))
    if panel.step and len(shown) > 2:
        return []
    every = math.ceil(len(shown) / MARKERS_PER_CURVE) or 1
    return [int(place) for place in shown[(index * every // max(len(panel.series), 1)) :: every]]


def _curve_tooltip(panel: Panel, line: "GlyphRenderer[Any]", sheet: Sheet) -> HoverTool:
    columns = [series.column for series in panel.series]
    tips = [(sheet.axes["epoch"].label, "@x_epoch{0.[00]}")] if "epoch" in sheet.axes else []
    tips += [("step", "@step{0,0}"), ("phase", "@phase")]
    tips += [(series.label, f"@{series.column}{{%.8g}}") for series in panel.series]
    printf: dict[str, Any] = {f"@{column}": "printf" for column in columns}
    told = TOLD_OF[panel.step]
    return HoverTool(renderers=[line], mode="vline", tooltips=tips, formatters=printf, line_policy=told)


def legend_key(series: Series, name: str, *, shape: Literal["curve", "ring", "band"] = "curve") -> str:
    """One entry of the legend: a real button, so that it can be reached and read without a mouse."""
    dash = {"solid": "", "dashed": "6 3", "dotted": "2 3"}[series.dash]
    marker = {
        "circle": '<circle cx="18" cy="6" r="4"/>',
        "square": '<rect x="14" y="2" width="8" height="8"/>',
        "triangle": '<path d="M18 1l5 9h-10z"/>',
        "": "",
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
