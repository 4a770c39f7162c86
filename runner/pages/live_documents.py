"""The documents behind live pages: filled once, then kept up to date while somebody looks at them."""

import time
from pathlib import Path
from typing import Any

from bokeh.document import Document
from bokeh.model import Model
from bokeh.models import ColorMapper, ColumnDataSource, FactorRange, FixedTicker, IndexFilter

from runner.pages.compare import add_rows, comparison_body
from runner.pages.dashboard import run_body, run_parts
from runner.pages.figures import Sheet
from runner.pages.page import embedded_json
from runner.pages.records import read_run
from runner.pages.watch import Followed, Watch

EVERY = 400  # milliseconds between looks at what changed; the folders are looked at once a second
LEISURE = (
    10  # a page that is slow to bring up to date rests for that many times as long, but for no longer than a second
)
FOLLOWING: dict[type[Model], tuple[str, ...]] = {
    ColumnDataSource: ("data",), IndexFilter: ("indices",), FixedTicker: ("ticks",), FactorRange: ("factors",),
    ColorMapper: ("low", "high"),
}  # fmt: skip


def follow_comparison(document: Document, watch: Watch) -> None:
    """The comparison of all runs; rows are sent when they change."""
    sheet = Sheet({}, document=document)
    comparison_body(sheet, known_costs(watch), "")
    source = add_rows(sheet, rows(watch))
    seen = [watch.version, watch.places]

    def update() -> None:
        if watch.places != seen[1]:
            source.data = {"run": rows(watch)}
        elif watch.version != seen[0]:
            source.patch({"run": list(watch.since(seen[0]))})
        seen[:] = watch.version, watch.places

    document.add_periodic_callback(update, EVERY)


def rows(watch: Watch) -> list[str]:
    """All rows that were read already, an empty object for the others."""
    return [run.row or "{}" for run in watch.runs.values()]


def known_costs(watch: Watch) -> list[dict[str, float | None]]:
    """What runs cost, as far as it was read."""
    return [run.costs for run in watch.runs.values() if run.costs is not None]


def follow_run(document: Document, followed: Followed) -> None:
    """The page of one run: data of its charts and texts beside them are sent when they change."""
    run = read_run(followed.folder)
    run_body(run, document=document)
    shown = run_parts(run)
    news = ColumnDataSource({"part": [], "html": [], "facts": []}, name="news")
    models = in_order(document)
    document.add_root(news)
    state = {"version": followed.version, "rest_until": 0.0}

    def update() -> None:
        if followed.version == state["version"] or time.monotonic() < state["rest_until"]:
            return
        start = time.process_time()
        state["version"] = followed.version
        news.data = _news(followed.folder, models, shown)
        state["rest_until"] = time.monotonic() + min(LEISURE * (time.process_time() - start), 1.0)

    document.add_periodic_callback(update, EVERY)


def _news(folder: Path, models: list[Model], shown: dict[str, str]) -> dict[str, Any]:
    """Bring the charts up to date; returns the texts that changed, or the word to load the page again."""
    run = read_run(folder)
    _, sheet = run_body(run)
    fresh = in_order(sheet.document)
    if [type(model) for model in fresh] != [type(model) for model in models]:
        return {"part": ["reload"], "html": [""], "facts": [""]}
    for old, new in zip(models, fresh, strict=True):
        for name in (name for kind, names in FOLLOWING.items() if isinstance(old, kind) for name in names):
            value = getattr(new, name)
            setattr(old, name, dict(value) if name == "data" else value)
    changed = {name: html for name, html in run_parts(run).items() if shown[name] != html}
    shown.update(changed)
    facts = embedded_json(sheet.facts())
    return {"part": [*changed, "facts"], "html": [*changed.values(), ""], "facts": [""] * len(changed) + [facts]}


def in_order(document: Document) -> list[Model]:
    """The models of a document as they were made: two documents of the same code can be laid side by side."""
    return sorted(document.models, key=lambda model: int(model.id.lstrip("p")))
