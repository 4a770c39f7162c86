"""The jobs of a sweep: from words with several values to checked configurations and their run folders, thousands of them quickly.

What a word like `seed=3` changes is laid over a config that was composed once for all jobs that choose the same files;
which folder a job has is remembered from one command to the next, as long as no file that decides it has changed.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from runner.compose import base_of, checked, choices_of, conf_folder, config_from, expand, laid_over
from runner.config import OF_FILES
from runner.faults import ConfigError, Fault, StorageError
from runner.files import write_json
from runner.folder import run_path
from runner.schema import RunConfig


@dataclass(frozen=True)
class Job:
    """One configuration of a sweep: its command line, what tells it from the others, and where its run lies."""

    words: tuple[str, ...]
    told_by: tuple[str, ...]
    path: Path

    @property
    def sweeps(self) -> Path:
        """outputs/sweeps, where every job of a sweep keeps what is not its run's own."""
        return self.path.parent.parent / "sweeps"

    @property
    def log(self) -> Path:
        """What it prints."""
        return self.sweeps / "logs" / f"{self.path.name}.log"

    @property
    def label(self) -> str:
        return " ".join(self.told_by) or self.path.name

    @property
    def seed(self) -> int:
        """The seed that its words say; 0 is what conf/config.yaml says."""
        said = [word.partition("=")[2] for word in self.words if _is_seed(word)]
        return int(said[-1]) if said else 0

    @property
    def configuration(self) -> str:
        """The label without the seed: what jobs of several seeds have in common."""
        return " ".join(word for word in self.told_by if not _is_seed(word)) or "this configuration"


def _is_seed(word: str) -> bool:
    return word.lstrip("+").startswith("seed=")


def jobs_of(words: Sequence[str], config_dirs: Sequence[str]) -> list[Job]:
    """Every job of a sweep, a command line each; several may be one run. Raises ConfigError with the faults of all of them."""
    lines, known = expand(words, config_dirs), Folders(words, config_dirs)
    varying = {index for index, column in enumerate(zip(*lines, strict=True)) if len(set(column)) > 1}
    composer, jobs, faults = Composer(config_dirs), list[Job](), list[Fault]()
    for line in lines:
        told_by = tuple(word for index, word in enumerate(line) if index in varying)
        try:
            path = known.get(line) or known.put(line, composer.config(line))
            jobs.append(Job(tuple(line), told_by, path))
        except ConfigError as error:
            job = " ".join(told_by or line)
            faults += [replace(fault, path=job, message=str(fault)) for fault in error.faults]
    if faults:
        raise ConfigError(faults)
    known.save()
    return jobs


class Composer:
    """Checked configs of many command lines that differ in values more than in the files they choose."""

    def __init__(self, config_dirs: Sequence[str]) -> None:
        self.config_dirs = list(config_dirs)
        self.choices = choices_of(folder for folder in config_dirs if Path(folder).is_dir())
        self.bases: dict[tuple[str, ...], DictConfig] = {}

    def config(self, words: Sequence[str]) -> RunConfig:
        """The config of a command line. Raises ConfigError."""
        overrides = [_parsed(word) for word in words]
        plain = [o for o in overrides if self._is_plain_value(o)]
        rest = tuple(word for word, o in zip(words, overrides, strict=True) if not self._is_plain_value(o))
        try:
            if rest not in self.bases:
                self.bases[rest] = base_of(rest, self.config_dirs)
            return checked(laid_over(self.bases[rest], plain))
        except Exception:  # whatever it was: composing it the usual way gives all faults, in words for people
            return config_from(words, self.config_dirs)

    def _is_plain_value(self, override: Override) -> bool:
        key = override.key_or_group
        return key not in self.choices and override.package is None and (override.input_line or "").startswith(key)


@cache
def _parsed(word: str) -> Override:
    return OverridesParser.create().parse_override(word)


def outputs_of(words: Iterable[str]) -> Path:
    """The root of everything that is written, as a command line says it; of several, the first."""
    said = [_parsed(word) for word in words if re.match(r"\+*outputs=", word)]
    if not said:
        return Path("outputs")
    values = said[-1].sweep_iterator() if said[-1].is_sweep_override() else iter([said[-1].value()])
    return Path(str(next(values)))


class Folders:
    """Which run folder a command line has, remembered in a file under outputs/sweeps. Only a saving of time: it may vanish."""

    def __init__(self, words: Sequence[str], config_dirs: Sequence[str]) -> None:
        self.file = outputs_of(words) / "sweeps" / ".folders.json"
        self.digest = _digest([*_code(), *_yaml([conf_folder(), *map(Path, config_dirs)])])
        self.paths: dict[str, str] = {}
        self.new = False
        try:
            found = json.loads(self.file.read_bytes())
            if found["digest"] == self.digest:
                self.paths = {str(line): str(path) for line, path in found["paths"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return

    def get(self, line: Sequence[str]) -> Path | None:
        found = self.paths.get("\n".join(line))
        return Path(found) if found else None

    def put(self, line: Sequence[str], config: RunConfig) -> Path:
        """The path of a config; remembered unless something else decides it too: modules from elsewhere, folders of images."""
        path = run_path(config)
        if not config.plugins and config.dataset.name not in OF_FILES:
            self.paths["\n".join(line)] = str(path)
            self.new = True
        return path

    def save(self) -> None:
        if not self.new:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.file, {"digest": self.digest, "paths": self.paths})
        except (OSError, StorageError):
            return  # the jobs will say what is wrong with the disk


def _code() -> Iterator[Path]:
    """The source that says what configs may hold and how a folder is named."""
    root = Path(__file__).resolve().parents[2]
    for package in ("runner", "models", "quant"):
        yield from (root / package).rglob("*.py")


def _yaml(folders: Iterable[Path]) -> Iterator[Path]:
    for folder in folders:
        yield from folder.rglob("*.yaml")


def _digest(files: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for path in sorted(set(files)):
        found.update(f"{path}\n".encode() + path.read_bytes())
    return found.hexdigest()
