"""From what Hydra composed to a checked `RunConfig`, or to one message with everything that is wrong with it. No torch here."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError, create_model

from runner.catalog import MISSING, Component, catalog
from runner.dataset_files import missing, train_samples
from runner.faults import ConfigError, Fault, nearest
from runner.schema import (
    COMMON,
    OPTIMIZERS,
    DataPhase,
    DatasetConfig,
    Phase,
    RuleConfig,
    RunConfig,
    Schedule,
    Strict,
    Value,
)

COMPONENTS = ("model", "quant", "classifier", "regularizer", "dataset")
PLAIN_KEYS = {"quant": {"rules"}, "dataset": set(DatasetConfig.model_fields) - {"arguments"}}
M = TypeVar("M", bound=BaseModel)


def check(raw: Mapping[str, Any], skip: Iterable[str] = ()) -> RunConfig:
    """The checked config. Raises ConfigError with every fault; sections in `skip` are known to be wrong already."""
    faults = [
        Fault(path, "configs are data: a key that starts with '_' names code and is refused")
        for path in _code_keys(raw)
    ]
    plugins = tuple(raw.get("plugins") or ())
    try:
        known = catalog(plugins)
    except ValueError as error:
        raise ConfigError([*faults, Fault("plugins", str(error))]) from error
    folded = dict(raw)
    for section in COMPONENTS:
        folded[section], found = _fold(section, raw.get(section), known[section])
        faults += found
        if section == "dataset" and not found:
            faults += _data_faults(folded[section])
    config, found = _validate(RunConfig, folded, "")
    faults += found
    faults = [f for f in faults if f.path.split(".")[0] not in set(skip)]
    if config is not None and not faults:
        config = shorthand(config)
        faults = list(_cross_checks(config))
    if faults or config is None:
        raise ConfigError(_unique(faults))
    return config


def _fold(section: str, raw: Any, known: Mapping[str, Component]) -> tuple[dict[str, Any], list[Fault]]:
    """Move the component's own keys under `arguments`, checked against its signature."""
    if not isinstance(raw, Mapping) or not isinstance(raw.get("name"), str):
        return {"name": ""}, [Fault(section, f"must be a mapping with a name; known: {', '.join(sorted(known))}")]
    name = raw["name"]
    if name not in known:
        return {"name": name}, [Fault(f"{section}.name", _unknown(name, known))]
    plain = {key: raw[key] for key in raw if key in PLAIN_KEYS.get(section, set())}
    own = {key: raw[key] for key in raw if key not in plain and key != "name"}
    extra = sorted(PLAIN_KEYS.get(section, ()))
    arguments, faults = _validate(_signature(known[name]), own, section, extra)
    values = {key: getattr(arguments, key) for key in known[name].arguments} if arguments else own
    if section == "quant":
        faults += _rule_faults(plain.get("rules"), known[name])
    return {"name": name, "arguments": values, **plain}, faults


def _data_faults(dataset: Mapping[str, Any]) -> Iterable[Fault]:
    """Whether the data set is where the config says, before anything else is done with it."""
    problem = missing(dataset["name"], dataset["arguments"])
    if problem:
        yield Fault("dataset.root", problem)


def _signature(component: Component) -> type[BaseModel]:
    """A pydantic model of a component's arguments."""
    fields: dict[str, Any] = {
        key: (argument.type, ... if argument.default is MISSING else argument.default)
        for key, argument in component.arguments.items()
    }
    return create_model(component.name, __base__=Strict, **fields)


def _rule_faults(rules: Any, component: Component) -> list[Fault]:
    faults: list[Fault] = []
    for index, rule in enumerate(rules if isinstance(rules, list) else []):
        if isinstance(rule, Mapping):
            own = {key: value for key, value in rule.items() if key not in RuleConfig.model_fields}
            faults += _validate(_signature(component), own, f"quant.rules.{index}", list(RuleConfig.model_fields))[1]
    return faults


def _validate(model: type[M], raw: Any, path: str, also: Sequence[str] = ()) -> tuple[M | None, list[Fault]]:
    try:
        return model.model_validate(raw), []
    except ValidationError as error:
        return None, [_explain(e, model, path, also) for e in error.errors(include_url=False)]


def _explain(error: Any, model: type[BaseModel], path: str, also: Sequence[str]) -> Fault:
    """A pydantic error as a sentence for people."""
    where = [part for part in error["loc"] if not _is_union_branch(part)]
    full = ".".join(str(part) for part in ([path] if path else []) + where)
    match error["type"]:
        case "extra_forbidden":
            keys = [*_keys_at(model, where[:-1]), *also]
            return Fault(full, f"unknown key.{nearest(str(where[-1]), keys)} Known: {', '.join(keys)}")
        case "literal_error":
            accepted = error["ctx"]["expected"]
            words = [word.strip("' ") for word in accepted.replace(" or ", ", ").split(",")]
            return Fault(full, f"{error['input']!r} is not accepted: {accepted}.{nearest(str(error['input']), words)}")
        case "missing":
            return Fault(full, "is missing")
        case _:
            return Fault(full, f"{error['msg'].replace('Input', 'value', 1)}, not {error['input']!r}")


def _is_union_branch(part: int | str) -> bool:
    """Whether a part of an error's location is pydantic's name of a union branch, no key of ours."""
    text = str(part)
    return text in {"int", "float", "bool", "str", "Schedule", "none"} or text.startswith("constrained-") or "[" in text


def _keys_at(model: type[BaseModel], where: Sequence[int | str]) -> list[str]:
    """The keys that are known at a place inside a model."""
    fields = model.model_fields
    for part in where:
        if isinstance(part, int):
            continue
        inner = fields[part].annotation if part in fields else None
        found = _model_in(inner)
        if found is None:
            return []
        fields = found.model_fields
    return [info.alias or key for key, info in fields.items() if key != "arguments"]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    hits = (_model_in(argument) for argument in getattr(annotation, "__args__", ()))
    return next((hit for hit in hits if hit is not None), None)


def _code_keys(raw: Any, path: str = "") -> Iterable[str]:
    items = raw.items() if isinstance(raw, Mapping) else enumerate(raw) if isinstance(raw, list) else ()
    for key, value in items:
        here = f"{path}.{key}" if path else str(key)
        if str(key).startswith("_"):
            yield here
        yield from _code_keys(value, here)


def _unknown(name: str, known: Mapping[str, Component]) -> str:
    return f"{name!r} is not known.{nearest(name, list(known))} Known: {', '.join(sorted(known))}"


def _unique(faults: Iterable[Fault]) -> list[Fault]:
    """One fault a place: a union reports each of its branches."""
    return list({fault.path or fault.message: fault for fault in reversed(list(faults))}.values())[::-1]


def _cross_checks(config: RunConfig) -> Iterable[Fault]:
    """What keys must be to one another."""
    yield from _phase_faults(config)
    yield from _batch_faults(config)
    if config.mode == "evaluate" and not config.checkpoint:
        yield Fault("checkpoint", "mode=evaluate needs checkpoint=PATH: a run folder, a checkpoint or a weights file")
    if config.dataset.mean and config.dataset.std and len(config.dataset.mean) != len(config.dataset.std):
        yield Fault("dataset.std", "must have as many values as dataset.mean")
    if config.trainer.amp == "fp16" and config.trainer.device == "cpu":
        yield Fault("trainer.amp", "fp16 needs a GPU; the CPU accepts none, bf16")


def _phase_faults(config: RunConfig) -> Iterable[Fault]:
    for section, phases in (("regime", config.regime.phases), ("data_regime", config.data_regime.phases)):
        yield from _order_faults(section, phases or [])
    optimizer: str | None = None
    for index, phase in enumerate(config.regime.phases or []):
        path = f"regime.phases.{index}"
        yield from _schedule_faults(phase, path)
        optimizer = phase.optimizer or optimizer
        if optimizer is None or (index == 0 and phase.lr is None):
            yield Fault(path, "the first phase needs an optimizer and an lr")
            return
        accepted = COMMON | OPTIMIZERS[optimizer]
        every = set().union(*OPTIMIZERS.values())
        for key in sorted(phase.model_fields_set & every - accepted):
            yield Fault(f"{path}.{key}", f"{optimizer} has no {key}; it takes {', '.join(sorted(accepted))}")
    if config.data_regime.phases and config.data_regime.phases[0].batch_size is None:
        yield Fault("data_regime.phases.0", "the first phase needs a batch_size")


def _batch_faults(config: RunConfig) -> Iterable[Fault]:
    samples = train_samples(config.dataset.name, config.dataset.model_dump() | config.dataset.arguments)
    for index, phase in enumerate(config.data_regime.phases or []):
        if samples is not None and (phase.batch_size or 0) > samples:
            path = f"data_regime.phases.{index}.batch_size"
            yield Fault(
                path, f"{phase.batch_size} is more than the {samples:,} training images of {config.dataset.name}"
            )


def _order_faults(section: str, phases: Sequence[Phase | DataPhase]) -> Iterable[Fault]:
    previous = -1
    units = {"step" if getattr(phase, "step", None) is not None else "epoch" for phase in phases}
    if len(units) > 1:
        yield Fault(f"{section}.phases", "phases are placed by epoch or by step, not by both in one list")
        return
    for index, phase in enumerate(phases):
        start = start_of(phase)
        if start is None or (getattr(phase, "step", None) is not None and phase.epoch is not None):
            yield Fault(f"{section}.phases.{index}", "needs its start: one of epoch, step")
            return
        if index == 0 and start != 0:
            yield Fault(f"{section}.phases.0", f"the first phase must start at 0, not at {start}")
        if start <= previous:
            yield Fault(
                f"{section}.phases.{index}", f"starts at {start}, the phase before it at {previous}: put them in order"
            )
        previous = start


def _schedule_faults(phase: Phase, path: str) -> Iterable[Fault]:
    values: dict[str, Any] = {"lr": phase.lr, "weight_decay": phase.weight_decay, "regularizer": phase.regularizer}
    values |= {f"quant.{key}": value for key, value in (phase.quant or {}).items()}
    for key, value in values.items():
        if isinstance(value, Schedule):
            if value.schedule == "step" and value.every is None:
                yield Fault(f"{path}.{key}", "schedule step needs every: (and gamma:)")
            if value.schedule in {"linear", "warmup", "cosine", "exponential"} and value.end is None:
                yield Fault(f"{path}.{key}", f"schedule {value.schedule} needs to:")
            if value.schedule == "exponential" and not (value.start > 0 and (value.end or 0) > 0):
                yield Fault(f"{path}.{key}", "schedule exponential needs from: and to: above zero")


def start_of(phase: Phase | DataPhase) -> int | None:
    """The epoch or step at which a phase begins."""
    step = phase.step if isinstance(phase, Phase) else None
    return step if step is not None else phase.epoch


def shorthand(config: RunConfig) -> RunConfig:
    """Apply `epochs`, `lr` and `batch_size` of the top level, so that two ways to say a thing are one config."""
    trainer = config.trainer.model_copy(update={"epochs": config.total_epochs})
    regime, data = config.regime, config.data_regime
    lr, batch_size = config.lr, config.batch_size
    if lr is not None and regime.phases is not None:
        regime = regime.model_copy(update={"phases": _rescaled(regime.phases, lr)})
        lr = None
    if batch_size is not None and data.phases is not None:
        ratio = batch_size / (data.phases[0].batch_size or batch_size)
        phases = [
            p.model_copy(update={"batch_size": max(1, round(p.batch_size * ratio)) if p.batch_size else None})
            for p in data.phases
        ]
        data, batch_size = data.model_copy(update={"phases": phases}), None
    update = {
        "trainer": trainer,
        "regime": regime,
        "data_regime": data,
        "epochs": None,
        "lr": lr,
        "batch_size": batch_size,
    }
    return config.model_copy(update=update)


def _rescaled(phases: Sequence[Phase], peak: float) -> list[Phase]:
    """The phases with every learning rate in the same ratio to the highest, which becomes `peak`."""

    def highest(value: Value | None) -> float:
        return max(value.start, value.end or 0.0) if isinstance(value, Schedule) else (value or 0.0)

    ratio = peak / (max(highest(phase.lr) for phase in phases) or peak)

    def scaled(value: Value | None) -> Value | None:
        if isinstance(value, Schedule):
            end = None if value.end is None else value.end * ratio
            return value.model_copy(update={"start": value.start * ratio, "end": end})
        return None if value is None else value * ratio

    return [phase.model_copy(update={"lr": scaled(phase.lr)}) if phase.lr is not None else phase for phase in phases]


IRRELEVANT = {
    "": {"mode", "name", "outputs", "checkpoint", "epochs"},
    "trainer": {"checkpoint_every", "progress", "dashboard"},
    "dataset": {"cache", "workers", "memory"},
    "dataset.arguments": {"root", "download"},
}


def config_hash(config: RunConfig) -> str:
    """Eight hex digits over everything that can change a number of the result."""
    raw = config.model_dump(by_alias=True, exclude_none=True)
    for path, keys in IRRELEVANT.items():
        place = raw
        for part in path.split(".") if path else []:
            place = place[part]
        for key in keys:
            place.pop(key, None)
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()[:8]


def flat(config: RunConfig) -> dict[str, Any]:
    """The config as its YAML files would say it: components' arguments beside their names."""
    raw = config.model_dump(by_alias=True, exclude_unset=False)
    for section in COMPONENTS:
        raw[section] |= raw[section].pop("arguments")
    return raw
