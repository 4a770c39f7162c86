"""Callables timed side by side, in turns in one process: whatever slows the machine down then slows all of them.

Every round times every callable once; rounds go through them forwards and backwards alternately, so that nobody always
follows the same neighbour. A ratio is taken within a round, between two turns that were close in time, and the median of
these ratios is what counts. On a GPU, a turn lies between two events on its stream.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

Action = Callable[[], object]
FEWEST_TURNS = 9


@dataclass(frozen=True)
class Spread:
    """The median of some measurements and their quartiles.

    >>> Spread.of([5.0, 1.0, 2.0, 3.0, 4.0])
    Spread(median=3.0, low=2.0, high=4.0)
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Times:
    """Seconds of one call of a callable, turn by turn: on the clock (of the GPU, where it works there), and of the processor."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def ratio(mine: Sequence[float], base: Sequence[float]) -> Spread:
    """How many times as long as `base`, turn by turn.

    >>> ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0]).median
    2.0
    """
    return Spread.of([m / b for m, b in zip(mine, base, strict=True)])


def take_turns(
    actions: Mapping[str, Action],
    *,
    turns: int = FEWEST_TURNS,
    warmup: int = 2,
    shortest: float = 0.0,
    device: torch.device | str = "cpu",
    after_round: Callable[[int], object] = lambda done: None,
) -> dict[str, Times]:
    """Times of every action. `shortest`: seconds that a turn shall last at least; short actions are repeated within a turn."""
    clock = _on_gpu if torch.device(device).type == "cuda" else _on_cpu
    calls = {name: _warm(action, warmup, shortest, clock) for name, action in actions.items()}
    times = {name: Times() for name in actions}
    for turn in range(turns):
        for name in list(actions)[:: -1 if turn % 2 else 1]:
            wall, cpu = clock(actions[name], calls[name])
            times[name].wall.append(wall / calls[name])
            times[name].cpu.append(cpu / calls[name])
        after_round(turn + 1)
    return times


Clock = Callable[[Action, int], tuple[float, float]]


def _warm(action: Action, warmup: int, shortest: float, clock: Clock) -> int:
    """Let caches fill, kernels compile and libraries choose; the number of calls that a turn shall have."""
    seconds = [clock(action, 1)[0] for _ in range(max(warmup, 1))][-1]
    return max(1, round(shortest / max(seconds, 1e-7)))


def _on_cpu(action: Action, calls: int) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(calls):
        action()
    return time.perf_counter() - wall, time.process_time() - cpu


def _on_gpu(action: Action, calls: int) -> tuple[float, float]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    cpu = time.process_time()
    begin.record()
    for _ in range(calls):
        action()
    end.record()
    cpu = time.process_time() - cpu
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3, cpu
