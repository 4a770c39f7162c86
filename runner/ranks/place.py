"""Which of several processes this one is, and the run folder as all but the first see it: they write nothing. No torch here."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.folder import RunFolder
from runner.log import CsvLog


@dataclass(frozen=True)
class Place:
    """Rank of this process among `size`, and among those of this host, as torchrun says it; alone where it says nothing."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls) -> "Place":
        said = [os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
        return cls(*map(int, said)) if all(text.isdigit() for text in said) else cls()

    @property
    def first(self) -> bool:
        return self.rank == 0


class SilentLog(CsvLog):
    """Takes rows and writes none."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def row(self, values: Mapping[str, Any]) -> None:
        return

    def mark(self) -> dict[str, Any]:
        return {}

    def rewind(self, mark: Mapping[str, Any]) -> None:
        return

    def clear(self) -> None:
        return

    def close(self) -> None:
        return


class Onlooker(RunFolder):
    """The folder that the first rank works in, in the eyes of the others."""

    def __init__(self, path: Path) -> None:
        self.path, self.checkpoints = path, path / "checkpoints"
        self.metrics, self.timing, self.health = (
            SilentLog(path / name) for name in ("metrics.csv", "timing.csv", "quant.csv")
        )

    def status(self, state: str, exit_code: int | None = None, why: str = "", **facts: Any) -> None:
        return

    def close(self) -> None:
        return


def folder_for(path: Path, place: Place) -> RunFolder:
    """The run folder, held by the first rank alone. Raises Locked."""
    return RunFolder(path) if place.first else Onlooker(path)
