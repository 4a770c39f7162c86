"""The page of a benchmark: bars with quartiles, tables of every number, and what they were measured on. No torch here."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bokeh.core.json_encoder import serialize_json
from bokeh.core.properties import value as literal
from bokeh.document import Document
from bokeh.models import BasicTicker, ColumnDataSource, FactorRange, HoverTool, Range1d
from bokeh.models.annotations.geometry import Span
from bokeh.plotting import figure

from runner.pages.figures import amounts
from runner.pages.page import Column, embedded_json, page, plain, table, text, write_page

ROW_HEIGHT = 36  # a name, and its bar below: names beside bars would leave these no room on a telephone


@dataclass(frozen=True)
class Bar:
    """One bar: its name, its value, and the quartiles of what was measured (None: not measured, or nothing that varies)."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    foreign: bool = False  # a published figure, drawn as an outline


@dataclass
class Charts:
    """All figures of one page. Colours are names of page.css, which page.js looks up."""

    document: Document = field(default_factory=Document)
    hosts: list[str] = field(default_factory=list)

    def add(
        self, key: str, title: str, summary: str, plot: figure, *, height: int | None = None, size: str = ""
    ) -> str:
        """Take up a figure; returns the HTML of its place."""
        self.document.add_root(plot)
        self.hosts.append(f"plot-{key}")
        style = f' style="height: {height}px"' if height else ""
        return (
            f'<figure class="{size}"><figcaption><h3>{text(title)}</h3></figcaption>'
            f'<div class="plot" id="plot-{key}" role="img" aria-label="{text(summary)}"{style}></div></figure>'
        )

    def bars(self, key: str, title: str, bars: Sequence[Bar], *, line_at: float | None = 1.0) -> str:
        """Horizontal bars from 0, the first one on top, a whisker from quartile to quartile, a line at what counts as even."""
        reach = max([bar.high or bar.value for bar in bars] + [line_at or 0.0])
        plot = figure(
            x_range=Range1d(start=0, end=1.18 * reach), y_range=FactorRange(factors=[b.name for b in reversed(bars)]),
            sizing_mode="stretch_both", toolbar_location=None, tools="", min_border_right=14,
            background_fill_alpha=0, border_fill_alpha=0, outline_line_alpha=0,
        )  # fmt: skip
        for foreign, role in ((False, "val"), (True, "quiet")):
            _draw(plot, [bar for bar in bars if bar.foreign == foreign], role, filled=not foreign)
        if line_at is not None:
            plot.add_layout(Span(location=line_at, dimension="height", line_dash="dashed", line_width=1))
        style(plot)
        plot.yaxis.visible = False
        plot.xaxis.ticker = BasicTicker(desired_num_ticks=4)
        summary = "; ".join(f"{bar.name}: {plain(bar.value)}" for bar in bars)
        return self.add(key, title, summary, plot, height=60 + ROW_HEIGHT * len(bars), size="major")

    def embed(self) -> str:
        """The document, ready to stand inside a script element."""
        document = serialize_json(self.document.to_json(deferred=False))
        return embedded_json(f'{{"axes": {{}}, "hosts": {json.dumps(self.hosts)}, "document": {document}}}')


def _draw(plot: figure, bars: Sequence[Bar], role: str, *, filled: bool) -> None:
    source = ColumnDataSource(
        {
            "name": [bar.name for bar in bars],
            "above": [(bar.name, 0.27) for bar in bars],
            "below": [(bar.name, -0.17) for bar in bars],
            "value": [bar.value for bar in bars],
            "low": [bar.value if bar.low is None else bar.low for bar in bars],
            "high": [bar.value if bar.high is None else bar.high for bar in bars],
            "label": [f"{bar.value:,.0f}" if bar.value >= 100 else f"{bar.value:.3g}" for bar in bars],
        }
    )
    drawn = plot.hbar(
        y="below", right="value", height=0.42, source=source, fill_alpha=0.55 if filled else 0, line_width=1.5
    )
    drawn.tags = [role]
    whiskers = plot.segment(x0="low", x1="high", y0="below", y1="below", source=source, line_width=2.5)
    whiskers.tags = ["single"]
    for x, y, words, x_offset in (("high", "below", "label", 6), (0, "above", "name", 1)):
        label = plot.text(
            x, y, words, source=source, x_offset=x_offset, text_baseline="middle", text_font_size="12px",
            text_font=literal("system-ui, sans-serif"),
        )  # fmt: skip
        label.tags = ["quiet"]
    tips = [("", "@name"), ("median", "@value{0.000}"), ("quartiles", "@low{0.000} to @high{0.000}")]
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=tips[: 3 if filled else 2]))


def style(plot: figure) -> None:
    """Letters and lines as everywhere; colours come from the page."""
    for axis in [*plot.xaxis, *plot.yaxis]:
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font_size = axis.major_label_text_font_size = "12px"
        axis.axis_label_text_font = axis.major_label_text_font = "system-ui, sans-serif"
        axis.minor_tick_line_alpha = 0
    plot.xaxis.formatter = amounts()
    plot.ygrid.visible = False


def facts_table(facts: Mapping[str, object]) -> str:
    """Names and values."""
    pairs = (Column("key", "what", numeric=False), Column("value", "value", numeric=False, wide=True))
    rows: list[dict[str, object]] = [{"key": key, "value": str(value)} for key, value in facts.items()]
    return f"<h2>Measured on</h2>{table(pairs, rows, 'What the numbers depend on')}"


def write_bench_page(path: Path, title: str, subtitle: str, sections: Iterable[str], charts: Charts) -> Path:
    """The whole page of one benchmark."""
    body = (
        f"<header><h1>{text(title)}</h1><p>{text(subtitle)}</p></header>"
        f"<main>{''.join(sections)}</main><footer>{text(path.name)}</footer>"
    )
    return write_page(path, page(title, body, charts.embed()))
