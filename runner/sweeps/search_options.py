"""What a command line of `search` asks for. Nothing heavy is loaded."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runner.compose import own_words, split_options
from runner.faults import ConfigError, Fault
from runner.sweeps.jobs import outputs_of
from runner.sweeps.search_space import Search, read_search

OWN = {"sweep", "search.trials", "search.workers", "search.storage"}


@dataclass(frozen=True)
class Options:
    """What a command line asks for."""

    name: str
    search: Search
    words: list[str]
    config_dirs: list[str]
    workers: int = 1
    storage: str | None = None
    root: Path = field(default_factory=lambda: Path("outputs"))

    @property
    def folder(self) -> Path:
        """One folder a question: the space, the words of its runs and the goals; how many trials is no part of it."""
        asked = self.search.model_dump(mode="json", exclude={"trials"})
        text = json.dumps([asked, [w for w in self.words if not w.lstrip("+").startswith("outputs=")]], sort_keys=True)
        return self.root / "searches" / f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def options_of(words: Sequence[str]) -> Options:
    """Raises ConfigError."""
    words, config_dirs = split_options(words)
    said, rest = own_words(words, OWN)
    unknown = [word for word in rest if word.startswith("search.") or "=" not in word]
    if unknown:
        raise ConfigError(
            [Fault(word, f"is not known here; known: {', '.join(sorted(OWN))}, keys of a run") for word in unknown]
        )
    if "sweep" not in said:
        raise ConfigError([Fault("sweep", "say what to search: sweep=NAME, a file of conf/sweep")])
    found = read_search(said["sweep"], config_dirs)
    found = found.model_copy(update={"trials": _count(said, "search.trials", found.trials)})
    return Options(
        name=said["sweep"],
        search=found,
        words=rest,
        config_dirs=config_dirs,
        workers=_count(said, "search.workers", 1),
        storage=said.get("search.storage"),
        root=outputs_of(rest),
    )


def _count(said: dict[str, str], key: str, default: int) -> int:
    value = said.get(key, str(default))
    if not value.isdigit() or int(value) < 1:
        raise ConfigError([Fault(key, f"{value!r} is not a whole number of at least 1")])
    return int(value)
