"""Which parts of the state a resume needs: each is left out in turn, and the comparison has to see it.

The run stops while rows are written that the last commit does not know, in the middle of an epoch, after the optimizer
class changed; gradient norms matter only where it stops in an evaluation, so they get a stop of their own.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import runner.train
from runner.faults import Exit
from runner.log import CsvLog
from runner.run import Run
from tests.torture.forks import KILLED, Aim, do_run, run_and_kill, run_once
from tests.torture.kills import Reference, judge, reference
from tests.torture.scenarios import TRAINING, Scenario

State = dict[str, Any]
Drop = Callable[[Run, State], None]
SAVE = 5  # the save that is never begun: the one behind the rows of the second epoch


def _model(chosen: Callable[[Run, str], bool]) -> Drop:
    """Tensors of the model as they are before the checkpoint is loaded."""

    def drop(run: Run, state: State) -> None:
        fresh = run.model.state_dict()
        state["model"] |= {name: fresh[name] for name in fresh if chosen(run, name)}

    return drop


def _is_parameter(run: Run, name: str) -> bool:
    return name in dict(run.model.named_parameters())


def _progress(**values: Any) -> Drop:
    return lambda _, state: state["progress"].update(values)


def _set(key: str, fresh: Callable[[Run], Any]) -> Drop:
    return lambda run, state: state.update({key: fresh(run)})


NORM = ("running_mean", "running_var")
PARTS: dict[str, Drop] = {
    "parameters": _model(_is_parameter),
    "running figures of batch norm": _model(lambda _, name: name.endswith(NORM)),
    "batches counted by batch norm": _model(lambda _, name: name.endswith("num_batches_tracked")),
    "buffers of the quantizer": _model(
        lambda run, name: not _is_parameter(run, name) and not name.endswith((*NORM, "num_batches_tracked"))
    ),
    "average of the weights": _set("ema", lambda run: run.ema.state_dict() if run.ema else None),
    "momentum of the optimizer": lambda _, state: state["optimizer"]["state"].update(state={}),
    "class of the optimizer": lambda _, state: state["optimizer"].update(
        name="Adam", state=state["optimizer"]["state"] | {"state": {}}
    ),
    "torch's generator": _set("rng", lambda _: torch.get_rng_state()),
    "epoch": _progress(epoch=0),
    "batch within the epoch": _progress(batch=0),
    "step": _progress(step=0),
    "best accuracy": _progress(best_top1=-1.0),
    "step of the best weights": _progress(best_step=-1),
    "sums of the epoch": _set("sums", lambda run: run.sums.clone()),
    "codes at the start of the epoch": _set("codes", lambda _: {}),
}


@dataclass(frozen=True)
class Stopped:
    """Two copies of a stopped run, and what it should have become."""

    scenario: Scenario
    known: Reference
    killed: Path
    evaluating: Path


def run(size: int, seed: int, root: Path) -> dict[str, Any]:
    """All parts; bad is each that can be left out unseen, or a whole state that does not resume exactly."""
    stage = _prepare(root)
    whole = {"nothing": _resumed(stage.killed, stage, root / "whole", lambda: None)}
    whole["nothing, stopped in evaluation"] = _resumed(stage.evaluating, stage, root / "whole-evaluating", lambda: None)
    seen = {
        part: _resumed(stage.killed, stage, root / f"part-{number}", lambda drop=drop: _forget(drop))  # type: ignore[misc]
        for number, (part, drop) in enumerate(PARTS.items())
    }
    seen["best weights"] = _resumed(stage.killed, stage, root / "best", lambda: _forget(lambda *_: None, best=True))
    seen["offsets of the CSV files"] = _resumed(stage.killed, stage, root / "rows", _forget_offsets)
    norms = _progress(grad_norms={})
    seen["gradient norms"] = _resumed(stage.evaluating, stage, root / "norms", lambda: _forget(norms))
    bad = [f"left out {part}: {', '.join(faults)}" for part, faults in whole.items() if faults]
    bad += [f"left out {part}: nobody noticed" for part, faults in seen.items() if not faults]
    how = {part: "; ".join(faults)[:120] for part, faults in seen.items()}
    return {"parts": len(seen), "seen": sum(map(bool, seen.values())), "how": how, "bad": bad}


def _prepare(root: Path) -> Stopped:
    """A run whose best epoch is its first, so that the best weights so far still matter at its end."""
    for seed in range(20):
        words = ("quant=8bit-rangebn", "quant.range_bn=false", *TRAINING, "trainer.ema=0.9", f"seed={seed}")
        scenario = Scenario("everything", words)
        known = reference(scenario, root / f"reference-{seed}")
        if json.loads((known.folder / "summary.json").read_text())["best_epoch"] == 0:
            break
    killed, evaluating = root / "killed", root / "evaluating"
    end = run_and_kill(lambda: do_run(scenario.config), killed, Aim(0.0, "save", SAVE))
    assert end.code in KILLED, end
    end = run_once(lambda: _stop_in_evaluation() or do_run(scenario.config), evaluating)  # type: ignore[func-returns-value]
    assert end.code == Exit.PREEMPTED, end
    return Stopped(scenario, known, killed, evaluating)


def _stop_in_evaluation() -> None:
    """For the rest of this process: the second evaluation begins with a SIGTERM."""
    evaluate, calls = runner.train.evaluate, iter(range(100))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **kwargs)

    runner.train.evaluate = interrupted


def _resumed(stopped: Path, stage: Stopped, place: Path, forget: Callable[[], None]) -> list[str]:
    """What differs when a copy of the stopped run goes on with something forgotten."""
    shutil.copytree(stopped, place)

    def work() -> int:
        forget()
        return do_run(stage.scenario.config)

    return judge(stage.scenario.folder(place), stage.known, run_once(work, place).code, place)


def _forget(drop: Drop, best: bool = False) -> None:
    """For the rest of this process: a part of every state that is restored is lost."""
    restore = Run._restore

    def forgetful(self: Run, state: State, manifest: State, weights: State | None) -> None:
        drop(self, state)
        restore(self, state, manifest, None if best else weights)

    Run._restore = forgetful  # type: ignore[method-assign, assignment]


def _forget_offsets() -> None:
    CsvLog.rewind = lambda *_: None  # type: ignore[method-assign]
