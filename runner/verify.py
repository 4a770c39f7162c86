"""`verify`: the proofs of every quantizer as one table, on screen, as CSV and as Markdown, with the points of figures beside.

    python -m runner verify              every method
    python -m runner verify quant=lsq    one of them

Exit code 1 where a deviation has no name. outputs=DIR says where the files go.
"""

import csv
import importlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.catalog import catalog
from runner.columns import SCAN
from runner.compose import config_from, keys_of, split_options
from runner.faults import Exit
from runner.files import write_atomic
from runner.screen import Screen

if TYPE_CHECKING:
    from quant.proofs.scans import Scan

COLUMNS = {
    "method": "method",
    "what": "what",
    "compared with": "against",
    "deviation": "deviation",
    "unexplained": "unexplained",
    "verdict": "verdict",
}


def verify(words: Sequence[str]) -> int:
    """Prove `quant=NAME`, or every quantizer, those of `plugins=[…]` included; 1 where anything deviates without a name."""
    overrides, config_dirs = split_options(words)
    config = config_from(overrides, config_dirs)
    names = sorted(catalog(tuple(config.plugins))["quant"])
    if "quant" in keys_of(overrides):
        names = [config.quant.name]
    for plugin in config.plugins:
        importlib.import_module(plugin)
    from quant.proofs import verify as verdicts
    from quant.proofs.scans import scans

    folder, screen = Path(config.outputs), Screen("plain")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [asdict(verdict) | {"holds": verdict.holds} for verdict in verdicts(names)]
    write_atomic(folder / "verify.csv", as_csv(rows).encode(), durable=False)
    write_atomic(folder / "verify.md", as_markdown(rows).encode(), durable=False)
    shown = [[_rounded(row[key]) for key in COLUMNS.values()] for row in rows]
    screen.table("Largest deviations, in units of the largest value compared with", list(COLUMNS), shown)
    wrong = [row for row in rows if not row["holds"]]
    proved = [row for row in rows if row["holds"] and row["deviation"] is not None]
    if points := [point for scan in scans(names) for point in points_of(scan)]:
        write_atomic(folder / "scans.csv", as_csv(points).encode(), durable=False)
    screen.say(f"{len(proved)} claims hold, {len(wrong)} deviate: {(folder / 'verify.csv').resolve()}")
    return int(Exit.JOB_FAILED if wrong else Exit.DONE)


def points_of(scan: "Scan") -> Iterable[dict[str, Any]]:
    """A row a point, with all that a chart needs; `report` draws them."""
    about = {key: value for key, value in vars(scan).items() if key in SCAN}
    for label, line in scan.lines.items():
        for x, y in line:
            yield about | {"series": label, "x": f"{x:.6g}", "y": f"{y:.4g}"}


def as_csv(rows: Iterable[dict[str, Any]]) -> str:
    """Every column, every digit."""
    text, rows = io.StringIO(), list(rows)
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(rows: Iterable[dict[str, Any]]) -> str:
    """The table of quant/README.md. What lies within a claim's tolerance is shown as that: every machine writes the same."""
    lines = ["| method | what | compared with | deviation | verdict |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [
            row["method"],
            row["what"],
            row["against"],
            _within(row["deviation"], row["tolerance"]),
            row["verdict"],
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _within(deviation: float | None, tolerance: float) -> str:
    if deviation is None:
        return ""
    return f"≤ {tolerance:.0e}" if deviation <= tolerance else f"{deviation:.2g}"


def _rounded(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, float) else "" if value is None else str(value)
