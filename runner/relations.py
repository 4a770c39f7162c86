"""What keys of a config must be to one another: phases in order, optimizers and arguments, batches and data. No torch here."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from runner.catalog import Component
from runner.data.locations import train_samples
from runner.faults import Fault, nearest
from runner.schema import COMMON, OPTIMIZERS, DataPhase, DatasetConfig, Phase, Schedule, Value

NO_FP16 = "fp16 needs a GPU; the CPU accepts none, bf16"
NEED_AN_END = {"linear", "warmup", "cosine", "exponential"}


def relation_faults(parts: Mapping[str, Any], quantizers: Mapping[str, Component]) -> Iterable[Fault]:
    """Every fault between keys. `parts` are the sections of a config that are right by themselves; others are not judged."""
    if "regime" in parts and parts["regime"].phases is not None:
        yield from phase_faults("regime", parts["regime"].phases)
        if "quant" in parts:
            yield from _driven_faults(parts["regime"].phases, quantizers[parts["quant"].name])
        if "regularizer" in parts and parts["regularizer"].name == "none":
            yield from _idle_penalty_faults(parts["regime"].phases)
    if "data_regime" in parts and parts["data_regime"].phases is not None:
        yield from data_phase_faults("data_regime", parts["data_regime"].phases)
        if "dataset" in parts and parts.get("mode") != "evaluate":  # which forms no batch of training images
            yield from _batch_faults(parts["data_regime"].phases, parts["dataset"])
    if parts.get("mode") == "evaluate" and not parts.get("checkpoint", "wrong"):
        yield Fault(
            "checkpoint", "say which stored model: checkpoint=PATH, a run folder, a checkpoint or a weights file"
        )
    if "dataset" in parts and len(parts["dataset"].mean or "") != len(
        parts["dataset"].std or parts["dataset"].mean or ""
    ):
        yield Fault("dataset.std", "must have as many values as dataset.mean")
    if "trainer" in parts and parts["trainer"].amp == "fp16" and parts["trainer"].device == "cpu":
        yield Fault("trainer.amp", NO_FP16)
    yield from _recompute_faults(parts)


def _idle_penalty_faults(phases: Sequence[Phase]) -> Iterable[Fault]:
    for index, phase in enumerate(phases):
        if phase.regularizer is not None:
            message = "there is no regularizer whose weight it could be; choose one with regularizer="
            yield Fault(f"regime.phases.{index}.regularizer", message)


def _recompute_faults(parts: Mapping[str, Any]) -> Iterable[Fault]:
    """What cannot be computed twice."""
    if "trainer" not in parts or parts["trainer"].recompute == "none":
        return
    if parts["trainer"].compile:
        yield Fault(
            "trainer.recompute", "is not for compiled models, which choose what to keep themselves; accepted: none"
        )
    if "regularizer" in parts and parts["regularizer"].name != "none":
        yield Fault("trainer.recompute", "would count a regularizer's terms twice; accepted with regularizer: none")


def phase_faults(section: str, phases: Sequence[Phase]) -> Iterable[Fault]:
    """What is wrong with the phases of a regime."""
    yield from _order_faults(section, phases)
    yield from _null_faults(section, phases)
    said: dict[str, Any] = {}
    for index, phase in enumerate(phases):
        path = f"{section}.phases.{index}"
        own = {key: value for key, value in phase if value is not None}
        yield from _schedule_faults(path, own)
        if own.get("optimizer", said.get("optimizer")) != said.get("optimizer"):
            said = {key: said[key] for key in COMMON & said.keys()}
        said |= own
        if "optimizer" not in said or "lr" not in said:
            yield Fault(path, "the first phase needs an optimizer and an lr")
            return
        yield from _argument_faults(path, own, said)


def _argument_faults(path: str, own: Mapping[str, Any], said: Mapping[str, Any]) -> Iterable[Fault]:
    """Arguments that the optimizer does not have, or does not take together."""
    optimizer = said["optimizer"]
    accepted = COMMON | OPTIMIZERS[optimizer]
    for key in sorted(own.keys() & set().union(*OPTIMIZERS.values()) - accepted):
        yield Fault(f"{path}.{key}", f"{optimizer} has no {key}; it takes {', '.join(sorted(accepted))}")
    if optimizer == "SGD" and said.get("nesterov") and (not said.get("momentum") or said.get("dampening")):
        yield Fault(f"{path}.nesterov", "nesterov needs a momentum above 0 and a dampening of 0")


def data_phase_faults(section: str, phases: Sequence[DataPhase]) -> Iterable[Fault]:
    """What is wrong with the phases of a data regime."""
    yield from _order_faults(section, phases)
    yield from _null_faults(section, phases)
    if phases[0].batch_size is None:
        yield Fault(f"{section}.phases.0", "the first phase needs a batch_size")


def _null_faults(section: str, phases: Sequence[Phase | DataPhase]) -> Iterable[Fault]:
    """Keys that a phase sets to nothing after one before it said something: that reads as a way back to a default."""
    said: set[str] = set()
    for index, phase in enumerate(phases):
        for key in sorted(phase.model_fields_set & said - {"epoch", "step"}):
            if getattr(phase, key) is None:
                why = (
                    "null changes nothing: a phase keeps what the one before it said; accepted: a value, or no such key"
                )
                yield Fault(f"{section}.phases.{index}.{key}", why)
        said |= {key for key, value in phase if value is not None}


def _order_faults(section: str, phases: Sequence[Phase | DataPhase]) -> Iterable[Fault]:
    previous = -1
    units = {"step" if _step(phase) is not None else "epoch" for phase in phases}
    if len(units) > 1:
        yield Fault(f"{section}.phases", "phases are placed by epoch or by step, not by both in one list")
        return
    for index, phase in enumerate(phases):
        path, step = f"{section}.phases.{index}", _step(phase)
        start = step if step is not None else phase.epoch
        if start is None or (step is not None and phase.epoch is not None):
            yield Fault(path, "needs its start: one of epoch, step")
            return
        if index == 0 and start != 0:
            yield Fault(path, f"the first phase must start at 0, not at {start}")
        if start <= previous:
            yield Fault(path, f"starts at {start}, the phase before it at {previous}: put them in order")
        previous = start


def _step(phase: Phase | DataPhase) -> int | None:
    return phase.step if isinstance(phase, Phase) else None


def _schedule_faults(path: str, own: Mapping[str, Any]) -> Iterable[Fault]:
    values = {**own} | {f"quant.{key}": value for key, value in own.get("quant", {}).items()}
    for key, value in values.items():
        if not isinstance(value, Schedule):
            continue
        if value.schedule == "step" and value.every is None:
            yield Fault(f"{path}.{key}", "schedule step needs every: (and gamma:)")
        if value.schedule in NEED_AN_END and value.end is None:
            yield Fault(f"{path}.{key}", f"schedule {value.schedule} needs to:")
        if value.schedule == "exponential" and not (value.start > 0 and value.end != 0):
            yield Fault(f"{path}.{key}", "schedule exponential needs from: and to: above zero")


def _driven_faults(phases: Sequence[Phase], quantizer: Component) -> Iterable[Fault]:
    """Values that phases schedule for the quantizer, but that it does not take."""
    accepted = quantizer.scheduled
    takes = f"it takes {', '.join(accepted)}" if accepted else "it takes none"
    for index, phase in enumerate(phases):
        for key, value in sorted((phase.quant or {}).items()):
            path = f"regime.phases.{index}.quant.{key}"
            if key not in accepted:
                message = f"{quantizer.name} schedules no {key!r}.{nearest(key, accepted)} Of values over time {takes}"
                yield Fault(path, message)
            elif key in quantizer.arguments:
                yield from _range_faults(path, value, quantizer.arguments[key].type)


def _range_faults(path: str, value: Value, kind: Any) -> Iterable[Fault]:
    """Where a schedule begins or ends beyond what the quantizer's key itself may be."""
    ends = [value.start, value.end] if isinstance(value, Schedule) else [value]
    for end in (end for end in ends if end is not None):
        try:
            TypeAdapter(kind).validate_python(end)
        except ValidationError as error:
            reason = error.errors(include_url=False)[0]["msg"]
            yield Fault(path, f"{reason.replace('Input', 'value', 1)}, not {end}")


def _batch_faults(phases: Sequence[DataPhase], dataset: DatasetConfig) -> Iterable[Fault]:
    samples = train_samples(dataset.name, dataset.model_dump() | dataset.arguments)
    for index, phase in enumerate(phases):
        if samples is not None and (phase.batch_size or 0) > samples:
            path = f"data_regime.phases.{index}.batch_size"
            yield Fault(path, f"{phase.batch_size} is more than the {samples:,} training images of {dataset.name}")
