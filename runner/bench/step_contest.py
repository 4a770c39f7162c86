"""Training steps side by side: the very step that a run takes, built from a config, timed and weighed."""

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.profiler import ProfilerActivity, profile

from quant.regularizer import Penalty
from quant.saved import saved_bytes_per_sample
from quant.surgery import calibrate_
from runner.accelerate import accelerate
from runner.bench.step import Contender, Plan
from runner.bench.timing import Spread, ratio, take_turns
from runner.build import asking, build, phases_of, regularizer_of, watch
from runner.data.load import Data, load
from runner.environment import environment, pick_device, prepare
from runner.faults import ConfigError, Fault
from runner.hoard import Hoard
from runner.objective import Objective
from runner.optim import average_of, optimizer_for
from runner.regime import Clock, data_setting_at, setting_at
from runner.schema import RunConfig
from runner.screen import Screen
from runner.train import drive_, train_step


@dataclass(frozen=True)
class Row:
    """What was measured of one contender; `time`, `cpu`, `saved` and `peak` are ratios to the float32 named in `against`."""

    name: str
    against: str
    n: int
    seconds: float
    seconds_low: float
    seconds_high: float
    cpu_seconds: float
    images_per_s: float
    time: float
    time_low: float
    time_high: float
    cpu: float
    saved: float
    saved_bytes: int
    peak: float
    peak_bytes: int


Result = tuple[list[Row], dict[str, Any]]


def measure(plan: Plan) -> Result:
    """The rows, float32 first, and what the numbers depend on."""
    first, screen = plan.contenders[0].config, Screen("plain")
    try:
        device = pick_device(first.trainer.device)
    except ValueError as error:
        raise ConfigError([Fault("trainer.device", str(error))]) from error
    prepare(first.seed, first.trainer.threads, device)
    steps = {contender.name: _build(contender, device) for contender in plan.contenders}
    saved, peaks = {}, {}
    for name, step in steps.items():
        screen.say(f"first steps: {name}")
        step.take()  # compiles what there is to compile
        saved[name], peaks[name] = step.saved_bytes(), step.peak_bytes()
    actions, hoard = {name: step.take for name, step in steps.items()}, Hoard()
    times = take_turns(actions, turns=plan.turns, device=device, after_round=lambda _: hoard.after_step())
    rows = []
    for contender in plan.contenders:
        name, base = contender.name, contender.base
        seconds, time = Spread.of(times[name].wall), ratio(times[name].wall, times[base].wall)
        rows.append(
            Row(
                name=name,
                against=base,
                n=plan.turns,
                seconds=seconds.median,
                seconds_low=seconds.low,
                seconds_high=seconds.high,
                cpu_seconds=Spread.of(times[name].cpu).median,
                images_per_s=len(steps[name].images) / seconds.median,
                time=time.median,
                time_low=time.low,
                time_high=time.high,
                cpu=ratio(times[name].cpu, times[base].cpu).median,
                saved=saved[name] / saved[base],
                saved_bytes=saved[name],
                peak=peaks[name] / peaks[base],
                peak_bytes=peaks[name],
            )
        )
    batch = {
        "batch": len(steps[plan.contenders[0].name].images),
        "input": tuple(steps[plan.contenders[0].name].images.shape[1:]),
    }
    return rows, {"model": first.model.name, "dataset": first.dataset.name} | batch | environment(device)


def _build(contender: Contender, device: torch.device) -> "Step":
    config = contender.config
    data = load(config.dataset, device=device)
    images = {"in_channels": data.in_channels, "num_classes": len(data.classes), "image_size": data.image_size}
    model = build(config, **images).model.to(device)
    return Step(config, device, model, *_batch(config, data, model))


def _batch(config: RunConfig, data: Data, model: nn.Module) -> tuple[Tensor, Tensor]:
    """The first batch of training, as the network sees it."""
    setting = data_setting_at(phases_of(config, model)[1], 0)
    sizes = {"batch_size": setting["batch_size"], "input_size": setting["input_size"] or data.image_size}
    images, labels = next(iter(data.train.batches(seed=config.seed, epoch=0, **sizes)))
    transform = getattr(model, "input_transform", None)
    return (transform(images) if transform else images), labels


@dataclass
class Step:
    """A network in training, as `runner.train.train_step` takes it, and the one batch that it is trained on."""

    config: RunConfig
    device: torch.device
    model: nn.Module
    images: Tensor
    labels: Tensor
    ema: AveragedModel | None = field(init=False)
    forward: Callable[[Tensor], Tensor] = field(init=False)
    objective: Objective = field(init=False)
    penalty: Penalty = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        trainer = self.config.trainer
        self.forward = accelerate(self.model, trainer, self.device)
        asking("quant", calibrate_, self.model.train(), self.images)
        self.ema = average_of(self.model, trainer.ema)
        self.objective = Objective(trainer)
        self.penalty = watch(regularizer_of(self.config), self.model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=trainer.amp == "fp16")
        phases, _ = phases_of(self.config, self.model)
        setting = setting_at(phases, Clock(epoch=0, batch=0, batches=100, step=0), epochs=1, steps=100)
        self.optimizer = optimizer_for(self.model, setting, None)
        drive_(self.model, setting)

    def take(self) -> None:
        """One step of training."""
        train_step(self, self.optimizer, self.images, self.labels)

    def saved_bytes(self) -> int:
        """Bytes that autograd keeps of one forward pass, those of the images included."""
        return round(saved_bytes_per_sample(self.model, self.images, self.labels, self.forward) * len(self.images))

    def peak_bytes(self) -> int:
        """The most memory that the tensors of one step take beyond those that stand before it."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.take()
            return torch.cuda.max_memory_allocated(self.device) - before
        return peak_on_cpu(self.take)


def peak_on_cpu(action: Callable[[], object]) -> int:
    """The most bytes that the tensors made during a call hold at once: what torch.cuda.max_memory_allocated is on a GPU.

    The memory of the process would say something else: how its C library keeps freed blocks for later.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it complains that there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()  # profiler.events() has only those outside of every operator
    changes = sorted((event.start_ns(), int(event.nbytes())) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate((change for _, change in changes), initial=0))
