"""The trials of a search: asked of one Optuna study, run as processes, reported epoch by epoch, told exactly once."""

import csv
import fcntl
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from runner.compose import config_from
from runner.faults import ConfigError, Exit
from runner.files import NO_FOLLOW, write_atomic, write_json
from runner.folder import run_path, status_of
from runner.log import cell
from runner.pages.records import complete_lines
from runner.screen import Screen
from runner.sweeps.gpu_slots import take_slot, visible_gpus
from runner.sweeps.launch import PAUSE, ask_to_stop
from runner.sweeps.parent import VARIABLE
from runner.sweeps.search_options import Options
from runner.sweeps.search_space import chosen, words_of

OVER = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
LOOK_EVERY = 0.5  # seconds between two looks at the runs under way
KILLS = 3  # a run that was killed so often is given up


class Study:
    """One study in one storage, and the folder beside it."""

    def __init__(self, options: Options, study: optuna.Study) -> None:
        self.options, self.study, self.folder = options, study, options.folder
        self.goals = list(options.search.objectives)

    @classmethod
    def open(cls, options: Options) -> "Study":
        """Create it, or take it up."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        url = options.storage or f"sqlite:///{(options.folder / 'study.db').resolve()}"
        storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
        with _locked(options.folder / ".lock"):
            study = optuna.create_study(
                storage=storage,
                study_name=options.folder.name,
                directions=list(options.search.objectives.values()),
                pruner=_pruner(options),
                load_if_exists=True,
            )
        return cls(options, study)

    def next(self) -> tuple[Trial, int] | None:
        """A trial that nobody works at, left behind or new, and the handle that claims it; None where there are enough."""
        with _locked(self.folder / ".lock"):
            trials = self.study.get_trials(deepcopy=False)
            for left in (t for t in trials if t.state == TrialState.RUNNING):
                if (claim := self._claim(left.number)) is None:
                    continue
                if self.study.get_trials(deepcopy=False)[left.number].state == TrialState.RUNNING:
                    return Trial(self.study, left._trial_id), claim
                os.close(claim)  # it was told between our look and our claim
            if len(trials) >= self.options.search.trials:
                return None
            self.study.sampler = _sampler(self.options, len(trials))
            trial = self.study.ask()
            claim = self._claim(trial.number)
            assert claim is not None, "nobody knows of a trial that was asked for just now"
            return trial, claim

    def _claim(self, number: int) -> int | None:
        """A handle that makes the trial ours until it is closed or this process is gone; None where it is another's."""
        handle = os.open(self.folder / f".trial-{number}", os.O_RDWR | os.O_CREAT | NO_FOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        return handle

    def finished(self) -> list[FrozenTrial]:
        """Trials with a result."""
        return self.study.get_trials(states=(TrialState.COMPLETE,))

    def rows(self) -> list[dict[str, Any]]:
        """One row a trial: what it chose, what it reached, where it lies."""
        best = {trial.number for trial in self.study.best_trials} if self.finished() else set()
        return [
            {"trial": t.number, "state": t.state.name.lower(), "best": t.number in best}
            | dict(zip(self.goals, t.values or [], strict=False))
            | {name: t.params.get(name) for name in self.options.search.dimensions()}
            | {"run": t.user_attrs.get("run", ""), "reason": t.user_attrs.get("reason", "")}
            for t in self.study.get_trials()
        ]

    def write_table(self) -> None:
        """trials.csv, and search.json with what the page needs beside it."""
        names = ["trial", "state", "best", *self.goals, *self.options.search.dimensions(), "run", "reason"]
        lines = [",".join(names), *(",".join(cell(row.get(name)) for name in names) for row in self.rows())]
        write_atomic(self.folder / "trials.csv", ("\n".join(lines) + "\n").encode(), durable=False)
        asked = self.options.search
        facts = {
            "name": self.options.name,
            "objectives": dict(asked.objectives),
            "dimensions": list(asked.dimensions()),
        }
        write_json(self.folder / "search.json", facts)

    def summary(self, screen: Screen) -> None:
        """The best trial, or those that none beats in every goal."""
        names = ["trial", *self.goals, *self.options.search.dimensions(), "run"]
        rows = [[_short(row.get(name, "")) for name in names] for row in self.rows() if row["best"]]
        title = "best trial" if len(self.goals) == 1 else "Pareto front: no trial is better in every goal"
        screen.table(title, names, rows)
        states = [t.state.name.lower() for t in self.study.get_trials(deepcopy=False)]
        screen.say(f"{len(states)} trials: {', '.join(f'{states.count(s)} {s}' for s in sorted(set(states)))}")


def _short(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _sampler(options: Options, number: int) -> optuna.samplers.BaseSampler:
    """Seeded by the number of the trial, so that a search that was stopped chooses as one that was not."""
    seed = options.search.seed * 1_000_003 + number
    match options.search.sampler:
        case "random":
            return optuna.samplers.RandomSampler(seed=seed)
        case "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, constant_liar=options.workers > 1)


def _pruner(options: Options) -> optuna.pruners.BasePruner:
    said = options.search.pruner
    if said is None:
        return optuna.pruners.NopPruner()
    return optuna.pruners.MedianPruner(n_startup_trials=said.after_trials, n_warmup_steps=said.after_epochs)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; those that work along wait their turn."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | NO_FOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@dataclass
class Running:
    """A trial and the process that runs it; `claim` and `slot` are the locked files of the trial and of its GPU."""

    trial: Trial
    claim: int
    words: list[str]
    path: Path
    process: "subprocess.Popen[bytes]"
    slot: int | None
    epochs: int = 0
    pruned: bool = False
    kills: int = 0
    rests_until: float = 0.0  # somebody else works in its folder: it is tried again then


def run_trials(study: Study, options: Options, screen: Screen) -> None:
    """Keep `search.workers` trials under way until there are enough."""
    running: list[Running] = []
    workers = min(options.workers, len(visible_gpus()) or options.workers)
    try:
        while True:
            while len(running) < workers and (one := _start_next(study, options, screen)) is not None:
                running.append(one)
            if not running:
                return
            time.sleep(LOOK_EVERY)
            for one in [one for one in running if _over(one, study, options, screen)]:
                os.close(one.claim)
                running.remove(one)
    except KeyboardInterrupt:
        for one in running:
            ask_to_stop(one.process)
        raise


def _start_next(study: Study, options: Options, screen: Screen) -> Running | None:
    while (found := study.next()) is not None:
        trial, claim = found
        words = words_of(options.search, chosen(options.search, trial), options.words, options.config_dirs)
        try:
            path = run_path(config_from(words, options.config_dirs))
        except ConfigError as error:  # a corner of the space that is no config
            _tell(study, trial, screen, "failed", why=str(error.faults[0]))
            os.close(claim)
            continue
        trial.set_user_attr("run", path.name)
        process, slot = _process(words, options, trial.number)
        return Running(trial, claim, words, path, process, slot)
    return None


def _process(words: list[str], options: Options, number: int) -> tuple["subprocess.Popen[bytes]", int | None]:
    """The run of a trial, on a GPU of its own where there are GPUs."""
    devices = [] if "trainer.device=cpu" in words else visible_gpus()
    slot = take_slot(devices) if devices else None
    folders = [f"--config-dir={folder}" for folder in options.config_dirs]
    environment = os.environ | {VARIABLE: str(os.getpid())} | ({"CUDA_VISIBLE_DEVICES": slot[1]} if slot else {})
    with (options.folder / f"trial-{number}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "runner", *folders, *words], env=environment, stdin=subprocess.DEVNULL,
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    return process, slot[0] if slot else None


def _over(one: Running, study: Study, options: Options, screen: Screen) -> bool:
    """Report what is new; whether the trial is over, and if so told."""
    code = one.process.poll()
    _report(one, study)
    if code is None or time.monotonic() < one.rests_until:
        return False
    if code == Exit.LOCKED and not one.rests_until:  # somebody else runs the same
        one.rests_until = time.monotonic() + PAUSE
        return False
    if one.slot is not None:
        os.close(one.slot)
    if one.pruned:
        _tell(study, one.trial, screen, "pruned")
    elif code == Exit.DONE:
        _tell(study, one.trial, screen, "complete", [measured(one.path, goal) for goal in study.goals])
    elif code == Exit.LOCKED or (code < 0 and one.kills < KILLS):  # it rested, or it was killed: again
        one.kills += code < 0
        one.rests_until = 0.0
        one.process, one.slot = _process(one.words, options, one.trial.number)
        return False
    elif code == Exit.PREEMPTED:
        raise KeyboardInterrupt
    else:
        why = str(status_of(one.path).get("reason") or f"exit code {code}")
        _tell(study, one.trial, screen, "failed", why=why.splitlines()[0])
    return True


def _report(one: Running, study: Study) -> None:
    """Every epoch that is new; a trial that is worse than the others is asked to stop, and keeps its checkpoint."""
    if len(study.goals) > 1 or one.pruned:
        return
    rows = _epochs(one.path / "metrics.csv")
    for row in rows[one.epochs :]:
        one.trial.report(float(row["best_val_top1"]), int(row["epoch"]))
    if len(rows) > one.epochs and one.process.poll() is None and one.trial.should_prune():
        one.pruned = True
        one.process.terminate()
    one.epochs = len(rows)


def _epochs(path: Path) -> list[dict[str, str]]:
    with suppress(OSError):
        return list(csv.DictReader(io.StringIO("\n".join(complete_lines(path.read_bytes())))))
    return []


def _tell(
    study: Study, trial: Trial, screen: Screen, state: str, values: list[float] | None = None, why: str = ""
) -> None:
    states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
    if why:
        trial.set_user_attr("reason", why)
    study.study.tell(trial, values, state=states[state])
    study.write_table()
    reached = ", ".join(f"{goal} {value:.6g}" for goal, value in zip(study.goals, values or [], strict=False))
    settings = " ".join(f"{name}={_short(value)}" for name, value in trial.params.items())
    screen.say(f"trial {trial.number}: {settings}: {state} {reached}{why}")


def measured(folder: Path, goal: str) -> float:
    """The figure of a finished run; `weight_bits` is the mean over its weights."""
    if goal != "weight_bits":
        return float(json.loads((folder / "summary.json").read_bytes())[goal])
    rows = list(csv.DictReader(io.StringIO((folder / "layers.csv").read_text(encoding="utf-8"))))
    count = sum(int(row["parameters"]) for row in rows)
    return sum(int(row["parameters"]) * float(row["weight_bits"]) for row in rows) / count
