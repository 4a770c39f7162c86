"""The results table: what runs reached, how far from float, and what they cost; mean and standard deviation over seeds.

    python -m runner report outputs                        the table, as Markdown
    python -m runner report outputs --format csv           one row a run: small enough to keep under outputs/published/
    python -m runner report outputs/published/FILE.csv     the same table from such rows

A difference to float is paired by seed, with a 95 % confidence interval (Student's t) from three seeds on. No torch here.
"""

import csv
import io
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from runner.faults import ConfigError, Fault
from runner.pages.records import find_runs

ROW = (
    "model", "dataset", "quant", "settings", "seed", "epochs", "test_top1", "best_val_top1", "train_seconds", "images_per_s",
    "saved_bytes_per_sample", "peak_memory_bytes", "float_bytes", "packed_bytes", "cpu", "threads", "torch", "code", "command",
)  # fmt: skip
NUMBERS = {
    "test_top1",
    "best_val_top1",
    "train_seconds",
    "images_per_s",
    "saved_bytes_per_sample",
    "float_bytes",
    "packed_bytes",
}
HEADINGS = (
    "network", "data", "quantizer", "epochs", "n", "test accuracy, %", "minus float, points",
    "saved for backward, KiB an image", "packed, KiB", "training, s an epoch",
)  # fmt: skip
Row = dict[str, Any]


def collect(paths: Iterable[Path]) -> list[Row]:
    """One row a finished run: from run folders, or from CSV files that hold such rows already."""
    rows: list[Row] = []
    for path in paths:
        if path.is_file():
            rows += [_numbers(row) for row in csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))]
        else:
            rows += [row for folder in find_runs(path) if (row := _row(folder)) is not None]
    rows = list(
        {(*_configuration(row), row["seed"]): row for row in rows}.values()
    )  # a configuration counts once a seed
    return sorted(
        rows,
        key=lambda row: (
            row["dataset"],
            row["model"],
            row["quant"] != "none",
            row["quant"],
            row["settings"],
            row["seed"],
        ),
    )


def _row(folder: Path) -> Row | None:
    try:
        summary = json.loads((folder / "summary.json").read_bytes())
        environment = summary["environment"]
        words = [
            word
            for word in summary["command"]
            if word.startswith(("quant.", "regularizer", "classifier", "trainer.ema"))
        ]
        facts = {key: environment[key] for key in ("cpu", "threads", "torch", "code")}
        own = {key: summary[key] for key in ROW if key in summary and key != "command"}
        return own | facts | {"settings": " ".join(sorted(words)), "command": _public(summary["command"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _public(command: Sequence[str]) -> str:
    """The command without what only says where things lay on somebody's machine."""
    return " ".join(word for word in command if not word.startswith(("outputs=", "dataset.root=", "name=")))


def _numbers(row: dict[str, str]) -> Row:
    return {key: float(value) if key in NUMBERS and value else value for key, value in row.items()} | {
        "seed": int(row["seed"])
    }


def _configuration(row: Row) -> tuple[Any, ...]:
    return row["model"], row["dataset"], int(row["epochs"]), row["quant"], row["settings"]


def as_csv(rows: Iterable[Row]) -> str:
    """The rows as they are."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ROW, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(rows: Sequence[Row]) -> str:
    """One line a configuration."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(_configuration(row), []).append(row)
    floats = {key[:3]: group for key, group in groups.items() if key[3] == "none"}
    table = [list(_cells(key, group, floats.get(key[:3], []))) for key, group in groups.items()]
    filled = [index for index in range(len(HEADINGS)) if any(line[index] for line in table)]
    lines = [[line[index] for index in filled] for line in [list(HEADINGS), ["---"] * len(HEADINGS), *table]]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _cells(key: tuple[Any, ...], group: list[Row], floats: list[Row]) -> Iterable[str]:
    model, dataset, epochs, quant, settings = key
    yield from (str(model), str(dataset), " ".join(filter(None, [f"{quant}", settings])), str(epochs), str(len(group)))
    yield _spread([row["test_top1"] for row in group])
    yield "" if quant == "none" else _difference(group, floats)
    yield _mean(group, "saved_bytes_per_sample", 1024, "{:.1f}")
    yield _mean(group, "packed_bytes", 1024, "{:,.0f}")
    yield _mean(group, "train_seconds", int(epochs), "{:.1f}")


def _mean(group: list[Row], key: str, unit: int, form: str) -> str:
    """Nothing where a run has no such figure."""
    if any(row[key] in (None, "") for row in group):
        return ""
    return form.format(sum(float(row[key]) for row in group) / len(group) / unit)


def _spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation (n - 1); the mean alone for a single run."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.2f} (one run)"
    return f"{mean:.2f} ± {_deviation(values):.2f}"


def _deviation(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return float((sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5)


def _difference(group: list[Row], floats: list[Row]) -> str:
    """Mean of the differences over the seeds that both have, and its 95 % interval."""
    reached = {row["seed"]: row["test_top1"] for row in floats}
    gaps = [row["test_top1"] - reached[row["seed"]] for row in group if row["seed"] in reached]
    if not gaps:
        return "no float run"
    mean = sum(gaps) / len(gaps)
    if len(gaps) < 3:
        return f"{mean:+.2f}"  # an interval from two differences says nothing
    from scipy.stats import t

    half = float(t.ppf(0.975, len(gaps) - 1)) * _deviation(gaps) / len(gaps) ** 0.5
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def report(words: Sequence[str]) -> int:
    """The verb."""
    kind, paths = "md", []
    pending = iter(words)
    for word in pending:
        if word == "--format":
            kind = next(pending, "")
        else:
            paths.append(Path(word))
    if kind not in {"md", "csv"}:
        raise ConfigError([Fault("--format", f"{kind!r} is not accepted: md, csv")])
    lost = [Fault(str(path), "is not there") for path in paths if not path.exists()]
    if lost:
        raise ConfigError(lost)
    rows = collect(paths or [Path("outputs")])
    if not rows:
        raise ConfigError([Fault("", f"no finished run in {', '.join(map(str, paths)) or 'outputs'}")])
    sys.stdout.write(as_csv(rows) if kind == "csv" else as_markdown(rows))
    return 0
