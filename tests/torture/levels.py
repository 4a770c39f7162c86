"""The levels of the harness, by name, with the size of a short round (every push) and of a long one."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.torture import ablation, commands, configs, control, cost, kills, mutants, power, sweeps, syscalls

Level = Callable[[int, int, Path], dict[str, Any]]


@dataclass(frozen=True)
class Named:
    """A level: `run(size, seed, place)` gives its figures, with everything bad in a list under that key.

    A size of 0 means all that there is; None, that a short round goes without it.
    """

    name: str
    short: int | None
    long: int
    run: Level

    def size(self, short: bool) -> int | None:
        return self.short if short else self.long


# Those that take longest come first: two at a time end sooner that way.
LEVELS = [
    Named("syscall_errors", 0, 0, syscalls.run_errors),
    Named("command_lines", 10, 50, commands.run),
    Named("kills", 300, 2_000, kills.run),
    Named("syscall_kills", 0, 0, syscalls.run_kills),
    Named("configs", 500, 5_000, configs.run),
    Named("power_cuts", 60, 300, power.run),
    Named("control_kills", 8, 100, control.run_kills),
    Named("sweep_kills", None, 21, sweeps.run),
    Named("mutants", 1_000, 10_000, mutants.run),
    Named("ablation", 0, 0, ablation.run),
    Named("control_power", 4, 20, control.run_power),
    Named("malicious", 0, 0, mutants.run_malicious),
    Named("cost", None, 9, cost.run),
]
