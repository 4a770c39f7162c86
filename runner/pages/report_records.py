"""What benchmarks and `verify` left, and the table of each: from JSON in outputs/bench, or from CSV files that were kept."""

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from runner.columns import SCAN
from runner.pages.svg import figure

# by what a CSV file is known
KINDS = {
    "scan": set(SCAN),
    "conv": {"figure", "kernel_speedup", "limit_rate"},
    "step": {"time_low", "saved", "peak"},
    "peers": {"rate", "ours_over_it"},
    "network": {"batch", "packed, ms", "times float32"},
    "layers": {"packed, us", "float32, us"},
    "scaling": {"what", "turn", "one", "two", "ratio"},
}
Record = dict[str, Any]  # kind, name, rows, and facts where they are known


@dataclass
class Table:
    """Headings and rows of texts."""

    caption: str
    headings: Sequence[str]
    rows: list[list[str]]


def bench_records(folders: Sequence[Path]) -> Iterable[Record]:
    """What `bench conv` and `bench step` left, as far as it can be read."""
    for path in sorted(path for folder in folders for path in folder.glob("*.json")):
        kind = path.name.partition("-")[0]
        try:
            record = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        if kind in ("conv", "step") and isinstance(record, dict) and record.get("rows"):
            yield {**record, "kind": kind, "name": path.stem}


def record_of(path: Path) -> Record | None:
    """The rows of a CSV file by one of `KINDS`; None for another file."""
    table = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8", errors="replace")))
    columns = set(table.fieldnames or ())
    kind = next((kind for kind, needed in KINDS.items() if needed <= columns), None)
    rows = [{key: _number(value) for key, value in row.items()} for row in table] if kind else []
    return {"kind": kind, "name": path.stem, "rows": rows} if rows else None


def _number(value: str) -> float | str:
    try:
        return float(value)
    except (ValueError, TypeError):
        return value


def record_tables(record: Record) -> Iterable[Table]:
    """What stands in a page: one table a benchmark, one a figure of scans."""
    rows, name = record["rows"], record["name"]
    if record["kind"] == "scan":
        yield from (_scan_table(name, points) for name, points in scan_figures(rows).items())
    elif record["kind"] == "step":
        headings = ["a training step with", "time", "saved for backward", "peak of tensors"]
        lines = [[r["name"], _spread(r, "time", 2), f"{r['saved']:.3f}", f"{r['peak']:.2f}"] for r in rows]
        yield Table(name, headings, lines)
    elif record["kind"] == "peers":
        headings = ["kernel", "shape", "GMAC/s", "this kernel, GMAC/s", "faster by"]
        lines = [
            [r["name"], r["shape"], f"{r['rate']:.0f}", f"{r['ours']:.0f}", f"{r['ours_over_it']:.1f}"] for r in rows
        ]
        yield Table(name, headings, lines)
    elif record["kind"] == "network":
        headings = ["images", "float32, ms", "packed, ms", "times float32", "quartiles", "times the faster float32"]
        yield Table(name, headings, [[f"{r['batch']:.0f}", *(str(r[key]) for key in headings[1:])] for r in rows])
    elif record["kind"] == "scaling":
        headings = ["what", "turns", "alone or one by one", "two at once", "ratio, median [least, most]"]
        yield Table(name, headings, [_scaling_line(what, rows) for what in dict.fromkeys(row["what"] for row in rows)])
    elif quoted := [row for row in rows if record["kind"] == "conv" and row["figure"] == "quoted"]:
        yield _conv_table(name, quoted)


def _scaling_line(what: str, rows: Sequence[Record]) -> list[str]:
    turns = [row for row in rows if row["what"] == what]
    one, two = (f"{median(row[key] for row in turns):.1f}" for key in ("one", "two"))
    ratios = sorted(row["ratio"] for row in turns)
    return [what, str(len(turns)), one, two, f"{median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"]


def scan_figures(rows: Sequence[Record]) -> dict[str, list[Record]]:
    """The points of a file of scans, figure by figure; a row that is no point, as the last of a torn file, is left out."""
    figures: dict[str, list[Record]] = {}
    for row in rows:
        if all(isinstance(row[axis], float) and math.isfinite(row[axis]) for axis in "xy"):
            figures.setdefault(f"{row['quant']}-{row['figure']}", []).append(row)
    return figures


def _scan_table(name: str, points: Sequence[Record]) -> Table:
    """A line for each x of the first series; the others may have their own, which then stands beside their y."""
    labels = list(dict.fromkeys(point["series"] for point in points))
    by = {(point["series"], point["x"]): figure(point["y"]) for point in points}
    places = list(dict.fromkeys(point["x"] for point in points))
    lines = [[figure(x), *(by.get((label, x), "") for label in labels)] for x in places]
    return Table(name, [points[0]["x_label"], *labels], lines)


def _conv_table(name: str, rows: Sequence[Record]) -> Table:
    headings = [
        "path", "batch", "layout", "limit, GMAC/s", "machine code alone, GMAC/s", "of the limit", "faster than float32",
        "called from Python", "float32 in and out, alpha", "alpha and K",
    ]  # fmt: skip
    lines = [
        [
            r["path"], f"{r['batch']:.0f}", r["layout"], f"{r['limit_rate']:.0f}", f"{r['kernel_rate']:.0f}",
            f"{100 * r['share_of_limit']:.0f} %", _spread(r, "kernel", 1, "_speedup"), f"{r['call_speedup']:.1f}",
            _spread(r, "alpha", 1, "_speedup"), f"{r['alpha_k_speedup']:.1f}",
        ]
        for r in rows
    ]  # fmt: skip
    return Table(name, headings, lines)


def _spread(row: Record, key: str, digits: int, ending: str = "") -> str:
    """A median with its quartiles."""
    value, low, high = (f"{row[name]:.{digits}f}" for name in (f"{key}{ending}", f"{key}_low", f"{key}_high"))
    return f"{value} [{low}, {high}]"
