"""The life of one run: refuse or take up, show what was rewritten, train, test, and leave a folder that explains itself."""

import csv
import io
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from signal import Signals
from statistics import median
from typing import Any

import torch
import yaml
from torch import Tensor

from quant.saved import saved_bytes_per_sample
from runner.accelerate import accelerate
from runner.columns import LAYERS
from runner.config import config_hash, flat
from runner.cost import Cost, cost_of
from runner.environment import environment, peak_memory_bytes, pick_device, prepare
from runner.faults import ConfigError, Diverged, Exit, Fault, Preempted, StorageError, exit_code
from runner.files import write_atomic, write_json
from runner.folder import RunFolder, done_already, run_path
from runner.log import cell
from runner.pages.command import open_live
from runner.preflight import refuse_misfits
from runner.ranks.distributed import World, device_of, join
from runner.ranks.meeting import RankLost
from runner.ranks.place import Place, folder_for
from runner.regime import too_late
from runner.relations import NO_FP16
from runner.run import Run
from runner.schema import RunConfig
from runner.screen import Screen
from runner.signals import FATAL, StopRequest
from runner.train import evaluate, fit
from runner.weights import save_weights

SHOWN = {
    "layer": "layer",
    "was": "kind",
    "becomes": "becomes",
    "W": "weight_bits",
    "A": "act_bits",
    "G": "grad_bits",
    "parameters": "parameters",
    "MACs": "macs",
    "why": "why",
}  # columns of the preflight table: W, A, G are the bits of weights, activations and gradients
# Known before step 0: status.json has it from then on, the summary takes it from there.
KNOWN_EARLY = (
    "parameters", "saved_bytes_per_sample", "float_bytes", "packed_bytes", "macs", "config_hash", "command", "environment",
)  # fmt: skip
MEASURED_ON = 8  # images of the batch on which the bytes saved for backward are measured


def train(config: RunConfig, folder: RunFolder | None = None, stop: StopRequest | None = None) -> Path:
    """Do a run that is not done yet, and say where it lies. Raises RunnerError; status.json then says the same.

    `folder`: the run's folder, where the caller holds its lock already; closed here. `stop`: where it listens already.
    """
    path, place = run_path(config), Place.from_environment()
    screen, world = Screen(config.trainer.progress if place.first else "none"), World(place)
    if folder is None and done_already(path, screen):
        return path
    stop, folder = stop or StopRequest(), folder or folder_for(path, place)
    stop.last_words = partial(_last_words, folder)
    try:
        folder.status("running", epochs=config.total_epochs, config_hash=config_hash(config))
        device = device_of(_device(config), place)
        prepare(config.seed, config.trainer.threads, device)
        world = join(place, device, partial(folder.status, "preempted", int(Exit.PREEMPTED)))
        folder.status("running", environment=environment(device, world.size, config.plugins))
        if world.first:
            write_atomic(path / "config.yaml", _yaml(config), durable=False)
            _lay_down_curve(config, path, screen)
        refuse_misfits(config)
        run = Run(config, folder, screen, stop, device, world)
        _preflight(run)
        run.begin()
        if config.trainer.dashboard == "open" and world.first:
            open_live(path)
        folder.status("running", steps_total=run.total_steps, epoch=run.progress.epoch, step=run.progress.step)
        stop.finish_steps()
        fit(run)
        _conclude(run)
        stop.last_words = None  # what is done stays done
        folder.status("done", int(Exit.DONE))
    except BaseException as error:
        stop.last_words = None
        world.leave()
        blamed = world.blame(stop.blame(error))
        _note_failure(folder, blamed)
        if isinstance(blamed, Diverged) and world.first:  # its curves say when, and often why
            _draw(path, config, screen)
        raise blamed from (None if blamed is error else error)
    finally:
        folder.close()
    if world.first:
        _draw(path, config, screen)
    return path


def _draw(path: Path, config: RunConfig, screen: Screen) -> None:
    """The dashboard, and where it lies. A run is over without it: what goes wrong here is said, and no more."""
    if config.trainer.dashboard != "none":
        from runner.pages.dashboard import write_dashboard

        try:
            write_dashboard(path)
        except Exception as error:  # whatever it is, what was trained is not to be called failed for it
            screen.say(f"no dashboard: {type(error).__name__}: {error}")
    screen.point_to(path)


def _lay_down_curve(config: RunConfig, path: Path, screen: Screen) -> None:
    """The course that is expected of the run, beside its own: as it is in this folder, or in the project's."""
    if config.curve is None:
        return
    places = [Path(config.curve), Path(__file__).resolve().parent.parent / config.curve]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        screen.say(f"note: there is no {config.curve}, so the page shows no expected curve")
    else:
        write_atomic(path / "expected.csv", found.read_bytes(), durable=False)


def _device(config: RunConfig) -> torch.device:
    try:
        device = pick_device(config.trainer.device)
    except ValueError as error:
        raise ConfigError([Fault("trainer.device", str(error))]) from error
    if device.type == "cpu" and config.trainer.amp == "fp16":
        raise ConfigError([Fault("trainer.amp", NO_FP16)])
    return device


def _yaml(config: RunConfig) -> bytes:
    return yaml.safe_dump(flat(config), sort_keys=False, allow_unicode=True).encode()


def _last_words(folder: RunFolder, sent: Signals) -> None:
    folder.status("interrupted", FATAL[sent], f"a second signal ({sent.name}); run the same command again to go on")


def _note_failure(folder: RunFolder, error: BaseException) -> None:
    """Say in status.json why the run ended, where the disk still takes it."""
    states = {Preempted: "preempted", RankLost: "preempted", Diverged: "diverged"}
    state = next((name for kind, name in states.items() if isinstance(error, kind)), "failed")
    try:
        folder.status(state, int(exit_code(error)), str(error) or type(error).__name__)
    except StorageError:
        return


def _preflight(run: Run) -> None:
    """Before step 0: what became of every layer and why, on screen and in layers.csv; what the network costs."""
    images = run.first_images()
    cost = cost_of(run.model, images[:1])
    run.saved_bytes_per_sample = _saved_bytes(run, images[: 2 * MEASURED_ON])
    rows = [asdict(row) | {"macs": cost.layer_macs.get(row.layer, 0)} for row in run.rows]
    if run.world.first:
        _write_layers(run.folder.path / "layers.csv", rows)
    config = run.config
    title = (
        f"{config.model.name} · {config.quant.name} · {config.dataset.name} · seed {config.seed} → {run.folder.path}"
    )
    run.screen.table(title, list(SHOWN), [[row[key] for key in SHOWN.values()] for row in rows])
    run.screen.say(_cost_line(cost, run))
    for remark in filter(None, (*run.remarks, _left_out(run), _late_phases(run))):
        run.screen.say(remark)
    run.folder.status(
        "running",
        parameters=sum(q.numel() for q in run.model.parameters()),
        saved_bytes_per_sample=run.saved_bytes_per_sample,
        float_bytes=cost.float_bytes,
        packed_bytes=cost.packed_bytes,
        macs=cost.macs,
        images_left_out=run.data.left_out,
    )


def _late_phases(run: Run) -> str:
    """What the run ends before."""
    epochs, data = run.epochs_begun, [phase.epoch for phase in run.data_phases]
    if run.phases[0].step is not None:
        late = too_late([phase.step or 0 for phase in run.phases], run.total_steps, "step")
    else:
        late = too_late([phase.epoch or 0 for phase in run.phases], epochs, "epoch")
    return "\n".join(filter(None, [late, too_late(data, epochs, "epoch", of="data_regime")]))


def _left_out(run: Run) -> str:
    """Images of a folder that could not be decoded; streamed ones are named as they come."""
    said = ", ".join(f"{count} of {part}" for part, count in run.data.left_out.items() if count)
    return f"note: images left out because they cannot be decoded: {said}" if said else ""


def _saved_bytes(run: Run, images: Tensor) -> int:
    """Bytes for backward that one more image in the batch costs, not compiled: what is kept once a batch (weights) drops out."""
    if len(images) < 4:  # half of them has to be a batch of its own, and batch norm has no variance of one value
        images = torch.cat([images, images])
    labels = torch.zeros(len(images), dtype=torch.int64, device=run.device)
    half = len(images) // 2
    forward = accelerate(run.model.train(), run.config.trainer.model_copy(update={"compile": False}), run.device)
    whole, part = (saved_bytes_per_sample(run.model, images[:n], labels[:n], forward) * n for n in (len(images), half))
    return round((whole - part) / (len(images) - half))


def _write_layers(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = [",".join(LAYERS), *(",".join(cell(row[key]) for key in LAYERS) for row in rows)]
    write_atomic(path, ("\n".join(lines) + "\n").encode(), durable=False)


def _cost_line(cost: Cost, run: Run) -> str:
    macs = ", ".join(f"{count / 1e6:,.2f} M {kind}" for kind, count in cost.macs.items() if count)
    return (
        f"per image: {macs} multiply-accumulates (computed); {run.saved_bytes_per_sample or 0:,} bytes "
        f"saved for backward (measured). "
        f"model: {cost.float_bytes:,} bytes as float32, {cost.packed_bytes:,} packed (computed)"
    )


def _conclude(run: Run) -> None:
    """Test the chosen weights once, write the summary, the weights for sharing and the dashboard."""
    if run.config.trainer.select == "val" and run.best:
        run.evaluated.load_state_dict(run.best)
    test = evaluate(run.evaluated, run.data.test, run.sizes(run.epochs_begun - 1), run.check, run.world)
    run.world.leave(done=True)
    if not math.isfinite(test.loss):
        raise Diverged(f"the weights are lost: the loss on the test set is {test.loss}")
    if not run.world.first:
        return
    save_weights(run.folder.path / "weights.safetensors", run.evaluated.state_dict(), run.facts()["config"])
    summary = _summary(run) | {"test_loss": test.loss, "test_top1": test.top1, "test_top5": test.top5}
    write_json(run.folder.path / "summary.json", summary, durable=True)
    chosen = "best validation" if run.config.trainer.select == "val" else "last"
    run.screen.say(
        f"test top1 {test.top1:.2f} % (weights of the {chosen} epoch; validation best {run.progress.best_top1:.2f} %)"
    )


def _summary(run: Run) -> dict[str, Any]:
    config, p = run.config, run.progress
    last, timing = _rows(run.folder.path / "metrics.csv")[-1], _rows(run.folder.path / "timing.csv")
    return {
        "name": config.name or run.folder.path.name,
        "run": run.folder.path.name,
        "model": config.model.name,
        "quant": config.quant.name,
        "dataset": config.dataset.name,
        **({"place": str(Path(config.dataset.arguments["root"]).resolve())} if config.dataset.name == "folder" else {}),
        "seed": config.seed,
        "epochs": p.epoch,
        "steps": p.step,
        "best_val_top1": p.best_top1,
        "best_epoch": p.best_epoch,
        "final_val_top1": float(last["val_top1"]),
        "final_train_loss": _finite(last["train_loss"]),
        "test_checkpoint": "best" if config.trainer.select == "val" else "last",
        "train_seconds": round(sum(float(row["seconds"]) for row in timing), 3),
        "images_per_s": median(float(row["images_per_s"]) for row in timing),
        "peak_memory_bytes": peak_memory_bytes(run.device),
        **{key: run.folder.facts[key] for key in KNOWN_EARLY},
    }


def _finite(text: str) -> float | None:
    """A figure of a log; None where no step of the epoch counted."""
    return float(text) if math.isfinite(float(text)) else None


def _rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
