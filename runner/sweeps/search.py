"""Look for the best settings: Optuna chooses, every trial is a run of its own, and one study file remembers everything.

    python -m runner search sweep=NAME [key=value …] [search.trials=50] [search.workers=2] [search.storage=URL]

The same command again goes on where it was, however it ended; the same command in a second terminal works along.
A trial is a run folder like any other, so a trial that was killed resumes at its last checkpoint.
"""

from collections.abc import Sequence
from importlib.util import find_spec

from runner.compose import config_from
from runner.faults import ConfigError, Exit, Fault
from runner.folder import run_path
from runner.screen import Screen
from runner.signals import interruptible
from runner.sweeps.search_options import Options, options_of
from runner.sweeps.search_space import words_of


def search(words: Sequence[str]) -> int:
    """Run trials until there are as many as were asked for; 1 where none came to an end."""
    if not _has_optuna():
        raise ConfigError([Fault("search", "needs Optuna: pip install -e '.[search]'")])
    options = options_of(words)
    _check_one(options)
    from runner.sweeps.search_loop import Study, run_trials

    options.folder.mkdir(parents=True, exist_ok=True)
    screen, study = Screen("plain"), Study.open(options)
    try:
        with interruptible():
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


def _check_one(options: Options) -> None:
    """One point of the space must be a config: what is wrong with all of them is said before the first trial."""
    point = {name: dimension.some() for name, dimension in options.search.dimensions().items()}
    run_path(config_from(words_of(options.search, point, options.words, options.config_dirs), options.config_dirs))
