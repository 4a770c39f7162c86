"""Schedules as pure functions: what holds at a point of training follows from the phases and the point alone.

No state, so a run that is resumed in the middle has the right values at its first step; no code in strings.
Phases are placed by epoch or by step; `time` and `end` below count in that unit, epochs with their fraction.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from runner.schema import COMMON, OPTIMIZERS, DataPhase, Phase, RunConfig, Schedule, Value

Setting = dict[str, Any]
POINTS = 100  # of a timeline, so that the schedules of a short run are curves, too
FEWEST_POINTS = 4  # of an epoch in which a schedule moves


@dataclass(frozen=True)
class Clock:
    """A point of training: before the batch `batch` (of `batches`) of `epoch`, after `step` optimizer steps."""

    epoch: int
    batch: int
    batches: int
    step: int


def setting_at(phases: Sequence[Phase], clock: Clock, *, epochs: int, steps: int) -> Setting:
    """Everything that holds at a point: the optimizer, its arguments, `phase` (index), and what is scheduled beside them.

    `epochs` and `steps` are the length of the whole run; the last schedule of a key ends there. A phase that names another
    optimizer keeps lr and weight_decay and drops the arguments that belong to the old one.

    >>> phases = [Phase(epoch=0, optimizer="SGD", lr=0.1, momentum=0.9), Phase(epoch=2, lr=0.01)]
    >>> setting_at(phases, Clock(epoch=2, batch=0, batches=10, step=20), epochs=3, steps=30)
    {'phase': 1, 'optimizer': 'SGD', 'lr': 0.01, 'momentum': 0.9}
    """
    by_step = phases[0].step is not None
    time = clock.step if by_step else clock.epoch + clock.batch / max(clock.batches, 1)
    end = steps if by_step else epochs
    starts = [float(phase.step if by_step else phase.epoch or 0) for phase in phases]  # type: ignore[arg-type]
    current = max(index for index, start in enumerate(starts) if start <= time)
    optimizer, said_in = None, dict[str, int]()  # each key, and the phase that said it last
    for index in range(current + 1):
        changes = _values(phases[index])
        if changes.get("optimizer", optimizer) != optimizer:
            optimizer = changes["optimizer"]
            said_in = {k: i for k, i in said_in.items() if k in COMMON or not _belongs_to_an_optimizer(k)}
        said_in |= dict.fromkeys(changes, index)
    setting: Setting = {"phase": current}
    for key, index in said_in.items():
        value = _values(phases[index])[key]
        after = (starts[i] for i in range(index + 1, len(phases)) if key in _values(phases[i]))
        until = min(next(after, end), end) if isinstance(value, Schedule) else end
        setting[key] = value_at(value, starts[index], until, time)
    return setting


def value_at(value: Any, start: float, end: float, time: float) -> Any:
    """A number stays what it is; a schedule that runs from `start` to `end` is evaluated at `time`.

    >>> value_at(Schedule.model_validate({"schedule": "cosine", "from": 1, "to": 0}), 0, 10, 5)
    0.5
    """
    if not isinstance(value, Schedule):
        return value
    first, last = float(value.start), float(value.end if value.end is not None else value.start)
    progress = min(max((time - start) / (value.length or (end - start) or 1), 0.0), 1.0)
    match value.schedule:
        case "linear" | "warmup":
            return first + (last - first) * progress
        case "cosine":
            return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2
        case "exponential":
            return first * (last / first) ** progress
        case "step":
            return first * value.gamma ** math.floor((time - start) / (value.every or 1))
    return first


def data_setting_at(phases: Sequence[DataPhase], epoch: int) -> Setting:
    """Batch size and input size of an epoch, and the index of the phase.

    >>> data_setting_at([DataPhase(epoch=0, batch_size=256, input_size=128), DataPhase(epoch=15, batch_size=64)], 20)
    {'phase': 1, 'batch_size': 64, 'input_size': 128}
    """
    setting: Setting = {"phase": 0, "batch_size": None, "input_size": None}
    for index, phase in enumerate(phases):
        if phase.epoch <= epoch:
            changes = {"batch_size": phase.batch_size, "input_size": phase.input_size}
            setting |= {"phase": index} | {key: value for key, value in changes.items() if value is not None}
    return setting


def too_late(starts: Sequence[int], length: int, unit: str, of: str = "regime") -> str:
    """One line where phases begin after the run has ended, so that a short run does not keep the first learning rate unnoticed.

    >>> too_late([0, 81, 122], 20, "epoch")
    'note: the run ends at epoch 20; phases of the regime at epoch 81, 122 never begin. regime=cosine fits any length'
    >>> too_late([0, 10], 20, "epoch")
    ''
    """
    late = ", ".join(str(start) for start in starts if start >= length)
    what = f"phases of the {of} at {unit} {late} never begin"
    advice = ". regime=cosine fits any length" if of == "regime" else ""
    return f"note: the run ends at {unit} {length}; {what}{advice}" if late else ""


def steps_per_epoch(samples: int, batch_size: int, drop_last: bool, world: int = 1) -> int:
    """Batches of one epoch; a last one that leaves a process fewer than two samples is left out: they have no variance."""
    full, rest = divmod(samples, batch_size)
    return full + int(rest // world >= 2 and not drop_last)


def first_steps(config: RunConfig, phases: Sequence[DataPhase], samples: int, world: int = 1) -> list[int]:
    """The step at which each epoch begins, and the one after the last, of a run that `max_steps` does not end."""
    sizes = (data_setting_at(phases, epoch)["batch_size"] for epoch in range(config.total_epochs))
    return [0, *accumulate(steps_per_epoch(samples, size, config.dataset.drop_last, world) for size in sizes)]


def last_step(starts: Sequence[int], max_steps: int | None) -> int:
    """How many steps a run takes: those of its epochs, or fewer."""
    return min(starts[-1], max_steps or starts[-1])


def epochs_begun(starts: Sequence[int], max_steps: int | None) -> int:
    """How many epochs begin before the run ends.

    >>> epochs_begun([0, 10, 20, 30], None), epochs_begun([0, 10, 20, 30], 11), epochs_begun([0, 10, 20, 30], 20)
    (3, 2, 2)
    """
    return sum(start < last_step(starts, max_steps) for start in starts[:-1])


def timeline(config: RunConfig, samples: int) -> Iterator[Setting]:
    """One row for every epoch that begins before the run ends, and for what changes within one; epochs with their fraction."""
    regime, data = config.regime.phases or [], config.data_regime.phases or []
    starts = first_steps(config, data, samples)
    last = last_step(starts, config.trainer.max_steps)
    for epoch in range(epochs_begun(starts, last)):
        first, batches = starts[epoch], starts[epoch + 1] - starts[epoch]
        sizes = {k: v for k, v in data_setting_at(data, epoch).items() if k != "phase"}
        before: Setting = {}
        for batch in _looked_at(regime, first, batches, -(-POINTS // config.total_epochs)):
            clock = Clock(epoch=epoch, batch=batch, batches=batches, step=first + batch)
            setting = setting_at(regime, clock, epochs=config.total_epochs, steps=starts[-1])
            if clock.step < last and setting != before:
                yield {"epoch": epoch + batch / batches if batch else epoch, "step": clock.step} | setting | sizes
            before = setting


def end_of(config: RunConfig, samples: int) -> Setting:
    """Where the run ends: the epochs it has done by then, with their fraction, and the step."""
    starts = first_steps(config, config.data_regime.phases or [], samples)
    last = last_step(starts, config.trainer.max_steps)
    epochs = epochs_begun(starts, last)
    before, after = starts[max(epochs - 1, 0)], starts[epochs]
    return {"epoch": epochs - (after - last) / max(after - before, 1), "step": last}


def _looked_at(phases: Sequence[Phase], first: int, batches: int, parts: int) -> list[int]:
    """The batches of an epoch at which something may have changed: where a phase begins, and a few more for the schedules."""
    parts = max(parts, FEWEST_POINTS)
    begun = {phase.step - first for phase in phases if phase.step is not None and first <= phase.step < first + batches}
    return sorted({0} | begun | {batches * part // parts for part in range(parts)})


def _values(phase: Phase) -> dict[str, Any]:
    """What a phase sets, flat: `quant: {sharpness: …}` becomes `quant.sharpness`."""
    own: dict[str, Any] = {}
    for key in phase.model_fields_set - {"epoch", "step", "quant"}:
        own[key] = getattr(phase, key)
    scheduled: dict[str, Value] = phase.quant or {}
    order = [key for key in Phase.model_fields if key in own and own[key] is not None]
    return {key: own[key] for key in order} | {f"quant.{key}": value for key, value in scheduled.items()}


def _belongs_to_an_optimizer(key: str) -> bool:
    return key in set().union(*OPTIMIZERS.values())
