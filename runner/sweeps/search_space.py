"""What is searched: conf/sweep/NAME.yaml, checked; and from a trial's values to the command line of its run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import yaml
from annotated_types import Ge
from pydantic import Field, ValidationError, model_validator

from runner.compose import compose_words, conf_folder, quoted
from runner.faults import ConfigError, Fault, nearest
from runner.schema import PositiveInt, Strict

Scalar = bool | int | float | str | None
Objective = Literal[
    "best_val_top1", "weight_bits", "packed_bytes", "saved_bytes_per_sample", "train_seconds", "images_per_s"
]


class Range(Strict):
    """Numbers from `from` to `to`, both included; whole numbers where both are."""

    low: int | float = Field(alias="from")
    high: int | float = Field(alias="to")
    log: bool = False
    step: int | float | None = None

    @model_validator(mode="after")
    def _in_order(self) -> "Range":
        if self.low > self.high:
            raise ValueError("`from` is larger than `to`")
        if self.log and self.low <= 0:
            raise ValueError("`log` needs a `from` above 0")
        if self.log and self.step is not None:
            raise ValueError("give either `log` or `step`")
        if self.step is not None and self.step <= 0:
            raise ValueError("`step` must be above 0")
        return self

    def some(self) -> Scalar:
        return self.low


class Choices(Strict):
    """One of a list."""

    choices: Annotated[list[Scalar], Field(min_length=1)]

    def some(self) -> Scalar:
        return self.choices[0]


Dimension = Range | Choices


class Pruner(Strict):
    """Stops a trial whose validation accuracy after an epoch is below the median of the trials before it."""

    after_trials: Annotated[int, Ge(1)] = 5
    after_epochs: Annotated[int, Ge(0)] = 1


class Search(Strict):
    """A whole file of conf/sweep."""

    words: list[str]
    space: dict[str, Dimension]
    rules: list[dict[str, Any]] = Field(default_factory=list)
    objectives: Annotated[dict[Objective, Literal["maximize", "minimize"]], Field(min_length=1)]
    trials: PositiveInt
    sampler: Literal["tpe", "random", "nsga2"] = "tpe"
    seed: Annotated[int, Ge(0)] = 0
    pruner: Pruner | None = None

    @model_validator(mode="after")
    def _prunable(self) -> "Search":
        if self.pruner and list(self.objectives) != ["best_val_top1"]:
            raise ValueError(
                "a pruner needs best_val_top1 as the only objective: with several, nothing says which trial is worse"
            )
        return self

    def dimensions(self) -> dict[str, Dimension]:
        """Everything that a trial chooses, by name; `rules.LAYER.KEY` for what a rule leaves open."""
        found = dict(self.space)
        for rule in self.rules:
            found |= {f"rules.{rule['match']}.{key}": value for key, value in rule.items() if _is_open(value)}
        return found


def _is_open(value: object) -> bool:
    return isinstance(value, Range | Choices)


class Chooser(Protocol):
    """The part of an Optuna trial that chooses."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int: ...
    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...
    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


def chosen(search: Search, trial: Chooser) -> dict[str, Scalar]:
    """A value for every dimension."""
    return {name: _suggested(trial, name, dimension) for name, dimension in search.dimensions().items()}


def _suggested(trial: Chooser, name: str, dimension: Dimension) -> Scalar:
    if isinstance(dimension, Choices):
        return trial.suggest_categorical(name, dimension.choices)  # type: ignore[no-any-return]
    low, high, step = dimension.low, dimension.high, dimension.step
    if isinstance(low, int) and isinstance(high, int) and not isinstance(step, float):
        return trial.suggest_int(name, low, high, step=step or 1, log=dimension.log)
    return trial.suggest_float(name, low, high, step=step, log=dimension.log)


def words_of(
    search: Search, values: Mapping[str, Scalar], more: Sequence[str], config_dirs: Sequence[str]
) -> list[str]:
    """The command line of a trial; rules for its layers stand before those of the quantizer."""
    words = [*search.words, *more, *(f"{key}={_written(values[key])}" for key in search.space)]
    if not search.rules:
        return words
    own = [
        {key: values[f"rules.{rule['match']}.{key}"] if _is_open(value) else value for key, value in rule.items()}
        for rule in search.rules
    ]
    others = compose_words(words, config_dirs).raw.get("quant", {}).get("rules", [])
    return [*words, f"quant.rules={_written([*own, *others])}"]


def _written(value: object) -> str:
    """A value in the grammar of overrides.

    >>> _written([{"match": "conv1", "weight_bits": 2, "keep": False}])
    "[{match: 'conv1', weight_bits: 2, keep: false}]"
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_written(item) for item in value) + "]"
    if isinstance(value, str):
        return quoted(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def searches(config_dirs: Sequence[str] = ()) -> dict[str, Path]:
    """Every conf/sweep/NAME.yaml by its name; the user's own folders win."""
    folders = [conf_folder(), *map(Path, config_dirs)]
    return {path.stem: path for folder in folders for path in sorted((folder / "sweep").glob("*.yaml"))}


def read_search(name: str, config_dirs: Sequence[str] = ()) -> Search:
    """Raises ConfigError with everything that is wrong with it."""
    known = searches(config_dirs)
    if name not in known:
        message = f"{name!r} is not there.{nearest(name, list(known))} Known: {', '.join(known)}"
        raise ConfigError([Fault("sweep", message)])
    try:
        raw = yaml.safe_load(known[name].read_text(encoding="utf-8"))
        raw["rules"] = [_opened(rule) for rule in raw.get("rules", [])]
        return Search.model_validate(raw)
    except ValidationError as error:
        faults = [(".".join(map(str, e["loc"])), str(e["msg"])) for e in error.errors()]
        raise ConfigError([Fault(f"{known[name]}: {path}", message) for path, message in faults]) from error
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, AttributeError, KeyError) as error:
        raise ConfigError([Fault(str(known[name]), f"cannot be read: {error}")]) from error


def _opened(rule: Mapping[str, Any]) -> dict[str, Any]:
    """A rule as YAML says it, with its ranges and choices recognised."""
    if not isinstance(rule["match"], str):
        raise TypeError("`match` of a rule must be one layer or pattern")
    return {key: _dimension(value) for key, value in rule.items()}


def _dimension(value: Any) -> Any:
    if isinstance(value, dict) and "choices" in value:
        return Choices.model_validate(value)
    if isinstance(value, dict) and "from" in value:
        return Range.model_validate(value)
    return value
