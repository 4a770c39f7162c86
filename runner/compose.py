"""From words on the command line to a plain nested dict, with Hydra; everything that cannot be composed becomes a Fault."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runner.config import check
from runner.faults import ConfigError, Fault, nearest
from runner.schema import RunConfig

CONF = Path(__file__).resolve().parent.parent / "conf"
RESOLVER = re.compile(r"\$\{[^}]*:")


@dataclass
class Composition:
    """What came of a command line: the raw config, what was wrong, and the sections whose choice was wrong."""

    raw: dict[str, Any] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    wrong_sections: set[str] = field(default_factory=set)


def config_from(words: Sequence[str], config_dirs: Sequence[str] = ()) -> RunConfig:
    """The checked config of a command line. Raises ConfigError with every fault that it has."""
    composition = compose_words(words, config_dirs)
    try:
        config = check(composition.raw, skip=composition.wrong_sections)
    except ConfigError as error:
        raise ConfigError([*composition.faults, *error.faults]) from None
    if composition.faults:
        raise ConfigError(composition.faults)
    return config


def compose_words(words: Sequence[str], config_dirs: Sequence[str] = ()) -> Composition:
    """Compose what can be composed and list what cannot."""
    result = Composition()
    with _configs():
        overrides = [o for word in words if (o := _parsed(word, result)) is not None]
        choices = choices_of(config_dirs)
        good = [_forced(o) for o in overrides if _choice_exists(o, choices, result)]
        search = [f"hydra.searchpath=[{', '.join('file://' + str(Path(d).resolve()) for d in config_dirs)}]"]
        result.raw = _composed([*good, *(search if config_dirs else [])], result)
    return result


def _configs() -> Any:
    """Hydra's view of conf/: beside the packages in a checkout, inside the runner package when it was installed."""
    if (CONF / "config.yaml").is_file():
        return initialize_config_dir(str(CONF), version_base="1.3", job_name="runner")
    return initialize_config_module("runner.conf", version_base="1.3", job_name="runner")


def conf_folder() -> Path:
    """Where the shipped YAML files lie."""
    return CONF if (CONF / "config.yaml").is_file() else Path(__file__).resolve().parent / "conf"


def choices_of(config_dirs: Iterable[str] = ()) -> dict[str, list[str]]:
    """The config groups, and what can be chosen in each."""
    found: dict[str, set[str]] = {}
    for root in [conf_folder(), *map(Path, config_dirs)]:
        for path in root.glob("*/*.yaml"):
            found.setdefault(path.parent.name, set()).add(path.stem)
    return {group: sorted(names) for group, names in sorted(found.items())}


def _parsed(word: str, result: Composition) -> Override | None:
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        first = str(error).splitlines()[0]
        hint = "write key=value; quote a value with spaces, commas or brackets: 'name=\"a b\"'"
        result.faults.append(Fault("", f"cannot read {word!r} ({first}); {hint}"))
        return None


def _choice_exists(override: Override, choices: dict[str, list[str]], result: Composition) -> bool:
    group, value = override.key_or_group, override.value()
    if group not in choices or isinstance(value, dict):
        return True
    if override.is_sweep_override():
        result.faults.append(Fault(group, "several values need a sweep: add -m (--multirun)"))
        return False
    if value is None or str(value) in choices[group]:
        return True
    known = choices[group]
    result.faults.append(Fault(group, f"{value!r} is not there.{nearest(str(value), known)} Known: {', '.join(known)}"))
    result.wrong_sections.add(group)
    return False


def _forced(override: Override) -> str:
    """A value is set whether or not the YAML has the key: the closed schema judges it, with a better message than Hydra's."""
    line = override.input_line or ""
    is_value = "." in override.key_or_group or override.key_or_group not in choices_of()
    plain = is_value and not line.startswith(("+", "~")) and not override.key_or_group.startswith("hydra")
    return f"++{line}" if plain else line


def _composed(overrides: list[str], result: Composition) -> dict[str, Any]:
    """Compose; an override that Hydra refuses is reported and left out, so that the others are still judged."""
    kept: list[str] = []
    config: DictConfig | None = None
    try:
        config = compose("config", overrides=overrides)
    except (HydraException, OmegaConfBaseException):
        for override in overrides:
            try:
                config = compose("config", overrides=[*kept, override])
                kept.append(override)
            except (HydraException, OmegaConfBaseException) as error:
                result.faults.append(Fault("", f"{override.lstrip('+')!r} cannot be applied: {_first_line(error)}"))
    return _resolved(config if config is not None else compose("config"), result)


def _resolved(config: DictConfig, result: Composition) -> dict[str, Any]:
    """Interpolations between keys are resolved; resolvers such as oc.env are refused, so no secret is ever written down."""
    plain = OmegaConf.to_container(config, resolve=False)
    for path, text in _strings(plain):
        if RESOLVER.search(text):
            result.faults.append(Fault(path, f"{text!r} calls a resolver; only ${{other.key}} is allowed"))
    if result.faults and any(RESOLVER.search(text) for _, text in _strings(plain)):
        return plain  # type: ignore[return-value]
    try:
        return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        result.faults.append(Fault("", f"an interpolation does not resolve: {_first_line(error)}"))
        return plain  # type: ignore[return-value]


def _strings(raw: Any, path: str = "") -> Iterable[tuple[str, str]]:
    items = raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else ()
    for key, value in items:
        here = f"{path}.{key}" if path else str(key)
        if isinstance(value, str):
            yield here, value
        yield from _strings(value, here)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def split_options(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides, and the folders of `--config-dir DIR`."""
    overrides: list[str] = []
    config_dirs: list[str] = []
    pending = iter(words)
    for word in pending:
        if word in {"--config-dir", "-cd"}:
            config_dirs.append(next(pending, "."))
        elif word.startswith("--config-dir="):
            config_dirs.append(word.partition("=")[2])
        else:
            overrides.append(word)
    return overrides, config_dirs


def keys_of(words: Sequence[str]) -> list[str]:
    """The paths that a command line sets."""
    return [override.key_or_group for override in OverridesParser.create().parse_overrides(list(words))]


def expand(words: Sequence[str]) -> list[list[str]]:
    """The jobs of a sweep, each as a command line. Raises ConfigError for what cannot be read."""
    result = Composition()
    overrides = [o for word in words if (o := _parsed(word, result)) is not None]
    if result.faults:
        raise ConfigError(result.faults)
    axes = [
        [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [o.input_line]
        for o in overrides
    ]
    return [[str(word) for word in job] for job in product(*axes)]
