"""From what Hydra composed to a checked `RunConfig`, or to one message with everything that is wrong with it. No torch here."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, TypeVar, get_origin

from pydantic import BaseModel, ValidationError, create_model

from runner.catalog import MISSING, Component, catalog
from runner.data.locations import missing, which_files
from runner.faults import Absent, ConfigError, Fault, UnknownKey, nearest, shortened
from runner.relations import relation_faults
from runner.schema import (
    DataPhase,
    DataRegimeConfig,
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
    """The checked config. Raises ConfigError with every fault; places in `skip` are known to be wrong already."""
    faults = list(_never_accepted(raw))
    known, found = _known(raw.get("plugins"))
    folded = dict(raw)
    faults += found
    for section in COMPONENTS:
        folded[section], found = _fold(section, raw.get(section), known[section])
        faults += found
        if section == "dataset" and not found:
            faults += _data_faults(folded[section])
    config, found = _validate(RunConfig, folded, "")
    found = [_with_its_places(fault, folded, known) for fault in found]
    hopeless = {fault.path for fault in faults if fault.path in COMPONENTS}
    faults += [fault for fault in found if fault.path.split(".")[0] not in hopeless]
    parts = dict(shorthand(config)) if config is not None and not faults else _right_parts(folded, faults)
    faults += relation_faults(parts, known["quant"])
    faults = _unique(f for f in faults if not any(_is_within(f.path, place) for place in skip))
    if faults or config is None:
        raise ConfigError(faults)
    return shorthand(config)


def _known(plugins: Any) -> tuple[dict[str, dict[str, Component]], list[Fault]]:
    """What can be named, with the plugins where they can be read."""
    if not isinstance(plugins, list) or not all(isinstance(plugin, str) for plugin in plugins):
        return catalog(), []  # the schema says so
    try:
        return catalog(tuple(plugins)), []
    except ValueError as error:
        return catalog(), [Fault("plugins", str(error))]


def _right_parts(folded: Mapping[str, Any], faults: Iterable[Fault]) -> dict[str, Any]:
    """The sections without a fault of their own, so that their relations are judged in the same message."""
    wrong = {fault.path.split(".")[0] for fault in faults}
    fields = {key: (info.annotation, info) for key, info in RunConfig.model_fields.items() if key not in wrong}
    parts = dict(create_model("Parts", __base__=Strict, **fields).model_validate({key: folded[key] for key in fields}))  # type: ignore[call-overload]
    if parts.get("batch_size") and "data_regime" in parts and parts["data_regime"].phases is not None:
        phases = with_batch_size(parts["data_regime"].phases, parts["batch_size"])
        parts["data_regime"] = DataRegimeConfig(phases=phases)
    return parts


def _is_within(path: str, place: str) -> bool:
    return path == place or path.startswith(f"{place}.")


def _fold(section: str, raw: Any, known: Mapping[str, Component]) -> tuple[dict[str, Any], list[Fault]]:
    """Move the component's own keys under `arguments`, checked against its signature."""
    if not isinstance(raw, Mapping) or not isinstance(raw.get("name"), str):
        return {"name": ""}, [Fault(section, f"must be a mapping with a name; known: {', '.join(sorted(known))}")]
    name = raw["name"]
    plain = {key: raw[key] for key in raw if key in PLAIN_KEYS.get(section, set())}
    if name not in known:
        return {"name": name, **plain}, [Fault(f"{section}.name", _unknown(name, known))]
    own = {key: raw[key] for key in raw if key not in plain and key != "name"}
    extra = sorted(PLAIN_KEYS.get(section, ()))
    arguments, faults = _validate(_signature(known[name]), own, section, extra)
    values = {key: getattr(arguments, key) for key in known[name].arguments} if arguments else own
    if section == "quant":
        faults += _rule_faults(plain.get("rules"), known[name])
    return {"name": name, "arguments": values, **plain}, faults


def _data_faults(dataset: Mapping[str, Any]) -> Iterable[Fault]:
    """Whether the data set is where the config says, before anything else is done with it."""
    try:
        problem = missing(dataset["name"], dataset["arguments"])
    except OSError as error:
        problem = f"cannot be read: {error}"
    if problem:
        yield Absent("dataset.root", problem)


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
    unknown_key = error["type"] == "extra_forbidden"
    *outer, last = error["loc"]
    where = [part for part in outer if not _is_union_branch(part)]
    where += [last] if unknown_key or not _is_union_branch(last) else []
    full = ".".join(str(part) for part in ([path] if path else []) + where)
    if unknown_key:
        return UnknownKey.at(full, [*_keys_at(model, where[:-1]), *also])
    if error["type"] == "missing":
        return Fault(full, "is missing")
    value = shortened(error["input"])
    meant = MEANT.get(error.get("ctx", {}).get("class_name", error["type"]))
    if meant is not None:
        return Fault(full, f"value should be {meant}, not {value}")
    if error["type"] == "literal_error":
        accepted = error["ctx"]["expected"]
        words = [word.strip("' ") for word in accepted.replace(" or ", ", ").split(",")]
        return Fault(full, f"{value} is not accepted: {accepted}.{nearest(str(error['input']), words)}")
    return Fault(full, f"{error['msg'].replace('Input', 'value', 1)}, not {value}")


def _with_its_places(fault: Fault, folded: Mapping[str, Any], known: Mapping[str, Mapping[str, Component]]) -> Fault:
    """An unknown key of the top level that is one of a section: its fault says where."""
    if not isinstance(fault, UnknownKey) or "." in fault.path:
        return fault
    return UnknownKey.at(fault.path, fault.known, _places_of(fault.path, folded, known))


def _places_of(key: str, folded: Mapping[str, Any], known: Mapping[str, Mapping[str, Component]]) -> list[str]:
    """The paths that end in a key; in components that are not chosen only where it is nowhere else."""
    places = [path for path in _paths(RunConfig) if path.rpartition(".")[2] == key]
    others: list[str] = []
    for section, components in known.items():
        takers = sorted(name for name, component in components.items() if key in component.arguments)
        if folded[section]["name"] in takers:
            places.append(f"{section}.{key}")
        elif takers:
            others.append(f"{section}.{key} (of {section}={', '.join(takers)})")
    return places or others


def _paths(model: type[BaseModel], above: str = "") -> Iterable[str]:
    """The paths of all keys of a model that hold values; N stands for an index of a list."""
    for key, info in model.model_fields.items():
        inner, here = _model_in(info.annotation), f"{above}{info.alias or key}"
        if inner in (None, Schedule):
            yield here
        else:
            yield from _paths(inner, f"{here}.N." if _holds_list(info.annotation) else f"{here}.")


def _holds_list(annotation: Any) -> bool:
    return get_origin(annotation) is list or any(map(_holds_list, getattr(annotation, "__args__", ())))


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


def _never_accepted(raw: Any, path: str = "") -> Iterable[Fault]:
    """Keys that name code, and text that no file can hold, anywhere in a config."""
    if isinstance(raw, str) and raw != raw.encode(errors="replace").decode():
        yield Fault(path, "is not text: it holds bytes that are no UTF-8")
    items = raw.items() if isinstance(raw, Mapping) else enumerate(raw) if isinstance(raw, list) else ()
    for key, value in items:
        here = f"{path}.{key}" if path else str(key)
        if str(key).startswith("_"):
            yield Fault(here, "configs are data: a key that starts with '_' names code and is refused")
        yield from _never_accepted(value, here)


def _unknown(name: str, known: Mapping[str, Component]) -> str:
    return f"{name!r} is not known.{nearest(name, list(known))} Known: {', '.join(sorted(known))}"


def _unique(faults: Iterable[Fault]) -> list[Fault]:
    """One fault a place, and none for a place where a deeper one says more, or for a key that only repeats its short form."""
    at: dict[str, Fault] = {}
    for fault in faults:
        place = fault.path or fault.message
        at[place] = _either(at[place], fault) if place in at else fault
    found = list(at.values())
    return [f for f in found if not any(_is_within(o.path, f.path) or _repeats(f, o) for o in found if o is not f)]


def _either(first: Fault, other: Fault) -> Fault:
    """A union reports each of its branches: where a text fits none of them, all are told."""
    (said, _, value), (also, _, again) = (fault.message.rpartition(", not ") for fault in (first, other))
    if not (value == again and value.startswith("'") and also.startswith("value should be ")) or also in said:
        return first
    return Fault(first.path, f"{said} or {also.removeprefix('value should be ')}, not {value}")


def _repeats(fault: Fault, short: Fault) -> bool:
    inside = _is_within(fault.path, short.path)
    return fault.message == short.message and fault.path.endswith(f".{short.path}") and not inside


def shorthand(config: RunConfig) -> RunConfig:
    """Apply `epochs`, `lr` and `batch_size` of the top level, so that two ways to say a thing are one config."""
    trainer = config.trainer.model_copy(update={"epochs": config.total_epochs})
    regime, data = config.regime, config.data_regime
    lr, batch_size = config.lr, config.batch_size
    if lr is not None and regime.phases is not None:
        regime, lr = regime.model_copy(update={"phases": with_peak(regime.phases, lr)}), None
    if batch_size is not None and data.phases is not None:
        data, batch_size = data.model_copy(update={"phases": with_batch_size(data.phases, batch_size)}), None
    update = {
        "trainer": trainer,
        "regime": regime,
        "data_regime": data,
        "epochs": None,
        "lr": lr,
        "batch_size": batch_size,
    }
    return config.model_copy(update=update)


def with_batch_size(phases: Sequence[DataPhase], first: int) -> list[DataPhase]:
    """The phases with every batch size in the same ratio to the first, which becomes `first`."""
    ratio = first / (phases[0].batch_size or first)
    sizes = [max(1, round(p.batch_size * ratio)) if p.batch_size else None for p in phases]
    return [p.model_copy(update={"batch_size": size}) for p, size in zip(phases, sizes, strict=True)]


def with_peak(phases: Sequence[Phase], peak: float) -> list[Phase]:
    """The phases with every learning rate in the same ratio to the highest, which becomes `peak`."""

    def highest(value: Value | None) -> float:
        return max(value.start, value.end or 0.0) if isinstance(value, Schedule) else (value or 0.0)

    top = max(highest(phase.lr) for phase in phases) or 1.0

    def scaled(value: Value) -> Value:
        if isinstance(value, Schedule):
            end = None if value.end is None else peak * (value.end / top)
            return value.model_copy(update={"start": peak * (value.start / top), "end": end})
        return peak * (value / top)

    return [p.model_copy(update={"lr": scaled(p.lr)}) if p.lr is not None else p for p in phases]


MEANT = {  # by the kind of pydantic's error, or the model that was missed: the schema has one pattern
    "string_pattern_mismatch": "minutes, such as 10min",
    "Schedule": "a schedule, such as {schedule: cosine, from: 0.1, to: 0}",
}
OF_FILES = ("folder", "imagenet")  # data sets that are what lies in a folder; their images may be streamed
IRRELEVANT = {
    "": {"mode", "name", "outputs", "checkpoint", "epochs", "curve"},
    "regime": {"epochs"},  # trainer.epochs says it
    "trainer": {"checkpoint_every", "progress", "dashboard", "recompute"},
    "quant.arguments": {"kernel"},  # floats or packed bits: the same numbers
    "dataset": {"cache", "workers"},
    "dataset.arguments": {"root", "download"},
}
AS_BEFORE: dict[str, dict[str, Any]] = {  # what every run did before there was a key to say so
    "trainer": {"backward": "exact", "sync_norm": True},
    "dataset": {"memory": "auto"},  # streamed images are resized before they are cropped, those in memory after
    "quant.arguments": {"standardise": False, "tau": None, "binary_weights": True},
}


def config_hash(config: RunConfig) -> str:
    """Eight hex digits over everything that can change a number of the result."""
    raw = config.model_dump(by_alias=True, exclude_none=True)
    if config.trainer.on_nan == "stop":
        del raw["trainer"]["on_nan"]  # the numbers of a run that came to its end do not depend on it
    for path, before in AS_BEFORE.items():
        place = _at(raw, path)
        for key in [key for key in before if key in place and place[key] == before[key]]:
            del place[key]
    if config.dataset.name not in OF_FILES:
        raw["dataset"].pop("memory", None)
    if which := which_files(config.dataset.name, config.dataset.arguments):
        raw["dataset"]["which"] = which
    for path, keys in IRRELEVANT.items():
        place = _at(raw, path)
        for key in keys:
            place.pop(key, None)
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()[:8]


def _at(raw: dict[str, Any], path: str) -> dict[str, Any]:
    return reduce(lambda place, part: place[part], path.split(".") if path else [], raw)


def flat(config: RunConfig) -> dict[str, Any]:
    """The config as its YAML files would say it: components' arguments beside their names, in phases only what they set."""
    raw = config.model_dump(by_alias=True)
    for section in COMPONENTS:
        raw[section] |= raw[section].pop("arguments")
    for section in ("regime", "data_regime"):
        said = getattr(config, section).model_dump(by_alias=True, exclude_none=True)
        raw[section]["phases"] = said.get("phases")
    return raw
