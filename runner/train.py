"""The training loop. `fit` reads as the story of a run; `train_epoch` is every step of it."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from quant.regularizer import Penalty
from quant.surgery import quantized_layers
from runner.accelerate import accelerate
from runner.data.sources import Source
from runner.faults import Preempted
from runner.health import gradient_norms
from runner.nonfinite import Sentry
from runner.objective import Objective, likeliest
from runner.optim import optimizer_for
from runner.ranks.distributed import Share, World
from runner.regime import Setting
from runner.rows import Result, write_epoch
from runner.run import Run
from runner.schema import RunConfig


def fit(run: Run) -> None:
    """Train from where the run stands to its end."""
    with run.screen.training(run.total_steps, run.progress.step):
        while not run.over:
            try:
                train_epoch(run)
                began = time.monotonic()
                result = evaluate(run.evaluated, run.data.val, run.sizes(), run.check, run.world)
            except Preempted:
                run.save()
                raise
            end_epoch(run, result, time.monotonic() - began)
    run.save()


def train_epoch(run: Run) -> None:
    """What is left of one epoch: a step a batch, and what belongs to a step."""
    run.model.train()
    progress, batches, sentry = run.progress, run.batches_in(run.progress.epoch), Sentry(run)
    for images, labels in run.train_batches():
        share = run.agree(len(labels))
        setting = run.setting()
        run.optimizer = optimizer_for(run.model, setting, run.optimizer)
        drive_(run.model, setting)
        run.penalty.weight = setting.get("regularizer", run.penalty.weight)
        sentry.remember()
        images, labels = run.mixed(images, labels)
        loss, right = gradients_of(run, run.optimizer, images, labels, share)
        loss, right = run.world.over_batch(loss, right, len(labels), share)
        if sentry.passes(loss):
            update(run, run.optimizer)
            progress.skipped_in_a_row = 0
            run.sums += torch.stack([loss * share.images, right, torch.tensor(share.images, device=run.device)])
        else:
            sentry.answer(loss, partial(once_more, run, run.optimizer, images, labels, share))
        progress.batch += 1
        progress.step += 1
        if progress.batch == batches or progress.step == run.total_steps:
            progress.grad_norms = gradient_norms(run.model)
        else:
            run.save_if_due()
        run.hoard.after_step()
        run.show()
        run.check()


class Trainee(Protocol):
    """What a training step needs of a run."""

    @property
    def config(self) -> RunConfig: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def model(self) -> nn.Module: ...
    @property
    def forward(self) -> Callable[[Tensor], Tensor]: ...
    @property
    def objective(self) -> Objective: ...
    @property
    def penalty(self) -> Penalty: ...
    @property
    def scaler(self) -> torch.amp.GradScaler: ...
    @property
    def ema(self) -> AveragedModel | None: ...


def train_step(run: Trainee, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """One optimizer step on one batch: its mean loss, and how many answers were right (tensors on the device)."""
    loss, right = gradients_of(run, optimizer, images, labels)
    update(run, optimizer)
    return loss, right


def gradients_of(
    run: Trainee, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, share: Share | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of one batch, in the parameters; its mean loss and right answers. With `share`, of a part of a batch."""
    config, scaler = run.config.trainer, run.scaler
    optimizer.zero_grad(set_to_none=True)
    loss, right = torch.zeros((), device=run.device), torch.zeros((), device=run.device)
    share, seen = share or Share(len(labels), len(labels)), 0
    # As many parts on every rank; batch norm has no variance of one image.
    parts = min(config.accumulate, max(1, share.fewest // 2))
    for x, y in zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True):
        seen += len(y)
        with nullcontext() if seen == len(labels) else share.hold():
            logits = run.forward(x)
            part = run.objective(x, logits, y) + run.penalty.value()
            part = part * (len(y) / len(labels))
            scaler.scale(part * share.weight).backward()  # type: ignore[no-untyped-call]
        loss += part.detach()
        right += (logits.detach().argmax(1) == likeliest(y)).sum()
    return loss, right


def update(run: Trainee, optimizer: torch.optim.Optimizer) -> None:
    """Take the step that the gradients ask for, and all that follows it."""
    config, scaler = run.config.trainer, run.scaler
    if config.grad_clip is not None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip)
    scaler.step(optimizer)
    scaler.update()
    for layer in quantized_layers(run.model).values():
        layer.project_()
    if run.ema is not None:
        run.ema.update_parameters(run.model)


def once_more(run: Run, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, share: Share) -> None:
    """The gradients of a batch without compiled code, so that hooks on layers are called. The run ends after it."""
    plain = run.config.trainer.model_copy(update={"compile": False})
    run.forward = accelerate(run.world.model or run.model, plain, run.device, run.transform)
    gradients_of(run, optimizer, images, labels, share)


def drive_(model: nn.Module, setting: Setting) -> None:
    """Hand the values that a phase schedules for the quantizer (`quant.sharpness`) to the buffers of that name."""
    for key, value in setting.items():
        if key.startswith("quant."):
            for layer in quantized_layers(model).values():
                buffer = getattr(layer, key.removeprefix("quant."), None)
                if isinstance(buffer, Tensor):
                    buffer.fill_(value)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    source: Source,
    sizes: dict[str, int],
    check: Callable[[], None] = lambda: None,
    world: World | None = None,
) -> Result:
    """Loss and accuracies of `model` over the whole of `source`; sums, not means of means. `check` may raise between batches."""
    training, transform = model.training, getattr(model, "input_transform", None)
    world = world or World()
    world.align_(model)
    model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for images, labels in source.batches(seed=0, epoch=0, **sizes, **world.shard()):
        check()
        logits = model(transform(images) if transform else images).float()
        sums = sums + batch_sums(logits, labels)
    model.train(training)
    loss, top1, top5, count = world.total(sums).tolist()
    return Result(loss / count, 100 * top1 / count, 100 * top5 / count)


def batch_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed loss, right answers, right answers among the first five, and images of one batch."""
    first = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([loss, first[:, 0].sum(), first.sum(), torch.tensor(len(labels), device=logits.device)])


def end_epoch(run: Run, result: Result, eval_seconds: float) -> None:
    """Remember the best weights, write the rows of the epoch, and commit where it is due."""
    progress = run.progress
    if result.top1 > progress.best_top1:
        progress.best_top1, progress.best_epoch, progress.best_step = result.top1, progress.epoch, progress.step
        run.best = {name: tensor.detach().cpu().clone() for name, tensor in run.evaluated.state_dict().items()}
    with run.world.pause():
        if run.world.first:
            write_epoch(run, result, eval_seconds)
    run.next_epoch()
    run.save_if_due()
