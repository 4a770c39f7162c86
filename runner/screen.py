"""What a person sees while a run goes on: a live bar on a terminal, one plain line an epoch elsewhere."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 150


class Screen:
    """Prints for a person; `mode` is auto | bar | plain | none."""

    def __init__(self, mode: str) -> None:
        self.console = Console(quiet=mode == "none", highlight=False, soft_wrap=True)
        if not self.console.is_terminal:
            self.console.width = PLAIN_WIDTH  # a file or a pipe has no width; 80 would break every table
        self.live = mode == "bar" or (mode == "auto" and self.console.is_terminal)
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(Text(text))

    def point_to(self, folder: Path) -> None:
        """The last line of a run: where its dashboard lies."""
        page = (folder / "dashboard.html").resolve()
        self.say(f"dashboard: {page}" if page.is_file() else f"run folder: {folder.resolve()}")

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """A table; text cells to the left, numbers to the right."""
        table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        rows = [list(row) for row in rows]
        for index, column in enumerate(columns):
            numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
            table.add_column(column, justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(f"{v:,}" if isinstance(v, int) else str(v)) for v in row))
        self.console.print(table, soft_wrap=False)

    @contextmanager
    def training(self, steps: int, done: int) -> Iterator[None]:
        """Show a bar over all steps of the run while the body runs."""
        if not self.live:
            yield
            return
        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
        ]
        with Progress(*columns, TimeRemainingColumn(), console=self.console) as progress:
            self._progress, self._task = progress, progress.add_task("training", total=steps, completed=done, rate="")
            yield
        self._progress = None

    def step(self, description: str, done: int, images_per_s: float) -> None:
        """Move the bar."""
        if self._progress is not None and self._task is not None:
            self._progress.update(
                self._task, completed=done, description=description, rate=f"{images_per_s:,.0f} images/s"
            )
