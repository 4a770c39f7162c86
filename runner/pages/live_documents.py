"""The documents behind live pages: filled once, then kept up to date while somebody looks at them."""

import json
import time
from typing import Any

from bokeh.document import Document
from bokeh.models import ColumnDataSource

from runner.pages.compare import add_rows, comparison_body
from runner.pages.dashboard import run_charts, run_parts
from runner.pages.figures import Sheet
from runner.pages.page import embedded_json
from runner.pages.records import Memory, Run, read_run
from runner.pages.watch import Followed, Watch

EVERY = 400  # milliseconds between looks at what changed; the folders are looked at once a second
LEISURE = (
    10  # a page that is slow to bring up to date rests for that many times as long, but for no longer than a second
)


def follow_comparison(document: Document, watch: Watch) -> None:
    """The comparison of all runs; rows are sent when they change."""
    sheet = Sheet({}, document=document)
    comparison_body(sheet, known_costs(watch), "")
    source = add_rows(sheet, rows(watch), watch.base)
    seen = [watch.version, watch.places]

    def update() -> None:
        # First, for a page that was opened before there was a run reads new rows by it.
        source.tags = [json.dumps(watch.base)]
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
    memory: Memory = {}
    run = read_run(followed.folder, memory=memory)
    *_, sheet = run_charts(run)
    sheet.document = document
    sheet.draw()
    news = ColumnDataSource({"part": [], "html": [], "facts": []}, name="news")
    document.add_root(news)
    shown = run_parts(run)
    state = {"version": followed.version, "rest_until": 0.0}

    def update() -> None:
        if followed.version == state["version"] or time.monotonic() < state["rest_until"]:
            return
        start = time.process_time()
        state["version"] = followed.version
        news.data = news_of(read_run(followed.folder, memory=memory), sheet, shown)
        state["rest_until"] = time.monotonic() + min(LEISURE * (time.process_time() - start), 1.0)

    document.add_periodic_callback(update, EVERY)


def news_of(run: Run, sheet: Sheet, shown: dict[str, str]) -> dict[str, Any]:
    """Bring the charts up to date; returns the texts that changed, or the word to load the page again."""
    *_, fresh = run_charts(run)
    if fresh.charts != sheet.charts:
        return {"part": ["reload"], "html": [""], "facts": [""]}
    for name, properties in fresh.moving.items():
        if model := sheet.document.get_model_by_name(name):
            model.update(**properties)
    changed = {name: html for name, html in run_parts(run).items() if shown[name] != html}
    shown.update(changed)
    facts = embedded_json(fresh.facts())
    return {"part": [*changed, "facts"], "html": [*changed.values(), ""], "facts": [""] * len(changed) + [facts]}
