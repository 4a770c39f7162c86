"""Look for the best settings: Optuna chooses, every trial is a run of its own, and one study file remembers everything.

    python -m runner search sweep=NAME [key=value …] [search.trials=50] [search.workers=2] [search.storage=URL]

The same command again goes on where it was, however it ended; the same command in a second terminal works along.
A trial is a run folder like any other, so a trial that was killed resumes at its last checkpoint.
"""

import hashlib
import json
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from runner.compose import config_from, split_options
from runner.faults import ConfigError, Exit, Fault
from runner.folder import run_path
from runner.screen import Screen
from runner.search_space import Search, read_search, words_of

OWN = {"sweep", "search.trials", "search.workers", "search.storage"}
LOOK_EVERY = 0.5  # seconds between two looks at the runs under way


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
        text = json.dumps([asked, [w for w in self.words if not w.startswith("outputs=")]], sort_keys=True)
        return self.root / "searches" / f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def search(words: Sequence[str]) -> int:
    """Run trials until there are as many as were asked for; 1 where none came to an end."""
    if not _has_optuna():
        raise ConfigError([Fault("search", "needs Optuna: pip install 'lowbit-runner[search]', or -e '.[search]'")])
    options = options_of(words)
    _check_one(options)
    from runner.search_loop import Study, run_trials

    options.folder.mkdir(parents=True, exist_ok=True)
    screen, study = Screen("plain"), Study.open(options)
    try:
        with _interruptible():
            run_trials(study, options, screen)
    except KeyboardInterrupt:
        screen.say("stopped; run the same command again to go on")
        return int(Exit.PREEMPTED)
    finally:
        study.write_table()
    from runner.pages.search import write_search_page

    study.summary(screen)
    screen.say(f"page: {write_search_page(options.folder).resolve()}")
    return int(Exit.DONE if study.finished() else Exit.JOB_FAILED)


def _has_optuna() -> bool:
    try:
        return find_spec("optuna") is not None
    except ValueError:  # somebody has blocked it
        return False


def options_of(words: Sequence[str]) -> Options:
    """Raises ConfigError."""
    words, config_dirs = split_options(words)
    said = {key: value for key, _, value in (word.partition("=") for word in words) if key in OWN}
    rest = [word for word in words if word.partition("=")[0] not in OWN]
    unknown = [word for word in rest if word.startswith("search.") or "=" not in word]
    if unknown:
        raise ConfigError(
            [Fault(word, f"is not known here; known: {', '.join(sorted(OWN))}, keys of a run") for word in unknown]
        )
    if "sweep" not in said:
        raise ConfigError([Fault("sweep", "say what to search: sweep=NAME, a file of conf/sweep")])
    found = read_search(said["sweep"], config_dirs)
    found = found.model_copy(update={"trials": _count(said, "search.trials", found.trials)})
    roots = [word.partition("=")[2] for word in rest if word.startswith("outputs=")]
    return Options(
        name=said["sweep"],
        search=found,
        words=rest,
        config_dirs=config_dirs,
        workers=_count(said, "search.workers", 1),
        storage=said.get("search.storage"),
        root=Path(roots[-1] if roots else "outputs"),
    )


def _count(said: dict[str, str], key: str, default: int) -> int:
    value = said.get(key, str(default))
    if not value.isdigit() or int(value) < 1:
        raise ConfigError([Fault(key, f"{value!r} is not a whole number of at least 1")])
    return int(value)


def _check_one(options: Options) -> None:
    """One point of the space must be a config: what is wrong with all of them is said before the first trial."""
    point = {name: dimension.some() for name, dimension in options.search.dimensions().items()}
    run_path(config_from(words_of(options.search, point, options.words, options.config_dirs), options.config_dirs))


@contextmanager
def _interruptible() -> Iterator[None]:
    """TERM stops a search as Ctrl-C does: the runs under way save."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
