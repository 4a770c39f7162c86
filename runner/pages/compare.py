"""The comparison: every run of some folders side by side, filtered, coloured and averaged in the page itself.

The page holds the rows of all runs (`runner.pages.entries`) in one data source; compare.js groups them over seeds, fills
charts and tables, and does it again whenever a filter changes or, on a live page, a row does.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from urllib.parse import quote

from bokeh.models import ColumnDataSource

from runner.pages.compare_figures import cost_charts, curve_chart
from runner.pages.curves import zoom_buttons
from runner.pages.entries import COSTS, MOST_CURVES, Costs, Entry, base_of, encoded, entry_of, points_for
from runner.pages.figures import Sheet
from runner.pages.page import page, text, write_page
from runner.pages.records import read_run

SCRIPTS = ("page.js", "compare_data.js", "compare.js")
METRICS = {
    "val_top1": "validation top-1", "train_top1": "train top-1", "val_loss": "validation loss", "train_loss": "train loss",
    "lr": "learning rate",
}  # fmt: skip
AXES = ("epoch", "step", "time")
MANY = 1_000  # runs that take seconds to read: as many at a time as there are cores


def write_comparison(folders: Sequence[Path], path: Path) -> Path:
    """Write one page that compares the runs; links lead to the pages in their folders."""
    place = path.parent.resolve()
    entries = entries_of(folders, lambda folder: quote(os.path.relpath(_page_of(folder.resolve()), place)))
    sheet = Sheet({})
    subtitle = f"{len(entries):,} run{'s' * (len(entries) != 1)}"
    body = comparison_body(sheet, [entry["costs"] for entry in entries], subtitle)
    base = base_of(entry["settings"] for entry in entries)
    add_rows(sheet, [encoded(entry, base) for entry in entries], base)
    return write_page(path, page("Comparison", body, sheet.embed(costs=costs_in_words()), SCRIPTS))


def _page_of(folder: Path) -> Path:
    """The page of a run, or where none was drawn, for it has not ended or has failed, its folder."""
    drawn = folder / "dashboard.html"
    return drawn if drawn.is_file() else folder


def entries_of(folders: Sequence[Path], link: Callable[[Path], str]) -> list[Entry]:
    """A row a run; the curves only of the newest where they are very many."""
    newest = set(sorted(folders, key=_changed, reverse=True)[:MOST_CURVES])
    points = points_for(len(folders))
    jobs = [(folder, link(folder), points if folder in newest else 0) for folder in folders]
    if len(jobs) < MANY:
        return list(map(_entry, jobs))
    with ProcessPoolExecutor() as pool:
        return list(pool.map(_entry, jobs, chunksize=100))


def _entry(job: tuple[Path, str, int]) -> Entry:
    folder, link, points = job
    return entry_of(read_run(folder, health=False), link, points)


def _changed(folder: Path) -> float:
    try:
        return (folder / "metrics.csv").stat().st_mtime
    except OSError:
        return 0.0


def costs_in_words() -> dict[str, dict[str, object]]:
    """What compare.js has to know of the costs."""
    return {key: {"title": cost.title, "unit": cost.unit, "scale": cost.scale} for key, cost in COSTS.items()}


def add_rows(sheet: Sheet, rows: Sequence[str], base: dict[str, str]) -> ColumnDataSource:
    """Put the rows where compare.js looks for them, together with the base that they differ from."""
    source = ColumnDataSource({"run": list(rows)}, name="runs", tags=[json.dumps(base)])
    sheet.document.add_root(source)
    return source


def comparison_body(sheet: Sheet, costs: Iterable[Costs], subtitle: str) -> str:
    """Everything between <body> and the scripts; what depends on the rows is left to compare.js."""
    curves = curve_chart(sheet)
    charts = "".join(cost_charts(sheet, costs))
    return f"""<header><h1>Comparison</h1><p>{text(subtitle)}</p></header>
<main>
<details class="notice" id="broken" hidden><summary id="broken-count"></summary><ul id="broken-list"></ul></details>
<div class="controls filters" role="group" aria-label="Filter and style">
{_select("filter-key", "Only runs with", ())} {_select("filter-value", "=", ())}
<label>named <input type="search" id="search" size="12" autocomplete="off"></label>
{_select("colour-key", "Colour by", ())} {_select("dash-key", "Dash by", ())}
<span id="chips" class="chips"></span>
</div>
<p id="count" class="small quiet" role="status"></p>
<h2>Curves</h2>
<div class="controls"><fieldset><legend>Horizontal axis</legend>{_axes()}</fieldset>
{_select("metric", "Vertical axis", METRICS.items())}
{zoom_buttons()}</div>
<div class="legends"><div class="keys" id="legend-colour"></div><div class="keys" id="legend-dash"></div></div>
<div class="panels wide">{curves}</div>
<h2>Accuracy against cost</h2>
<div class="controls">{_select("goal", "Accuracy", ())}
<span class="small quiet">A dotted line joins what nothing else beats at the same or a lower cost
(the Pareto front); every network and every set of images has its own.</span></div>
<div class="even costs">{charts}</div>
<p id="costs-none" hidden>What these configurations cost is the same for all, or not known yet.</p>
{_table("results", "Results", "One row a configuration; mean ± standard deviation over seeds; a click on a heading sorts")}
{_table("settings", "Differing keys", "Only the keys in which these configurations differ")}
<p id="settings-none" hidden>These runs differ in nothing but the seed.</p>
</main>
<footer>Drawn from the CSV files of the runs.
Bit operations: MACs &times; weight bits &times; activation bits, computed, not measured.</footer>"""


def _select(name: str, label: str, options: Iterable[tuple[str, str]]) -> str:
    inner = "".join(f'<option value="{text(value)}">{text(shown)}</option>' for value, shown in options)
    return f'<label>{text(label)} <select id="{name}">{inner}</select></label>'


def _axes() -> str:
    return "".join(
        f'<label><input type="radio" name="compared" value="{axis}"{" checked" if axis == "epoch" else ""}>{axis}</label>'
        for axis in AXES
    )


def _table(name: str, title: str, caption: str) -> str:
    return (
        f'<h2>{text(title)}</h2><div class="scroll tall" id="{name}-box" tabindex="0" role="region" aria-label="{text(title)}">'
        f'<table id="{name}"><caption>{text(caption)}</caption><thead></thead><tbody></tbody></table></div>'
        f'<p class="pager" id="{name}-pages" hidden><button type="button" data-page="{name}:-1">&lsaquo; Before</button> '
        f'<span id="{name}-where"></span> <button type="button" data-page="{name}:1">Next &rsaquo;</button></p>'
    )
