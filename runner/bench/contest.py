"""Training steps side by side: the very step that a run takes, built from a config, timed and weighed."""

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from quant.regularizer import Penalty
from quant.saved import saved_bytes_per_sample
from quant.surgery import calibrate_
from runner.accelerate import accelerate
from runner.bench.step import Contender, Plan
from runner.bench.timing import Spread, ratio, take_turns
from runner.build import asking, build, phases_of, regularizer_of, watch
from runner.data import Data, load
from runner.environment import environment, pick_device, prepare
from runner.faults import ConfigError, Fault
from runner.objective import Objective
from runner.optim import optimizer_for
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
    peak: float | None
    peak_bytes: int | None


def measure(plan: Plan) -> tuple[list[Row], dict[str, Any]]:
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
    times = take_turns({name: step.take for name, step in steps.items()}, turns=plan.turns, device=device)
    rows = []
    for contender in plan.contenders:
        name, base = contender.name, contender.base
        seconds, time = Spread.of(times[name].wall), ratio(times[name].wall, times[base].wall)
        peak, base_peak = peaks[name], peaks[base]
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
                peak=peak / base_peak if peak is not None and base_peak else None,
                peak_bytes=peak,
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
    ema: AveragedModel | None = None
    forward: Callable[[Tensor], Tensor] = field(init=False)
    objective: Objective = field(init=False)
    penalty: Penalty = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        trainer = self.config.trainer
        self.forward = accelerate(self.model, trainer, self.device)
        asking("quant", calibrate_, self.model.train(), self.images)
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

    def peak_bytes(self) -> int | None:
        """The most memory that one step takes beyond what stands before it; None where the system does not say."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.take()
            return torch.cuda.max_memory_allocated(self.device) - before
        return peak_of_process(self.take)


def peak_of_process(action: Callable[[], object]) -> int | None:
    """How far the memory of this process rises during a call, beyond where it stands before. Linux only, else None."""
    gc.collect()
    try:
        with suppress(AttributeError):  # another C library has no such function; freed memory may then count as in use
            ctypes.CDLL(None).malloc_trim(0)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark falls to where we stand
        action()
        return max(0, _status("VmHWM") - before)
    except (OSError, StopIteration):
        return None


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024
