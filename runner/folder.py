"""The run folder: its name, its lock, its logs and its status. One run, one folder, one process at a time."""

import fcntl
import json
import os
import re
import socket
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from runner.columns import HEALTH, METRICS, TIMING
from runner.config import config_hash
from runner.faults import Locked, StorageError
from runner.files import NO_FOLLOW, reason, remove, still_true, write_json
from runner.log import CsvLog
from runner.schema import RunConfig
from runner.screen import Screen


def run_path(config: RunConfig) -> Path:
    """Where a config's run lies: a readable part and the hash of all that matters."""
    readable = config.name or f"{config.model.name}-{config.quant.name}-{config.dataset.name}-s{config.seed}"
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", readable).strip("-.")[:80] or "run"
    return Path(config.outputs) / "runs" / f"{slug}-{config_hash(config)}"


class RunFolder:
    """An open run folder. Raises Locked where another process works in it, StorageError where it cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            if path.is_symlink() or self.checkpoints.is_symlink():
                raise StorageError(f"{path}: is a symbolic link; runs are not written through links")
            self._lock = _take_lock(path / ".lock")
        except OSError as error:
            raise StorageError(f"{path}: cannot be used: {reason(error)}") from error
        for leftover in path.glob(".*.tmp-*"):  # of a process that was killed; nobody else writes here now
            remove(leftover)
        self.metrics = CsvLog(path / "metrics.csv", METRICS)
        self.timing = CsvLog(path / "timing.csv", TIMING)
        self.health = CsvLog(path / "quant.csv", HEALTH)
        self.facts: dict[str, Any] = {"pid": os.getpid(), "host": socket.gethostname(), "command": _command()}

    @property
    def logs(self) -> dict[str, CsvLog]:
        """The files that a checkpoint goes back in, by name."""
        return {log.path.name: log for log in (self.metrics, self.timing, self.health)}

    def status(self, state: str, exit_code: int | None = None, why: str = "", **facts: Any) -> None:
        """Say how the run stands; the facts given once stay."""
        self.facts |= facts
        now = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(
            self.path / "status.json",
            {"state": state, "exit_code": exit_code, "reason": why, **self.facts, "updated": now},
        )

    def close(self) -> None:
        for log in self.logs.values():
            log.close()
        os.close(self._lock)


def _command() -> list[str]:
    """The command line of this process, as it is typed anywhere."""
    return ["python", "-m", "runner", *sys.argv[1:]]


def status_of(path: Path) -> dict[str, Any]:
    """What status.json says, where that is still true; empty where there is none that can be read."""
    try:
        found = json.loads((path / "status.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return still_true(path, found) if isinstance(found, dict) else {}


def done_already(path: Path, screen: Screen) -> bool:
    """Whether the run of a folder is finished; says so, and where it lies."""
    if status_of(path).get("state") != "done":
        return False
    screen.say(f"this run is done already: {path}")
    screen.point_to(path)
    return True


def _take_lock(path: Path, patience: float = 5.0) -> int:
    """An exclusive lock that lives as long as this process; waits a little for the dying workers of a killed one."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | NO_FOLLOW, 0o666)
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip()
            alive = _is_alive(holder)
            if alive or time.monotonic() > deadline:
                os.close(handle)
                raise Locked(f"{path.parent}: another process works here: {holder or 'unknown'}") from None
            time.sleep(0.05)
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return handle


def _is_alive(holder: str) -> bool:
    match = re.fullmatch(r"pid (\d+) on (.+)", holder)
    return bool(match and match[2] == socket.gethostname() and Path(f"/proc/{match[1]}").exists())
