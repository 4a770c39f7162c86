"""How the jobs of a sweep stand, read from their run folders while they run, wherever that is: a live table, or plain lines."""

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from runner.columns import METRICS
from runner.folder import status_of
from runner.pages.records import complete_lines
from runner.screen import Screen
from runner.sweeps.jobs import Job

FINAL = {"done", "failed", "diverged"}
STYLES = {"done": "green", "failed": "red", "diverged": "red", "running": "bold"}
PAUSE = 1.0  # seconds between two looks; a look may take a tenth of the time
SHOWN = 30  # rows of the live table


@dataclass(frozen=True)
class Standing:
    """A job at one moment: `share` of its epochs are done, `accuracy` is its best validation accuracy so far."""

    state: str
    share: float = 0.0
    accuracy: float | None = None
    reason: str = ""


def standing(path: Path) -> Standing:
    """What a run folder says now."""
    status = status_of(path)
    state, epochs = str(status.get("state", "waiting")), status.get("epochs")
    last = _last_row(path / "metrics.csv")
    accuracy = float(last["best_val_top1"]) if last.get("best_val_top1") else None
    done = (int(last["epoch"]) + 1) / int(epochs) if last and isinstance(epochs, int) and epochs > 0 else 0.0
    reason = next(iter(str(status.get("reason") or "").splitlines()), "")
    return Standing(state, 1.0 if state == "done" else min(done, 1.0), accuracy, reason)


def _last_row(path: Path) -> dict[str, str]:
    """The last whole row of metrics.csv, from the end of the file."""
    try:
        with path.open("rb") as file:
            header = complete_lines(file.readline())
            size = file.seek(0, 2)
            file.seek(max(0, size - 4096))
            lines = complete_lines(file.read())
    except OSError:
        return {}
    names = header[0].split(",") if header else list(METRICS)
    cells = lines[-1].split(",") if lines else []
    return dict(zip(names, cells, strict=True)) if len(cells) == len(names) and cells[0].isdigit() else {}


class Watch:
    """Follows jobs while somebody else runs them: `todo` may change, the others are done."""

    def __init__(self, now: dict[Job, Standing], todo: Sequence[Job], screen: Screen) -> None:
        self.now, self.screen = now, screen
        self.open = {job: _touched(job.path) for job in todo}  # what status.json says as yet is of an earlier time
        self.now |= {job: Standing("waiting", now[job].share, now[job].accuracy) for job in todo}
        self.began, self.done_before = time.monotonic(), self.done_share()

    def look(self) -> list[Job]:
        """Read what may have changed; the jobs whose state is another than at the last look."""
        moved = [job for job, before in self.open.items() if _touched(job.path) != before]
        old = {job: self.now[job].state for job in moved}
        self.now |= {job: standing(job.path) for job in moved}
        for job in moved:
            if self.now[job].state in FINAL:
                del self.open[job]
        return [job for job in moved if self.now[job].state != old[job]]

    def done_share(self) -> float:
        """Jobs done, those that are under way by their share."""
        return sum(one.share for one in self.now.values())

    def seconds_left(self) -> float | None:
        """Of the whole sweep, as fast as it went so far; None where nothing is known yet."""
        gained = self.done_share() - self.done_before
        left = sum(1.0 - one.share for one in self.now.values() if one.state not in FINAL)
        return (time.monotonic() - self.began) / gained * left if gained > 0 else None

    def line(self) -> str:
        """Counts of states, and the time left."""
        counts = Counter(one.state for one in self.now.values())
        left = self.seconds_left()
        known = [f"{count} {state}" for state, count in sorted(counts.items())]
        return f"{len(self.now)} jobs: {', '.join(known)}" + (f"; {duration(left)} left" if left is not None else "")

    def __rich__(self) -> RenderableType:
        table = Table(box=None, pad_edge=False)
        for name in ("job", "state", "epochs", "best val, %"):
            table.add_column(name, justify="left" if name in {"job", "state"} else "right")
        order = {"running": 0, "failed": 1, "diverged": 1, "waiting": 3}
        shown = sorted(self.now, key=lambda job: order.get(self.now[job].state, 2))[:SHOWN]
        for job in shown:
            one = self.now[job]
            accuracy = "" if one.accuracy is None else f"{one.accuracy:.2f}"
            style = STYLES.get(one.state, "")
            table.add_row(Text(job.label), Text(one.state, style), f"{one.share:.0%}", accuracy)
        more = len(self.now) - len(shown)
        return Group(table, *([Text(f"… and {more} more")] if more else []), Text(self.line()))


def _touched(path: Path) -> int | None:
    """When status.json was last written; None where there is none."""
    try:
        return (path / "status.json").stat().st_mtime_ns
    except OSError:
        return None


@contextmanager
def watched(now: dict[Job, Standing], todo: Sequence[Job], screen: Screen) -> Iterator[Watch]:
    """While the body runs, show how the jobs stand: a live table on a terminal, else a line for each that ends."""
    watch, over = Watch(now, todo, screen), threading.Event()

    def follow() -> None:
        pause = PAUSE
        while not over.wait(pause):
            began = time.monotonic()
            _say(watch, watch.look())
            pause = max(PAUSE, 10 * (time.monotonic() - began))

    thread = threading.Thread(target=follow, daemon=True, name="sweep table")
    live = Live(watch, console=screen.console, refresh_per_second=2, transient=True) if screen.live else None
    if live is not None:
        live.start()
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()
        _say(watch, watch.look())
        if live is not None:
            live.stop()


def _say(watch: Watch, changed: Sequence[Job]) -> None:
    if watch.screen.live:
        return
    for job in changed:
        one = watch.now[job]
        figures = f", best val {one.accuracy:.2f} %" if one.accuracy is not None and one.state in FINAL else ""
        watch.screen.say(f"{job.label}: {one.state}{figures}  ({watch.line()})")


def duration(seconds: float) -> str:
    """For people.

    >>> [duration(s) for s in (42, 600, 5 * 3600 + 120, 3 * 86400)]
    ['42 s', '10 min', '5 h 2 min', '3 d 0 h']
    """
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
