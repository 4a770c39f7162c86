"""What is written at the end of an epoch: one row of metrics, one of timing, one a layer of health."""

import math
from dataclasses import dataclass
from typing import Any

from runner.environment import peak_memory_bytes
from runner.health import alarms, health_rows
from runner.run import Run


@dataclass(frozen=True)
class Result:
    """Figures of one pass over a data set; accuracies in percent."""

    loss: float
    top1: float
    top5: float


def write_epoch(run: Run, result: Result, eval_seconds: float) -> None:
    """Append the rows of the epoch that just ended."""
    metrics, timing = metrics_row(run, result), timing_row(run, eval_seconds)
    run.folder.metrics.row(metrics)
    run.folder.timing.row(timing)
    images, _ = next(iter(run.data.val.batches(seed=0, epoch=0, **run.sizes())))
    if run.transform:
        images = run.transform(images)
    rows = health_rows(run.model, images, run.codes, run.progress.grad_norms, run.penalty.figures())
    for row in rows:
        run.folder.health.row({"epoch": run.progress.epoch} | row)
    for alarm in alarms(rows):
        run.screen.say(f"warning: {alarm}")
    run.folder.status("running", epoch=run.progress.epoch + 1, step=run.progress.step)
    run.screen.say(epoch_line(metrics, timing, run.config.total_epochs))


def metrics_row(run: Run, result: Result) -> dict[str, Any]:
    """Everything in it is the same to the last bit in a run that was resumed."""
    setting, data = run.setting(at_start_of_epoch=True), run.sizes()
    loss, right, seen = run.sums.tolist()
    seen = seen or math.nan  # where every step was left out
    return {
        "epoch": run.progress.epoch,
        "step": run.progress.step,
        "phase": setting["phase"],
        "lr": setting["lr"],
        "batch_size": data["batch_size"],
        "input_size": data["input_size"],
        "train_loss": loss / seen,
        "train_top1": 100 * right / seen,
        "val_loss": result.loss,
        "val_top1": result.top1,
        "val_top5": result.top5,
        "best_val_top1": run.progress.best_top1,
        "skipped_steps": run.progress.skipped,
    }


def timing_row(run: Run, eval_seconds: float) -> dict[str, Any]:
    """Wall-clock figures, kept apart from the metrics because no two runs agree on them."""
    seconds = run.seconds_in_epoch() - eval_seconds
    return {
        "epoch": run.progress.epoch,
        "step": run.progress.step,
        "seconds": round(seconds, 4),
        "images_per_s": round(run.sums[2].item() / max(seconds, 1e-9), 1),
        "eval_seconds": round(eval_seconds, 4),
        "peak_memory_bytes": peak_memory_bytes(run.device),
        "saved_bytes_per_sample": run.saved_bytes_per_sample,
    }


def epoch_line(metrics: dict[str, Any], timing: dict[str, Any], epochs: int) -> str:
    """One epoch for people."""
    m = metrics
    return (
        f"epoch {m['epoch'] + 1:>3}/{epochs}  lr {m['lr']:.4g}  train loss {m['train_loss']:.4f} top1 {m['train_top1']:.2f} %  "
        f"val loss {m['val_loss']:.4f} top1 {m['val_top1']:.2f} %  best {m['best_val_top1']:.2f} %  "
        f"{timing['seconds']:.1f} s  {timing['images_per_s']:,.0f} images/s"
    )
