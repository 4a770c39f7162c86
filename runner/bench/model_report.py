"""What `bench model` found: tables on screen, CSV, JSON, and a page."""

import csv
import io
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.bench.model import Plan
from runner.bench.page import Bar, Charts, facts_table, write_bench_page
from runner.files import write_atomic, write_json
from runner.pages.page import NOTHING, Column, table, text
from runner.screen import Screen

if TYPE_CHECKING:
    from runner.bench.footprint import Footprint
    from runner.bench.model_contest import Result

RACE = {
    "batch": "batch", "float32, ms": "float", "channels_last, ms": "channels_last", "imitated, ms": "imitated",
    "packed, ms": "packed", "times float32": "speedup", "quartiles": "quartiles", "times the faster float32": "over_best",
    "packed images/s": "images",
}  # fmt: skip
KIND = {
    "kind": "kind",
    "operations": "count",
    "packed, us": "us",
    "share": "share",
    "float32, us": "float",
    "times": "times",
}
LAYER = {
    "layer": "name",
    "kind": "kind",
    "packed, us": "us",
    "share": "share",
    "float32, us": "float",
    "times": "times",
}
MEMORY = {
    "network": "name", "float64": "double", "float32": "float32", "packed": "packed", "file": "on_disk",
    "float32 / packed": "over_float", "float64 / packed": "over_double", "float32 / file": "over_file",
}  # fmt: skip
MEMORY_MEANING = (
    "Bytes of the weights. packed: computed, one bit for a binary weight, 32 for what stays float (first and last layer, "
    "shortcuts, alpha, batch normalisation); file: packed, as exported, where batch normalisation is folded from four numbers a "
    "channel into two. The paper's Fig. 4 a divides by float64."
)


def report(plan: Plan, result: "Result", command: Sequence[str]) -> None:
    """Show the tables and write them into outputs/bench."""
    config, screen = result.config, Screen("plain")
    folder = Path(config.outputs) / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"model-{config.model.name}-{config.quant.name}-threads{plan.threads}"
    title = f"{config.model.name}, {config.quant.name}: packed against float32"
    facts = result.facts
    subtitle = f"{plan.threads} thread(s) of {facts['cpu']}, torch {facts['torch']}, kernel {facts['kernel']}, {plan.turns} turns"
    races, layers, kinds = _races(result), _layers(result), _kinds(result)
    memory = [_memory(row) for row in result.memory]
    story = sentences(result)
    for heading, columns, rows in (
        (f"{title}: {subtitle}", RACE, races),
        ("Where the time goes, batch 1", KIND, kinds),
        ("Memory of the weights, bytes", MEMORY, memory),
    ):
        screen.table(heading, list(columns), [[row[key] for key in columns.values()] for row in rows])
    for sentence in story:
        screen.say(sentence)
    write_atomic(folder / f"{stem}.csv", _csv(RACE, races).encode(), durable=False)
    write_atomic(folder / f"{stem}-layers.csv", _csv(LAYER, layers).encode(), durable=False)
    record = {"command": command, "facts": facts, "story": story, **asdict(result)} | {"config": config.model_dump()}
    write_json(folder / f"{stem}.json", record)
    sections = [
        *(f"<p>{text(sentence)}</p>" for sentence in story),
        f"<h2>Whole network</h2>{_table(RACE, races, 'Medians of turns; quartiles of the ratio')}",
    ]
    charts = Charts()
    sections += _figures(charts, result)
    sections += [
        f"<h2>Where the time goes</h2>{_table(KIND, kinds, 'Batch 1, by kind of operation')}",
        f"<details><summary>Layer by layer</summary>{_table(LAYER, layers, 'Batch 1, medians of walks', tall=True)}</details>",
        f"<h2>Memory</h2><p>{text(MEMORY_MEANING)}</p>{_table(MEMORY, memory, 'Bytes')}",
        facts_table(facts | {"command": shlex.join(command)}),
    ]
    path = write_bench_page(folder / f"{stem}.html", title, subtitle, sections, charts)
    screen.say(f"written: {path.resolve()}, beside it .csv, -layers.csv and .json")


def sentences(result: "Result") -> list[str]:
    """What the numbers say; each comes from them."""
    first, total = result.races[0], sum(layer.packed_us for layer in result.layers)
    binary = sum(layer.packed_us for layer in result.layers if layer.kind.startswith("sign_"))
    floats = sum(layer.packed_us for layer in result.layers if layer.kind in ("conv2d", "linear"))
    mine = result.memory[0]
    disk = f", {mine.float32 / mine.on_disk:.1f} times as a file" if mine.on_disk else ""
    return [
        f"Batch {first.batch}: {first.packed_ms:.2f} ms packed, {first.float_ms:.2f} ms as float32: "
        f"{first.speedup.median:.1f} times as fast, and {first.over_best.median:.1f} times over the faster memory format.",
        f"Layer by layer, binary layers take {binary / total:.0%} of the packed network's time, layers that stay float "
        f"{floats / total:.0%}, and what lies between them {1 - (binary + floats) / total:.0%}.",
        f"The weights shrink {mine.over_float:.1f} times against float32 and {mine.over_double:.1f} times against float64{disk}; "
        f"not 32 and 64, because of what stays float.",
        f"Logits of the packed and of the trained network differ by at most {result.largest_difference:.2g}.",
    ]


def _races(result: "Result") -> list[dict[str, Any]]:
    return [
        {
            "batch": race.batch,
            "float": round(race.float_ms, 3),
            "channels_last": round(race.channels_last_ms, 3),
            "imitated": round(race.imitated_ms, 3),
            "packed": round(race.packed_ms, 3),
            "speedup": round(race.speedup.median, 2),
            "quartiles": f"{race.speedup.low:.2f}-{race.speedup.high:.2f}",
            "over_best": round(race.over_best.median, 2),
            "images": round(race.packed_images_per_s, 1),
        }
        for race in result.races
    ]


def _layers(result: "Result") -> list[dict[str, Any]]:
    total = sum(layer.packed_us for layer in result.layers)
    return [_timed({"name": la.name, "kind": la.kind}, la.packed_us, la.float_us, total) for la in result.layers]


def _kinds(result: "Result") -> list[dict[str, Any]]:
    """Operations of a kind together, the longest first; `times` only where all of them have a float counterpart."""
    groups = defaultdict(list)
    for layer in result.layers:
        groups[layer.kind].append(layer)
    total = sum(layer.packed_us for layer in result.layers)
    rows = []
    for kind, group in sorted(groups.items(), key=lambda item: -sum(layer.packed_us for layer in item[1])):
        floats = [layer.float_us for layer in group if layer.float_us is not None]
        spent = sum(floats) if len(floats) == len(group) else None
        rows.append(_timed({"kind": kind, "count": len(group)}, sum(layer.packed_us for layer in group), spent, total))
    gone = {"kind": "folded into others", "count": NOTHING, "us": 0.0, "share": "0%", "times": NOTHING}
    return [*rows, gone | {"float": round(result.float_only_us, 1)}]


def _timed(row: dict[str, Any], packed: float, floats: float | None, total: float) -> dict[str, Any]:
    row |= {"us": round(packed, 1), "share": f"{packed / total:.1%}"}
    return row | {
        "float": NOTHING if floats is None else round(floats, 1),
        "times": NOTHING if floats is None else round(floats / packed, 1),
    }


def _memory(row: "Footprint") -> dict[str, Any]:
    ratios = {"over_float": round(row.over_float, 1), "over_double": round(row.over_double, 1)}
    over_file = round(row.float32 / row.on_disk, 1) if row.on_disk else NOTHING
    return asdict(row) | ratios | {"over_file": over_file}


def _figures(charts: Charts, result: "Result") -> list[str]:
    longest = sorted(result.layers, key=lambda layer: -layer.packed_us)[:15]
    bars = [Bar(layer.name, layer.packed_us) for layer in longest]
    times = charts.bars("layers", "The longest operations, batch 1 (µs)", bars, line_at=None)
    shrunk = [Bar(row.name, row.over_double) for row in result.memory]
    sizes = charts.bars("memory", "Weights, float64 / packed (Fig. 4 a)", shrunk, line_at=None)
    return [f'<div class="even">{times}{sizes}</div>']


def _table(columns: Mapping[str, str], rows: Sequence[dict[str, Any]], caption: str, *, tall: bool = False) -> str:
    """A column is one of numbers where the first row has a number; CSV files keep to ASCII, pages need not."""
    heads = [
        Column(
            key,
            heading.replace(", us", ", µs"),
            isinstance(rows[0][key], int | float),
            form=_form(heading, rows[0][key]),
        )
        for heading, key in columns.items()
    ]
    return table(heads, rows, caption, sortable=True, tall=tall)


def _form(heading: str, value: object) -> str:
    """As many digits as a measurement has."""
    if heading.startswith("times "):
        return ".2f"
    return ",.3f" if heading.endswith(", ms") else ",.1f" if isinstance(value, float) else ""


def _csv(columns: Mapping[str, str], rows: Sequence[dict[str, Any]]) -> str:
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(["" if row[key] == NOTHING else row[key] for key in columns.values()] for row in rows)
    return lines.getvalue()
