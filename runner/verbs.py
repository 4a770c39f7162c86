"""What each verb does with its words: compose, check, and only then load what it takes."""

import os
from collections.abc import Sequence
from pathlib import Path

from runner.compose import Composition, checked, compose_words, config_from, split_options
from runner.data.locations import train_samples
from runner.faults import ConfigError, Exit, Fault, Preempted, refuse_missing
from runner.folder import done_already, run_path
from runner.ranks.place import Place, folder_for
from runner.regime import end_of, timeline
from runner.schema import RunConfig
from runner.screen import Screen
from runner.signals import StopRequest

COLUMNS = ("epoch", "step", "phase", "optimizer", "lr", "momentum", "weight_decay", "batch_size", "input_size")  # first


def train(words: Sequence[str]) -> int:
    """Train, or with mode=evaluate measure, one configuration."""
    overrides, config_dirs = split_options(words)
    composition = compose_words(overrides, config_dirs)
    if composition.raw.get("mode") == "evaluate":
        return _evaluate(overrides, composition)
    config = checked(composition)
    path, place = run_path(config), Place.from_environment()
    if done_already(path, Screen(config.trainer.progress if place.first else "none")):
        return int(Exit.DONE)
    folder = folder_for(path, place)  # before torch is loaded: a second process in the same folder is refused at once
    stop = StopRequest()
    if place.size > 1:  # DDP warns of find_unused_parameters, which exact resuming needs
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        from runner.job import train as train_run

        stop.check()
    except Exception as error:  # loading torch takes seconds: a stop meanwhile is a stop like any other
        blamed = stop.blame(error)
        if isinstance(blamed, Preempted):
            folder.status("preempted", int(blamed.code), str(blamed))
        raise blamed from (None if blamed is error else error)
    train_run(config, folder, stop)
    return int(Exit.DONE)


def evaluate(words: Sequence[str]) -> int:
    """Print and save the figures of a stored model; its config comes with it, what is said here changes it."""
    overrides, config_dirs = split_options([*words, "mode=evaluate"])
    return _evaluate(overrides, compose_words(overrides, config_dirs))


def _evaluate(overrides: Sequence[str], composition: Composition) -> int:
    given = composition.raw.get("checkpoint")
    if composition.faults or not isinstance(given, str) or not given:
        checked(composition)  # raises: all faults, before torch is loaded
    refuse_missing(str(given))
    from runner.evaluate import evaluate_stored

    evaluate_stored(composition.raw, overrides)
    return int(Exit.DONE)


def regime(words: Sequence[str]) -> int:
    """Print the timeline of a config and draw it, before any training."""
    config = config_from(*split_options(words))
    samples = _samples(config)
    settings = list(timeline(config, samples))
    keys = dict.fromkeys([*COLUMNS, *(key for row in settings for key in row)])
    said = [key for key in keys if any(row.get(key) is not None for row in settings)]
    rows = [{key: "" if row.get(key) is None else row[key] for key in said} for row in settings]
    screen, changes = Screen("plain"), _changes(rows)
    title = f"{config.regime.epochs} epochs as conf says, {sum(_begins_an_epoch(row) for row in settings)} here"
    screen.table(title, said, [list(row.values()) for row in changes])
    from runner.pages.dashboard import write_timeline

    path = Path(config.outputs) / "regime.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_timeline(rows, end_of(config, samples), path, f"{config.model.name} · {config.dataset.name}")
    screen.say(f"timeline: {path.resolve()}")
    return int(Exit.DONE)


def _samples(config: RunConfig) -> int:
    if config.regime.phases is None or config.data_regime.phases is None:
        raise ConfigError(
            [Fault("regime", "regime=model is known once the model is built; choose a regime to draw it")]
        )
    known = train_samples(config.dataset.name, config.dataset.model_dump() | config.dataset.arguments)
    if known is None:
        raise ConfigError(
            [Fault("dataset", f"{config.dataset.name}: too many files to count quickly; its steps are not known yet")]
        )
    return known


def _changes(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """At most some thirty rows: the first of every phase and evenly spaced epochs between them, where anything has changed."""
    firsts = {i for i in range(len(rows)) if i == 0 or rows[i]["phase"] != rows[i - 1]["phase"]}
    epochs = [i for i, row in enumerate(rows) if _begins_an_epoch(row)]
    changes: list[dict[str, object]] = []
    for i in sorted(firsts | set(epochs[:: max(1, len(epochs) // 20)]) | set(epochs[-1:])):
        row = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in rows[i].items()}
        if not changes or row | {"epoch": 0, "step": 0} != changes[-1] | {"epoch": 0, "step": 0}:
            changes.append(row)
    return changes


def _begins_an_epoch(row: dict[str, object]) -> bool:
    return isinstance(row["epoch"], int)
