"""Reading run folders: whatever state a crash left them in, never an exception and never a wrong number.

A run is a folder of small files (config.yaml, metrics.csv, ..., summary.json). A reader may come while a row
is being written, or after a power cut that left half a row or a tail of NUL bytes. What cannot be read is
left out and named in `Run.problems`.
"""

import csv
import json
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from runner.columns import EXPECTED, HEALTH, LAYERS, METRICS, TIMING
from runner.files import NO_FOLLOW, still_true

if TYPE_CHECKING:
    import pandas as pd

RUN_FILES = frozenset({"metrics.csv", "timing.csv", "layers.csv", "quant.csv", "summary.json", "status.json"})
TEXT_COLUMNS = frozenset({"phase", "layer", "kind", "becomes", "why"})
LARGEST_FILE = 256 * 2**20
DEEPEST_FOLDER = 8
BEHIND_A_LINK = 2  # levels: enough for outputs/ or outputs/runs/ on another disk, too few to walk through that disk
DEEPEST_YAML = 50
OPENING = (
    yaml.BlockMappingStartToken, yaml.BlockSequenceStartToken, yaml.FlowMappingStartToken, yaml.FlowSequenceStartToken,
)  # fmt: skip
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, ten times as fast, where libyaml is
CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


@dataclass
class Run:
    """Everything a run folder says, with empty tables and mappings where it says nothing."""

    folder: Path
    config: dict[str, object]
    metrics: "pd.DataFrame"
    timing: "pd.DataFrame"
    layers: "pd.DataFrame"
    quant: "pd.DataFrame"
    expected: "pd.DataFrame"
    summary: dict[str, object]
    status: dict[str, object]
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name somebody gave the run, else that of its folder."""
        return str(self.summary.get("name") or self.config.get("name") or self.folder.name)

    @property
    def state(self) -> str:
        """running, done, preempted, interrupted, failed, diverged; 'unknown' where the folder does not say.

        The summary is written when the training is over; its page is drawn a moment before the status says so.
        """
        state = str(self.status.get("state", "unknown"))
        return "done" if self.summary and state in ("running", "unknown") else state


@dataclass
class GrownTable:
    """The finished rows of a CSV file as far as it was read: the next time only what came after is read."""

    header: list[str]
    rows: "pd.DataFrame"
    seen: int = 0  # finished lines below the header, broken ones too
    end: int = 0  # behind the last of them
    last: bytes = b""  # the last of them: where it stands no more, the file is another one


Memory = dict[str, GrownTable]  # what a reader keeps of the tables of one run, by the names of their files


def read_run(folder: Path, *, health: bool = True, memory: Memory | None = None) -> Run:
    """Read one run folder; files that are missing or broken are named in `problems`.

    `health`: also quant.csv, which is the largest of them and in which a list of runs has no interest.
    `memory`: given again and again, it spares a reader who follows a run the rows that were read before.
    """
    problems: list[str] = []
    folder = Path(folder)
    table = partial(_table, folder, problems=problems, memory={} if memory is None else memory)
    config, metrics = _mapping(folder / "config.yaml", _load_yaml, problems), table("metrics.csv", METRICS)
    run = Run(
        folder=folder,
        config=config,
        metrics=metrics,
        timing=table("timing.csv", TIMING),
        layers=table("layers.csv", LAYERS),
        quant=table("quant.csv", HEALTH, optional=True) if health else _empty(HEALTH),
        expected=table("expected.csv", EXPECTED, optional=True),
        summary=_mapping(folder / "summary.json", json.loads, problems),
        status=still_true(folder, _mapping(folder / "status.json", json.loads, problems)),
        problems=problems,
    )
    problems += _lost_epochs(run)
    return run


def _lost_epochs(run: Run) -> list[str]:
    """What a finished run says of epochs that its table no longer has."""
    done, found = run.summary.get("epochs"), run.metrics["epoch"].nunique()
    return [f"metrics.csv has {found} of {done} epochs"] if isinstance(done, int) and found < done else []


def read_brief(folder: Path) -> Run | None:
    """A finished run as its summary tells it, without a table: a fiftieth of the time. None where there is no summary."""
    summary = read_summary(folder)
    if not summary:
        return None
    metrics, timing, layers, quant, expected = map(_empty, (METRICS, TIMING, LAYERS, HEALTH, EXPECTED))
    return Run(folder, {}, metrics, timing, layers, quant, expected, summary, {})


@lru_cache(64)
def _empty(columns: tuple[str, ...]) -> "pd.DataFrame":
    """A table without rows; made once, since of ten thousand runs it is half of the time to read them."""
    return _typed([], list(columns))


def read_metrics(folder: Path) -> "pd.DataFrame":
    """The epochs of a run, and nothing else of it."""
    return _table(folder, "metrics.csv", METRICS, [], {})


def read_summary(folder: Path) -> dict[str, object]:
    """What a finished run says of itself; empty where there is nothing that can be read."""
    return _mapping(folder / "summary.json", json.loads, [])


def read_config(folder: Path) -> dict[str, object]:
    """The config of a run; empty where there is none that can be read."""
    return _mapping(folder / "config.yaml", _load_yaml, [])


def find_runs(root: Path) -> list[Path]:
    """Every run folder at or below `root`, sorted; hidden folders are not looked into, and not far behind links."""
    found: list[Path] = []
    behind_links: list[Path] = []
    pending = [(Path(root), 0)]
    while pending:
        folder, depth = pending.pop()
        subfolders, links, is_run = _look_into(folder)
        if is_run:
            found.append(folder)
        elif depth < DEEPEST_FOLDER:
            pending.extend((subfolder, depth + 1) for subfolder in subfolders)
            pending.extend((link, max(depth + 1, DEEPEST_FOLDER - BEHIND_A_LINK)) for link in links)
            behind_links += links
    if behind_links:  # what is met twice is one run
        found = list({os.path.realpath(folder): folder for folder in sorted(found, reverse=True)}.values())
    return sorted(found)


def _look_into(folder: Path) -> tuple[list[Path], list[Path], bool]:
    """Its subfolders, those that are links, and whether it is a run's."""
    subfolders: list[Path] = []
    links: list[Path] = []
    is_run = False
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                is_run = is_run or entry.name in RUN_FILES
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    subfolders.append(Path(entry.path))
                elif entry.is_symlink() and os.path.isdir(entry.path):
                    links.append(Path(entry.path))
    except OSError:  # vanished or unreadable: nothing to list there
        return [], [], False
    return subfolders, links, is_run


def complete_lines(content: bytes) -> list[str]:
    """The lines a writer has finished.

    Bytes after the last newline may be half a number ('0.4' of '0.4375'), so they do not count; nor does a
    line with a NUL in it, which is what a file system leaves of a write that a crash cut off.

    >>> complete_lines(b"epoch,loss\\n0,0.4375\\n1,0.4")
    ['epoch,loss', '0,0.4375']
    """
    finished = content[: _finished(content)].decode("utf-8", errors="replace")
    return [line for line in finished.split("\n") if line.strip("\r") and "\0" not in line]


def _finished(content: bytes) -> int:
    """Where the last finished line ends."""
    return content.rfind(b"\n") + 1


def _read_bytes(path: Path, start: int = 0) -> bytes:
    """Read a regular file; a planted link, pipe or device raises OSError instead of being opened blindly."""
    descriptor = os.open(path, os.O_RDONLY | NO_FOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        information = os.fstat(descriptor)
        if not stat.S_ISREG(information.st_mode):
            raise OSError("not a regular file")
        if information.st_size > LARGEST_FILE:
            raise OSError(f"larger than {LARGEST_FILE >> 20} MiB")
        file.seek(start)
        return file.read()


def _mapping(path: Path, parse: Callable[[str], object], problems: list[str]) -> dict[str, object]:
    try:
        value = parse(_read_bytes(path).decode("utf-8"))
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
        return {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        problems.append(f"{path.name} cannot be read: {_first_line(error)}")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path.name} holds no mapping")
        return {}
    return {str(key): item for key, item in value.items()}


def _load_yaml(content: str) -> object:
    """YAML without what a config never has and a reader pays dearly for: aliases (a few lines of them can
    expand to more than the memory holds) and nesting without end."""
    depth = 0
    for token in yaml.scan(content, LOADER):
        if isinstance(token, yaml.AliasToken):
            raise ValueError("aliases are not accepted")
        depth += isinstance(token, OPENING) - isinstance(token, CLOSING)
        if depth > DEEPEST_YAML:
            raise ValueError(f"nested deeper than {DEEPEST_YAML} levels")
    return yaml.load(content, LOADER)


def _first_line(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.splitlines() or [type(error).__name__])[0]


def _table(
    folder: Path, name: str, columns: tuple[str, ...], problems: list[str], memory: Memory, *, optional: bool = False
) -> "pd.DataFrame":
    """The finished rows of a CSV file as a table that has at least `columns`."""
    try:
        known = memory[name] = _grown(folder / name, columns, memory.pop(name, None))
    except FileNotFoundError:
        if not optional:
            problems.append(f"{name} is missing")
        return _empty(columns)
    except OSError as error:
        problems.append(f"{name} cannot be read: {_first_line(error)}")
        return _empty(columns)
    if not known.header:
        problems.append(f"{name} has no header")
    elif lost := known.seen - len(known.rows):
        problems.append(f"{name}: {lost} of {known.seen} rows are broken and left out")
    return known.rows


def _grown(path: Path, columns: tuple[str, ...], known: GrownTable | None) -> GrownTable:
    """The table with the lines that came since; read anew where the last line that was known is not in its place."""
    if known is None or not known.header:
        known = GrownTable([], _empty(columns))
    content = _read_bytes(path, known.end - len(known.last))
    if not content.startswith(known.last):
        return _grown(path, columns, None)
    news = content[len(known.last) : _finished(content)]
    if not news:
        return known
    lines = complete_lines(news)
    header, rows = known.header, known.rows
    if not header and lines:
        header = _fields(lines.pop(0))
        rows = _empty(tuple(dict.fromkeys([*header, *columns])))
    whole = [dict(zip(header, row, strict=True)) for row in map(_fields, lines) if len(row) == len(header)]
    return GrownTable(
        header, _joined(rows, _typed(whole, [str(column) for column in rows])), known.seen + len(lines), known.end + len(news),
        news[_finished(news[:-1]) :],
    )  # fmt: skip


def _joined(before: "pd.DataFrame", after: "pd.DataFrame") -> "pd.DataFrame":
    import pandas as pd

    return pd.concat([before, after], ignore_index=True) if len(before) else after


def _fields(line: str) -> list[str]:
    """The fields of one line; read alone, so that a stray quote cannot swallow the lines after it."""
    try:
        return next(csv.reader([line]), [])
    except csv.Error:
        return []


def _typed(rows: list[dict[str, str]], columns: list[str]) -> "pd.DataFrame":
    import numpy as np
    import pandas as pd

    values = {column: [row.get(column, "") for row in rows] for column in columns}
    return pd.DataFrame(
        {
            column: pd.Series(cells, dtype="str")
            if column in TEXT_COLUMNS
            else np.array([_number(cell) for cell in cells], dtype=np.float64)
            for column, cells in values.items()
        }
    )


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")
