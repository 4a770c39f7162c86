"""README.md, written by `python -m tests.torture.coverage`: the figures of the last long round, the levels, the table of faults.

The last column of faults.csv holds `file::test` and `level NAME` (of this harness), or `not: why` where nothing covers a fault.
"""

import ast
import csv
import json
from pathlib import Path
from typing import Any

from tests.torture.levels import LEVELS

HERE = Path(__file__).resolve().parent


def table() -> list[list[str]]:
    """The rows of faults.csv without its header."""
    with (HERE / "faults.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))[1:]


def unknown() -> list[str]:
    """Tests and levels that the table names and that are not there."""
    named = {name for *_, tests in table() if not tests.startswith("not: ") for name in tests.split(", ")}
    return sorted(named - {f"level {level.name}" for level in LEVELS} - _tests())


def _tests() -> set[str]:
    found: set[str] = set()
    for path in HERE.parent.glob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = (node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
        found |= {f"{path.stem.removeprefix('test_')}::{name}" for name in functions}
    return found


def page() -> str:
    """README.md, whole."""
    figures = json.loads((HERE / "figures.json").read_text(encoding="utf-8"))
    faults = [[row, fault, follows, _cell(tests)] for row, fault, follows, tests in table()]
    levels = [[f"`{level.name}`", _first_line(level.run), _count(level.short), _count(level.long)] for level in LEVELS]
    header = ["what was done", "how often", "what came of it", "commit", "date"]
    sections = [
        (HERE / "intro.md").read_text(encoding="utf-8").rstrip(),
        f"## Figures\n\n{_round(figures)}\n\n{_rows(header, findings(figures))}",
        f"## Levels\n\n{_rows(['level', 'what it does', 'short round', 'long round'], levels)}",
        f"## Faults\n\n{_rows(['', 'what happens', 'what must follow', 'covered by'], faults)}",
    ]
    return "\n\n".join(sections) + "\n"


def _round(figures: dict[str, Any]) -> str:
    minutes = sum(found.get("processor_seconds", 0) for found in figures.values()) / 60
    skipped = [name for name, found in figures.items() if "skipped" in found]
    left_out = f" Not run there: {', '.join(skipped)}." if skipped else ""
    return f"Long rounds: {minutes:,.0f} minutes of one processor in all.{left_out}"


def findings(figures: dict[str, Any]) -> list[list[str]]:
    """What was done, how often, and what came of it: a row for each level that ran."""
    rows = [
        ("kills", "random SIGKILLs", "kills", "{identical:,} of {runs:,} runs end with the bytes of one left alone; CSV rows "
         "lost {rows_lost}, repeated {rows_repeated}, torn {rows_torn}"),
        ("sweep_kills", "SIGKILL for the parent of a sweep of four jobs, three to a sweep", "kills",
         "{identical:,} of {sweeps:,} sweeps end with every job done once, all files as of one left alone"),
        ("syscall_kills", "SIGKILL at a system call that touches the run folder, each in turn", "points", "{bad} bad"),
        ("syscall_errors", "an error at a system call that touches the run folder, each in turn", "points",
         "{bad} bad, no false 'done'"),
        ("power_cuts", "power cuts of an ext4 disk", "cuts", "{identical:,} identical; {lost_commits} commits lost"),
        ("command_lines", "signals to real command lines", "lines",
         "{identical:,} of {runs:,} runs identical; {stops_saved} of {stops_asked} stops saved"),
        ("mutants", "mutated checkpoints and weights", "mutants", "{refused:,} refused, {same:,} equal to the original, "
         "accepted silently: {bad}"),
        ("malicious", "malicious checkpoints, each under six names", "files", "{executed} ran their code"),
        ("configs", "configs drawn by Hypothesis", "configs", "{bad} tracebacks or runs that end oddly; {refused:,} refused"),
        ("ablation", "parts of the state left out in turn", "parts", "{seen} noticed"),
        ("control_kills", "control: kills over naive storage (must fail)", "kills", "{failed} of {runs} runs fail"),
        ("control_power", "control: power cuts without fsync (must lose)", "cuts", "{lost_commits} commits lost"),
        ("cost", "checkpoints of ResNet-18 with SGD, {megabytes} MB", "saves", "{seconds_to_save} s each (median; CSV, SHA-256 "
         "and fsync included); {share_of_time} % of the time by default; looking for NaN takes {share_of_step} % of a step"),
    ]  # fmt: skip
    return [
        [
            what.format(**figures[level]),
            f"{figures[level][count]:,}",
            said.format(**figures[level] | {"bad": len(figures[level]["bad"])}),
            f"`{figures[level]['commit']}`",
            figures[level]["date"][:10],
        ]
        for level, what, count, said in rows
        if "skipped" not in figures.get(level, {"skipped": ""})
    ]


def _rows(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _count(size: int | None) -> str:
    return "none" if size is None else f"{size:,}" if size else "all"


def _first_line(function: object) -> str:
    return (function.__doc__ or "").splitlines()[0]


def _cell(tests: str) -> str:
    if tests.startswith("not: "):
        return f"not covered, because {tests.removeprefix('not: ')}"
    return ", ".join(f"`{test}`" for test in tests.split(", "))


if __name__ == "__main__":
    (HERE / "README.md").write_text(page(), encoding="utf-8")
