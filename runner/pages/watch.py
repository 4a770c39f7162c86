"""Following run folders: what is there, what changed since last time; finished runs are looked at less often than running ones.

Whatever a folder holds, it gives a row (`runner.pages.entries`), if need be one that says what is wrong with it. Rows are
kept as the text that a page gets, so that ten thousand runs fit into little memory.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runner.files import is_abandoned
from runner.pages.entries import Costs, Entry, base_of, brief_of, encoded, entry_of, identity, points_for
from runner.pages.records import RUN_FILES, Memory, find_runs, read_brief, read_config, read_run
from runner.pages.settings import settings_of

LEISURE = 20  # a search of all folders pauses for that many times as long as it took
SAMPLE = 20  # runs whose settings say what is usual
SETTLED = {"done", "failed", "diverged", "preempted", "interrupted", "broken"}
Stamp = tuple[tuple[str, int, int], ...]


@dataclass
class Followed:
    """A run folder: its row, and by what to see that it changed."""

    folder: Path
    stamp: Stamp = ()
    row: str = ""
    state: str = ""
    costs: Costs | None = None
    version: int = 0
    memory: Memory = field(default_factory=dict)


class Watch:
    """All runs below some folders. `refresh` looks for changes; `version` grows with every row that changes."""

    def __init__(self, roots: Sequence[Path], link: str = "run?id=") -> None:
        self.roots, self._link = list(roots), link
        self.runs: dict[str, Followed] = {}
        self.version = self.places = 0  # `places` grows when a run appears or vanishes
        self.base: dict[str, str] = {}
        self._next_search = 0.0
        self._pending: list[Followed] = []
        self._new: list[Followed] = []

    def refresh(self, patience: float = 0.5) -> None:
        """Look for changes; what takes longer than `patience` seconds goes on at the next call."""
        start, worked = time.monotonic(), time.process_time()
        if start >= self._next_search:
            self._search()
            self._next_search = time.monotonic() + LEISURE * (time.process_time() - worked)
        elif not self._pending:
            self._pending = [run for run in self.runs.values() if run.state not in SETTLED]
        if not self.base:
            self._find_base()
        while self._new:
            self._glance(self._new.pop())
        while self._pending:  # one at least: a machine too busy for anything else gets there, too
            self._read(self._pending.pop())
            if time.monotonic() - start >= patience:
                break

    def since(self, version: int) -> Iterator[tuple[int, str]]:
        """The rows that changed after `version`, each with its place."""
        for place, run in enumerate(self.runs.values()):
            if run.version > version:
                yield place, run.row

    def _search(self) -> None:
        found = {identity(folder): folder for root in self.roots for folder in find_runs(root)}
        gone = [key for key in self.runs if key not in found]
        for key in gone:
            del self.runs[key]
        self.places += bool(gone)
        for key, folder in found.items():
            if key not in self.runs:
                self._new.append(Followed(folder))
                self.runs[key] = self._new[-1]
                self.places += 1
        self._pending = list(self.runs.values())[::-1]

    def _find_base(self) -> None:
        """What is usual, once there are configs; rows that were told without it are told again."""
        self.base = base_of(settings_of(read_config(run.folder), {}) for run in self._pending[-SAMPLE:])
        if self.base:
            self._pending = list(self.runs.values())[::-1]
            for run in self._pending:
                run.stamp = ()

    def _glance(self, followed: Followed) -> None:
        """A row from the summary alone, so that ten thousand runs are listed at once."""
        run = read_brief(followed.folder)
        if run is not None:
            self._keep(followed, brief_of(run, self._link + identity(followed.folder), self.base))

    def _read(self, followed: Followed) -> None:
        stamp = _stamp(followed.folder)
        died = followed.state == "running" and is_abandoned(followed.folder)  # of which no file tells
        if stamp == followed.stamp and not died:
            return
        run = read_run(followed.folder, health=False, memory=followed.memory)
        entry = entry_of(run, self._link + identity(followed.folder), points_for(len(self.runs)))
        followed.stamp = stamp
        self._keep(followed, entry)
        if followed.state in SETTLED:
            followed.memory.clear()

    def _keep(self, followed: Followed, entry: Entry) -> None:
        self.version += 1
        followed.version = self.version
        followed.row, followed.state, followed.costs = encoded(entry, self.base), entry["state"], entry["costs"]


def _stamp(folder: Path) -> Stamp:
    """Sizes and times of the files of a run."""
    found = []
    for name in sorted(RUN_FILES | {"config.yaml"}):
        try:
            status = os.lstat(folder / name)
        except OSError:
            continue
        found.append((name, status.st_size, status.st_mtime_ns))
    return (*found, ("", 0, 0))  # never empty: a folder without files was read, too
