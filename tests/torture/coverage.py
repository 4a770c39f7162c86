"""What can go wrong, and the test that does it for real: README.md, written by `python -m tests.torture.coverage`.

The last column of faults.csv holds `file::test` and `level NAME` (of this harness), or `not: why` where nothing covers a fault.
"""

import ast
import csv
from pathlib import Path

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
    lines = [f"| {row} | {fault} | {follows} | {_cell(tests)} |" for row, fault, follows, tests in table()]
    levels = [
        f"| `{level.name}` | {_first_line(level.run)} | {_count(level.short)} | {_count(level.long)} |"
        for level in LEVELS
    ]
    intro = (HERE / "intro.md").read_text(encoding="utf-8")
    return "\n".join(
        [
            intro.rstrip(),
            "\n## Levels\n\n| level | what it does | short round | long round |\n|---|---|---:|---:|",
            *levels,
            "\n## Faults\n\n| | what happens | what must follow | covered by |\n|---|---|---|---|",
            *lines,
            "",
        ]
    )


def _count(size: int) -> str:
    return f"{size:,}" if size else "all"


def _first_line(function: object) -> str:
    return (function.__doc__ or "").splitlines()[0]


def _cell(tests: str) -> str:
    if tests.startswith("not: "):
        return f"not covered, because {tests.removeprefix('not: ')}"
    return ", ".join(f"`{test}`" for test in tests.split(", "))


if __name__ == "__main__":
    (HERE / "README.md").write_text(page(), encoding="utf-8")
