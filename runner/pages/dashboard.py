"""The page of one run: what it reached, how it got there, what it cost, and how to repeat it."""

import shlex
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd

from runner.columns import LAYERS
from runner.pages.curves import curve_section, health_section, last_health, timeline_section
from runner.pages.figures import Sheet
from runner.pages.headlines import headlines
from runner.pages.page import NOTHING, Column, number, page, plain, table, text, write_page
from runner.pages.records import Run, read_run
from runner.pages.settings import flatten, shown, usual_settings

MOST_TABLE_ROWS = 500
STATES = {"done": "✓", "running": "…", "preempted": "‖", "interrupted": "‖", "failed": "✕", "diverged": "✕"}

METRIC_COLUMNS = (
    Column("epoch", "epoch"),
    Column("step", "step"),
    Column("phase", "phase"),
    Column("lr", "learning rate"),
    Column("batch_size", "batch size"),
    Column("input_size", "input size (px)"),
    Column("train_loss", "train loss"),
    Column("train_top1", "train top-1 (%)"),
    Column("val_loss", "val loss"),
    Column("val_top1", "val top-1 (%)"),
    Column("val_top5", "val top-5 (%)"),
    Column("seconds", "time (s)"),
    Column("images_per_s", "images/s"),
)
SKIPPED_STEPS = Column("skipped_steps", "skipped steps")  # where there are any
LAYER_COLUMNS = (
    Column("layer", "layer", numeric=False),
    Column("kind", "kind", numeric=False),
    Column("becomes", "becomes", numeric=False),
    Column("weight_bits", "weight bits"),
    Column("act_bits", "activation bits"),
    Column("grad_bits", "gradient bits"),
    Column("parameters", "parameters"),
    Column("macs", "MACs"),
    Column("why", "why", numeric=False, wide=True),
)


def write_dashboard(folder: Path, defaults: Mapping[str, object] | None = None) -> Path:
    """Write `dashboard.html` into a run folder and return its path; a broken folder gets a page that says so.

    `defaults` are the values of all keys without any choice of the user's; asked for where they are not given.
    Raises StorageError where the page cannot be written.
    """
    run = read_run(folder)
    body, sheet = run_body(run, defaults)
    return write_page(run.folder / "dashboard.html", page(run.name, body, sheet.embed()))


def run_body(run: Run, defaults: Mapping[str, object] | None = None) -> tuple[str, Sheet]:
    """Everything between <body> and the scripts, and the sheet that describes the figures; parts are marked for live pages."""
    curves, health, sheet = run_charts(run)
    part = {name: f'<div data-part="{name}">{html}</div>' for name, html in run_parts(run, defaults).items()}
    body = (
        f"{part['header']}<main>{part['problems']}{part['headlines']}{curves}{part['epochs']}{health}{part['health']}"
        f"{part['layers']}{part['settings']}</main>"
        f"<footer>{text(run.folder.name)}. Drawn from the CSV files beside this page.</footer>"
    )
    return body, sheet


def run_charts(run: Run) -> tuple[str, str, Sheet]:
    """The curves and the maps of health as HTML, and the sheet that describes them."""
    curves, sheet = curve_section(run)
    return curves, health_section(run, sheet), sheet


def run_parts(run: Run, defaults: Mapping[str, object] | None = None) -> dict[str, str]:
    """What a run page says beside its charts, part by part."""
    return {
        "header": _header(run),
        "problems": _problems(run),
        "headlines": headlines(run),
        "epochs": _metrics_table(run),
        "health": last_health(run),
        "layers": _layers(run),
        "settings": _settings(run, usual_settings(flatten(run.config)) if defaults is None else defaults),
    }


def write_timeline(rows: list[dict[str, object]], end: Mapping[str, float], path: Path, title: str) -> Path:
    """Draw a regime before any training: what holds from each point (epoch, step) of the rows on, up to the end."""
    curves, figures = timeline_section(pd.DataFrame(rows), end)
    body = f"<header><h1>{text(title)}</h1><p>The regime as it will run; nothing was trained.</p></header>"
    known = [key for key in (rows or [{}])[0] if any(row[key] not in (None, "") for row in rows)]
    columns = [
        Column(key, key.replace("_", " "), key != "optimizer", form=".5g" if key == "epoch" else "") for key in known
    ]
    numbers = (
        f"<h2>Points</h2>{table(columns, _thinned(rows), 'The regime, point by point', tall=True)}" if rows else ""
    )
    return write_page(path, page(title, f"{body}<main>{curves}{numbers}</main>", figures.embed()))


def _header(run: Run) -> str:
    summary, status = run.summary, run.status
    names = [_named(run, group) for group in ("model", "quant", "dataset")]
    seed = summary.get("seed", run.config.get("seed"))
    facts = [*filter(None, names), *([f"seed {seed}"] if seed is not None else [])]
    state = run.state if run.state in STATES else "unknown"
    mark = f'<span aria-hidden="true">{STATES.get(state, "?")}</span> '
    done = run.metrics["epoch"].max() + 1 if len(run.metrics) else status.get("epoch")
    reached = number(summary.get("epochs", done))
    planned = number(status.get("epochs"))
    epochs = (
        f"{plain(reached)} epoch{'s' * (reached != 1)}"
        if state == "done"
        else f"epoch {plain(reached)} of {plain(planned)}"
    )
    when = f", {text(_moment(status['updated']))}" if "updated" in status else ""
    return (
        f"<header><h1>{text(run.name)}</h1><p>{text(' · '.join(map(str, facts)))}</p>"
        f'<p class="small"><span class="state state-{state}">{mark}{state}</span>'
        f'<span class="quiet">{", " + text(epochs) if reached is not None else ""}{when}</span></p></header>'
    )


def _moment(value: object) -> str:
    """A time stamp to the minute, or whatever stands in its place.

    >>> _moment("2026-11-20T17:03:12+00:00"), _moment("noon")
    ('2026-11-20 17:03 UTC', 'noon')
    """
    try:
        moment = datetime.fromisoformat(str(value))
    except ValueError:
        return str(value)
    return f"{moment:%Y-%m-%d %H:%M} {moment.tzname() or ''}".strip()


def _named(run: Run, group: str) -> str:
    value = run.summary.get(group) or flatten(run.config).get(f"{group}.name")
    return str(value or "")


def _problems(run: Run) -> str:
    """What is wrong with the run or its folder; summary.json is expected of a finished run only."""
    problems = [str(run.status["reason"])] if run.status.get("reason") else []
    problems += [p for p in run.problems if run.state in ("done", "unknown") or p != "summary.json is missing"]
    if not problems:
        return ""
    items = "".join(f"<li>{text(problem)}</li>" for problem in problems)
    return f'<div class="notice" role="note"><strong>To know about this run</strong><ul>{items}</ul></div>'


def _metrics_table(run: Run) -> str:
    if not len(run.metrics):
        return ""
    timing = run.timing[["epoch", "seconds", "images_per_s"]].drop_duplicates("epoch", keep="last")
    rows = _rows(run.metrics.merge(timing, on="epoch", how="left"))
    caption = "Every epoch" if len(rows) <= MOST_TABLE_ROWS else f"{MOST_TABLE_ROWS} of {len(rows)} epochs"
    skipped = [SKIPPED_STEPS] if run.metrics["skipped_steps"].fillna(0).any() else []
    columns = [*METRIC_COLUMNS, *skipped]
    numbers = table(columns, _thinned(rows), f"{caption}, as in metrics.csv and timing.csv", tall=True)
    return f"<details><summary>The same numbers as a table</summary>{numbers}</details>"


def _layers(run: Run) -> str:
    if not len(run.layers):
        return ""
    known = [column for column in LAYER_COLUMNS if column.key in LAYERS]
    caption = f"{len(run.layers)} layers; 32 bits means float; a click on a heading sorts"
    layers = table(known, _rows(run.layers), caption, sortable=True, tall=True)
    return f"<h2>Layers</h2>{layers}"


def _settings(run: Run, defaults: Mapping[str, object]) -> str:
    known = run.status | run.summary
    environment = known.get("environment")
    facts = flatten(environment if isinstance(environment, dict) else {})
    facts |= {key: known[key] for key in ("config_hash", "host", "pid") if key in known}
    pairs = (Column("key", "key", numeric=False), Column("value", "value", numeric=False, wide=True))
    rows: list[dict[str, object]] = [{"key": key, "value": shown(value)} for key, value in facts.items()]
    surroundings = table(pairs, rows, "What the numbers were measured on") if rows else "<p>Not recorded.</p>"
    return (
        f'{_command(run)}<div class="columns"><section><h2>Config</h2>{_config(run, defaults)}</section>'
        f"<section><h2>Environment</h2>{surroundings}</section></div>"
    )


def _command(run: Run) -> str:
    command = (run.status | run.summary).get("command")
    if not command:
        return ""
    line = shlex.join(map(str, command)) if isinstance(command, list) else str(command)
    return (
        f'<h2>Repeat this run</h2><div class="command"><pre id="command"><code>{text(line)}</code></pre>'
        f'<button type="button" data-copy="command">Copy</button></div>'
    )


def _config(run: Run, defaults: Mapping[str, object]) -> str:
    config = flatten(run.config)
    columns = (
        Column("key", "key", numeric=False, wide=True),
        Column("value", "value", numeric=False, wide=True),
        Column("default", "default", numeric=False, wide=True),
    )
    rows: list[dict[str, object]] = [{"key": key, "value": shown(value)} for key, value in config.items()]
    if not rows:
        return "<p>Not recorded.</p>"
    everything = table(columns[:2], rows, f"All {len(rows)} keys, as in config.yaml", tall=True)
    usual = flatten(defaults)
    changed: list[dict[str, object]] = [
        {"key": key, "value": shown(value), "default": shown(usual[key]) if key in usual else NOTHING}
        for key, value in config.items()
        if key not in usual or usual[key] != value
    ]
    differences = table(columns, changed, f"{len(changed)} of {len(rows)} keys differ from the defaults")
    return f"{differences}<details><summary>All keys</summary>{everything}</details>"


def _rows(frame: pd.DataFrame) -> list[dict[str, object]]:
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def _thinned(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MOST_TABLE_ROWS)).astype(int))
    return [rows[index] for index in chosen]
