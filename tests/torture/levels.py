"""The levels of the harness, by name, with the size of a short round (every push) and of a long one."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.torture import ablation, commands, configs, control, forks, kills, mutants, power, syscalls

Level = Callable[[int, int, Path], dict[str, Any]]


@dataclass(frozen=True)
class Named:
    """A level: `run(size, seed, place)` gives its figures, with everything bad in a list under that key.

    A size of 0 means all that there is.
    """

    name: str
    short: int
    long: int
    run: Level

    def size(self, which: str) -> int:
        return self.short if which == "short" else self.long


forks.prepare()
LEVELS = [
    Named("kills", 150, 10_000, kills.run),
    Named("syscall_kills", 90, 0, syscalls.run_kills),
    Named("syscall_errors", 60, 0, syscalls.run_errors),
    Named("power_cuts", 20, 500, power.run),
    Named("command_lines", 6, 200, commands.run),
    Named("mutants", 1_000, 10_000, mutants.run),
    Named("malicious", 0, 0, mutants.run_malicious),
    Named("configs", 300, 5_000, configs.run),
    Named("ablation", 0, 0, ablation.run),
    Named("control_kills", 8, 100, control.run_kills),
    Named("control_power", 4, 20, control.run_power),
]
