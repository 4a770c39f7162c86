"""What `bench step` found: a table on screen, CSV, JSON, and a page with bars."""

import csv
import io
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.bench.literature import CONDITIONS, MODEL, PEERS, Published
from runner.bench.page import Bar, Charts, facts_table, write_bench_page
from runner.bench.step import Plan
from runner.files import write_atomic, write_json
from runner.pages.page import NOTHING, Column, table
from runner.screen import Screen

if TYPE_CHECKING:
    from runner.bench.step_contest import Result, Row

COLUMNS = {
    "": "name",
    "time": "time",
    "quartiles": "quartiles",
    "processor": "cpu",
    "saved": "saved",
    "peak": "peak",
    "ms a step": "ms",
    "images/s": "images_per_s",
    "saved, MiB": "saved_mib",
    "peak, MiB": "peak_mib",
}
FORMS = dict.fromkeys(("ms", "images_per_s", "saved_mib", "peak_mib"), ",.1f")  # ratios have three digits
MEANING = (
    "time: ratio to float32, median of turns, and quartiles; processor: the same in processor time; saved: bytes kept for "
    "backward; peak: the most memory that the tensors of a step take beyond those before it; all as ratios to float32"
)


def report(plan: Plan, result: "Result", command: Sequence[str]) -> None:
    """Show the rows and write them into outputs/bench."""
    rows, facts = result
    screen, folder = Screen("plain"), Path(plan.contenders[0].config.outputs) / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"step-{facts['model']}-{facts['batch']}-{'cpu' if facts['device'] == 'cpu' else 'gpu'}"
    title = f"One training step of {facts['model']}, batch {facts['batch']}"
    subtitle = f"{facts['threads']} thread(s) of {facts['cpu']}" if facts["device"] == "cpu" else facts["device"]
    subtitle += f", torch {facts['torch']}, {plan.turns} turns each, interleaved"
    shown = [_shown(row) for row in rows]
    screen.table(f"{title}: {subtitle}", list(COLUMNS), [[row[key] for key in COLUMNS.values()] for row in shown])
    screen.say(MEANING)
    peers = [[peer.name, _or_nothing(peer.time), _or_nothing(peer.saved), peer.source] for peer in PEERS]
    screen.table(f"Literature, not measured here: {CONDITIONS}", ["", "time", "saved", "source"], peers)
    write_atomic(folder / f"{stem}.csv", _as_csv(rows).encode(), durable=False)
    record = {
        "command": command,
        "facts": facts,
        "rows": [asdict(row) for row in rows],
        "literature": {"conditions": CONDITIONS, "rows": [asdict(peer) for peer in PEERS]},
    }
    write_json(folder / f"{stem}.json", record)
    page = _page(folder / f"{stem}.html", title, subtitle, rows, facts, command)
    screen.say(f"written: {page.resolve()}, and .csv and .json beside it")


def _shown(row: "Row") -> dict[str, Any]:
    """Rounded for people."""
    return {
        "name": row.name,
        "time": round(row.time, 3),
        "quartiles": f"{row.time_low:.3f}-{row.time_high:.3f}",
        "cpu": round(row.cpu, 3),
        "saved": round(row.saved, 3),
        "peak": round(row.peak, 3),
        "ms": round(1e3 * row.seconds, 1),
        "images_per_s": round(row.images_per_s, 1),
        "saved_mib": round(row.saved_bytes / 2**20, 1),
        "peak_mib": round(row.peak_bytes / 2**20, 1),
    }


def _or_nothing(value: float | None) -> float | str:
    return NOTHING if value is None else value


def _as_csv(rows: Sequence["Row"]) -> str:
    """Every column, every digit."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(asdict(rows[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def _page(
    path: Path, title: str, subtitle: str, rows: Sequence["Row"], facts: dict[str, Any], command: Sequence[str]
) -> Path:
    charts = Charts()
    peers = PEERS if facts["model"] == MODEL else ()  # beside another network their bars would mislead
    figures = [
        charts.bars("time", "Time of a step / float32", _bars(rows, "time", peers)),
        charts.bars("saved", "Bytes saved for backward / float32", _bars(rows, "saved", peers)),
        charts.bars("peak", "Peak memory of a step / float32", [Bar(row.name, row.peak) for row in rows]),
    ]
    measured = table(
        [
            Column(key, heading or "step", numeric=key not in ("name", "quartiles"), form=FORMS.get(key, ".3f"))
            for heading, key in COLUMNS.items()
        ],
        [_shown(row) for row in rows],
        MEANING,
        sortable=True,
    )
    literature = table(
        [Column("name", "implementation", numeric=False), Column("time", "time"), Column("saved", "saved"),
         Column("source", "source", numeric=False, wide=True)],
        [asdict(peer) for peer in PEERS],
        f"Not measured here: {CONDITIONS}",
    )  # fmt: skip
    sections = [
        "<p>Filled bars were measured together, in turns, with a whisker from quartile to quartile. "
        + "Outlined bars are literature: other implementations, measured elsewhere." * bool(peers)
        + "</p>",
        f'<div class="even">{"".join(figures)}</div>',
        f"<h2>Measured</h2>{measured}<h2>Literature</h2>{literature}",
        facts_table(facts | {"command": shlex.join(command)}),
    ]
    return write_bench_page(path, title, subtitle, sections, charts)


def _bars(rows: Sequence["Row"], key: str, peers: Sequence[Published]) -> list[Bar]:
    measured = [
        Bar(row.name, row.time, row.time_low, row.time_high) if key == "time" else Bar(row.name, row.saved)
        for row in rows
    ]
    known = {peer.name: getattr(peer, key) for peer in peers}
    return measured + [Bar(name, value, foreign=True) for name, value in known.items() if value is not None]
