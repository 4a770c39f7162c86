"""From words on the command line to a plain nested dict, with Hydra; everything that cannot be composed becomes a Fault."""

import copy
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runner.config import check
from runner.faults import ConfigError, Fault, lies_there, nearest, shortened
from runner.schema import RunConfig

CONF = Path(__file__).resolve().parent.parent / "conf"
OPTIONS = ("--help", "--version", "--multirun", "-m", "--config-dir", "--cfg")
RESOLVER = re.compile(r"\$\{[^}]*:")


@dataclass
class Composition:
    """What came of a command line: the raw config, what was wrong, and the places that are known to be wrong by it."""

    raw: dict[str, Any] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    wrong: set[str] = field(default_factory=set)


def config_from(words: Sequence[str], config_dirs: Sequence[str] = ()) -> RunConfig:
    """The checked config of a command line. Raises ConfigError with every fault that it has."""
    return checked(compose_words(words, config_dirs))


def checked(composition: Composition) -> RunConfig:
    """The config of a composition. Raises ConfigError with every fault, of composing and of the values."""
    try:
        config = check(composition.raw, skip=composition.wrong)
    except ConfigError as error:
        raise ConfigError([*composition.faults, *error.faults]) from None
    if composition.faults:
        raise ConfigError(composition.faults)
    return config


def compose_words(words: Sequence[str], config_dirs: Sequence[str] = ()) -> Composition:
    """Compose what can be composed and list what cannot."""
    result = Composition()
    with _configs():
        result.raw = _composed(_accepted(words, config_dirs, result), result)
    return result


def base_of(words: Sequence[str], config_dirs: Sequence[str] = ()) -> DictConfig:
    """What the words compose to, not yet resolved: for `laid_over`. Raises ConfigError."""
    result = Composition()
    with _configs():
        accepted = _accepted(words, config_dirs, result)
        if result.faults:
            raise ConfigError(result.faults)
        return compose("config", overrides=accepted)


def laid_over(base: DictConfig, changes: Iterable[Override]) -> Composition:
    """The same as composing all words at once, where the changes are plain values: a thousand times in a second or two."""
    result, config = Composition(), copy.deepcopy(base)
    for change in changes:
        OmegaConf.update(config, change.key_or_group, change.value(), merge=True, force_add=True)
    result.raw = _resolved(config, result)
    return result


def _accepted(words: Sequence[str], config_dirs: Sequence[str], result: Composition) -> list[str]:
    """The words that can be handed to Hydra, as it takes them; the others become faults."""
    overrides = [o for word in words if (o := _parsed(word, result)) is not None]
    found = [folder for folder in config_dirs if Path(folder).is_dir()]
    result.faults += [Fault("--config-dir", f"there is no folder {d}") for d in config_dirs if d not in found]
    choices = choices_of(found)
    good = [_forced(o, choices) for o in overrides if _is_for_a_run(o, result) and _choice_exists(o, choices, result)]
    return [*search_path(found), *good]


def search_path(config_dirs: Sequence[str]) -> list[str]:
    """The override that makes Hydra look into the user's own folders too."""
    folders = [quoted(f"file://{Path(folder).resolve()}") for folder in config_dirs]
    return [f"hydra.searchpath=[{','.join(folders)}]"] if folders else []


def quoted(text: str) -> str:
    """Text as Hydra's grammar reads it back: a backslash is an escape before a quote only."""
    return "'" + re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", "\\'") + "'"


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
    if word.startswith("-"):
        meant = f" Did you mean {word.lstrip('-')!r}?" if "=" in word else nearest(word, OPTIONS)
        result.faults.append(Fault(word, f"no such option.{meant} Known: {', '.join(OPTIONS)}"))
        return None
    if _is_path(word):
        result.faults.append(Fault("", f"cannot read {shortened(word)}: it is a path; did you mean checkpoint={word}?"))
        result.wrong.add("checkpoint")
        return None
    try:
        override = OverridesParser.create().parse_override(word)
        problem = "" if override.key_or_group else "it has no key"
    except Exception as error:  # whatever the parser trips over (too long, too deep, …), the word is what is wrong
        override, problem = None, _first_line(error)
    if problem:
        hint = "write key=value; quote a value with spaces, commas or brackets: 'name=\"a b\"'"
        result.faults.append(Fault("", f"cannot read {shortened(word)} ({problem}); {hint}"))
        return None
    return override


def _is_path(word: str) -> bool:
    """Whether a word that sets nothing is the name of a file or a folder."""
    return "=" not in word and bool(word) and lies_there(word)


def _is_for_a_run(override: Override, result: Composition) -> bool:
    """Several values and Hydra's own settings belong to a sweep."""
    key, quoted = override.key_or_group, "'key=\"a,b\"'"
    if override.is_sweep_override():
        message = f"several values need a sweep: add -m (--multirun); for one value with a comma write {quoted}"
        result.faults.append(Fault(key, message))
    elif key == "sweep":
        result.faults.append(Fault(key, f"says what to search: python -m runner search sweep={override.value()}"))
    elif re.match(r"hydra\b", key):
        result.faults.append(
            Fault(key, "Hydra's own settings mean something in a sweep (-m) only; runs go to outputs=DIR")
        )
    else:
        return True
    return False


def _choice_exists(override: Override, choices: dict[str, list[str]], result: Composition) -> bool:
    group, value = override.key_or_group, override.value()
    if group not in choices or isinstance(value, dict) or override.is_delete() or str(value) in choices[group]:
        return True
    known = choices[group]
    result.faults.append(Fault(group, f"{value!r} is not there.{nearest(str(value), known)} Known: {', '.join(known)}"))
    result.wrong.add(group)
    return False


def _forced(override: Override, choices: dict[str, list[str]]) -> str:
    """A value is set whether or not the YAML has the key: the closed schema judges it, with a better message than Hydra's."""
    line = override.input_line or ""
    is_value = override.key_or_group not in choices or isinstance(override.value(), dict)
    return f"++{line}" if is_value and not line.startswith(("+", "~")) else line


def _composed(overrides: list[str], result: Composition) -> dict[str, Any]:
    """Compose; an override that Hydra refuses is reported and left out, so that the others are still judged."""
    kept: list[str] = []
    config: DictConfig | None = None
    try:
        config = compose("config", overrides=overrides)
    except Exception:  # Hydra has many ways to say no, its own errors and others; one of the words is what is wrong
        for override in overrides:
            try:
                config = compose("config", overrides=[*kept, override])
                kept.append(override)
            except Exception as error:
                message = f"{shortened(override.lstrip('+'))} cannot be applied: {_first_line(error)}"
                result.faults.append(Fault("", message))
    return _resolved(config if config is not None else compose("config"), result)


def _resolved(config: DictConfig, result: Composition) -> dict[str, Any]:
    """Interpolations between keys are resolved; resolvers such as oc.env are refused, so no secret is ever written down."""
    for path, text in list(_strings(OmegaConf.to_container(config, resolve=False))):
        problem = _problem(config, path, text)
        if problem:
            result.faults.append(Fault(path, problem))
            result.wrong.add(path)
            OmegaConf.update(config, path, None, force_add=True)
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def _problem(config: DictConfig, path: str, text: str) -> str:
    """What keeps a text from being a value; empty where nothing does."""
    if RESOLVER.search(text):
        return f"{text!r} calls a resolver; only ${{other.key}} is allowed"
    if text == "???":
        return "is missing"
    try:
        OmegaConf.select(config, path, throw_on_resolution_failure=True)
    except OmegaConfBaseException as error:
        return f"{text!r} does not resolve: {_first_line(error)}"
    return ""


def _strings(raw: Any, path: str = "") -> Iterable[tuple[str, str]]:
    items = raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else ()
    for key, value in items:
        here = f"{path}.{key}" if path else str(key)
        if isinstance(value, str):
            yield here, value
        yield from _strings(value, here)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def split_options(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides, and the folders of `--config-dir DIR`. Raises ConfigError where no folder is said."""
    overrides: list[str] = []
    config_dirs: list[str] = []
    pending = iter(words)
    for word in pending:
        key, _, value = word.partition("=")
        if key in {"--config-dir", "-cd"}:
            folder = value or next(pending, "")
            if not folder:
                raise ConfigError([Fault("--config-dir", "say a folder: --config-dir DIR")])
            config_dirs.append(folder)
        else:
            overrides.append(word)
    return overrides, config_dirs


def own_words(words: Sequence[str], own: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """What a verb's own keys are set to, the last word of each, and the words that are left: those of a run.

    >>> own_words(["n=3", "quant=xnor", "n=5"], {"n"})
    ({'n': '5'}, ['quant=xnor'])
    """
    pairs = [(word, *word.partition("=")) for word in words]
    said = {key: value for _, key, _, value in pairs if key in own}
    return said, [word for word, key, *_ in pairs if key not in own]


def keys_of(words: Sequence[str]) -> list[str]:
    """The paths that a command line sets."""
    return [override.key_or_group for override in OverridesParser.create().parse_overrides(list(words))]


def expand(words: Sequence[str], config_dirs: Sequence[str] = ()) -> list[list[str]]:
    """The jobs of a sweep, each as a command line; Hydra's own settings are for the sweep, not for its jobs.

    Raises ConfigError for what cannot be read.
    """
    result = Composition()
    overrides = [o for word in words if (o := _parsed(word, result)) is not None]
    if result.faults:
        raise ConfigError(result.faults)
    overrides = [o for o in overrides if not re.match(r"hydra\b", o.key_or_group)]
    choices = choices_of(config_dirs)
    axes = [
        [f"{o.get_key_element()}={value}" for value in _values_of(o, choices)]
        if o.is_sweep_override()
        else [o.input_line]
        for o in overrides
    ]
    return [[str(word) for word in job] for job in product(*axes)]


def _values_of(override: Override, choices: Mapping[str, Sequence[str]]) -> Iterable[str]:
    """The values that a sweep goes through; `quant=glob(*)` is all there are."""
    value = override.value()
    if not isinstance(value, Glob):
        return override.sweep_string_iterator()
    names = value.filter(list(choices.get(override.key_or_group, ())))
    if not names:
        group = override.key_or_group
        raise ConfigError([Fault(group, f"{override.input_line!r} fits no file of conf/{group}")])
    return names
