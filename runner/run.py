"""One training, whole: what it is made of, where it stands, and how that is saved and taken up again."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quant.regularizer import Penalty
from quant.surgery import LayerRow, calibrate_
from runner.accelerate import Transform, accelerate
from runner.build import asking, build, phases_of, regularizer_of, watch
from runner.checkpoint import Checkpoints
from runner.config import config_hash, flat
from runner.data.load import Data, load
from runner.environment import differences, environment
from runner.faults import BadData, ConfigError, Diverged, Fault, Preempted, refuse_missing
from runner.folder import RunFolder
from runner.health import codes_of
from runner.hoard import Hoard
from runner.objective import Alphas, Objective, mix
from runner.optim import average_of, optimizer_for
from runner.preflight import refuse_unfit_images
from runner.ranks.distributed import Share, World, seed_rank
from runner.regime import Clock, Setting, data_setting_at, epochs_begun, first_steps, last_step, setting_at
from runner.schema import DataPhase, RunConfig
from runner.screen import Screen
from runner.signals import StopRequest
from runner.teacher import teacher_of
from runner.weights import fingerprint

SHARE_OF_TIME = 0.01  # what saving may cost where no interval is given; the next one may take twice as long as the last
SHORTEST_PAUSE = 1.0  # seconds between two checkpoints, at least, where no interval is given


@dataclass
class Progress:
    """Where a run stands, in plain numbers: `batch` batches of `epoch` are done, `step` optimizer steps in all."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    seconds: float = 0.0
    best_top1: float = -1.0
    best_epoch: int = -1
    best_step: int = -1
    skipped: int = 0  # steps left out because loss or gradient was not finite
    skipped_in_a_row: int = 0
    lr_factor: float = 1.0  # what `on_nan: lower_lr` made of the learning rate
    lr_factor_at_start: float = 1.0  # of this epoch
    grad_norms: dict[str, float] = field(default_factory=dict)


class Run:
    """A training with everything that belongs to it. `fit` in runner/train.py drives it."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        screen: Screen,
        stop: StopRequest,
        device: torch.device,
        world: World | None = None,
    ) -> None:
        self.config, self.folder, self.screen, self.stop, self.device = config, folder, screen, stop, device
        self.world = world or World()
        self.environment = environment(device, self.world.size, config.plugins)
        self._hash = config_hash(config)  # once: of ImageNet it lists the classes, on a disk that may be far away
        for key, named in (("pretrained", config.pretrained), ("distill", config.distill)):
            if named is not None:  # told before any data is read
                refuse_missing(named, key)
        with self.world.in_turn(
            careful=config.dataset.cache is not None or bool(config.dataset.arguments.get("download"))
        ):
            self.data: Data = load(config.dataset, device=device)
        shape = {
            "in_channels": self.data.in_channels,
            "num_classes": len(self.data.classes),
            "image_size": self.data.image_size,
        }
        built = build(config, **shape)
        self.model: nn.Module = built.model.to(device)
        self.rows: list[LayerRow] = built.rows
        self.remarks, self._calibrated = built.remarks, built.calibrated
        self.transform: Transform | None = getattr(self.model, "input_transform", None)
        self.phases, self.data_phases = phases_of(config, self.model)
        refuse_thin_shares(config, self.data_phases, self.world)
        refuse_unfit_images(self.model, self.data_phases, self.data.in_channels, self.data.image_size)
        self.teacher = teacher_of(config, self.data_phases, **shape)
        if self.teacher is not None:
            self.environment["teacher"] = fingerprint(self.teacher.state_dict())
        self.objective = Objective(config.trainer, self._answers(self.teacher))
        wrapped = self.world.wrap(self.model, device, config.trainer.sync_norm)
        self.forward = accelerate(wrapped, config.trainer, device, self.transform)
        self.ema = average_of(self.model, config.trainer.ema)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.trainer.amp == "fp16")
        self.optimizer: torch.optim.Optimizer | None = None
        self.hoard = Hoard()
        self.penalty = Penalty()
        self.progress = Progress()
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, right answers, images of this epoch
        self.unsound = torch.zeros((), dtype=torch.bool, device=device)  # a step not looked at yet was not finite (GPU)
        self.codes = codes_of(self.model)
        self.best: dict[str, Tensor] = {}
        self.checkpoints = Checkpoints(folder.checkpoints)
        self._steps_before = first_steps(config, self.data_phases, len(self.data.train), self.world.size)
        self._saved_at, self._save_seconds, self._epoch_began = time.monotonic(), 0.0, time.monotonic()
        self._committed: tuple[int, int] | None = None  # epoch and step of the newest checkpoint
        self.saved_bytes_per_sample: int | None = None

    def _answers(self, teacher: nn.Module | None) -> Transform | None:
        """The forward pass of a teacher, which sees the same images in its own way."""
        if teacher is None:
            return None
        transform = getattr(teacher, "input_transform", None)
        return accelerate(teacher.to(self.device), self.config.trainer, self.device, transform)

    # Where the run stands ------------------------------------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return last_step(self._steps_before, self.config.trainer.max_steps)

    @property
    def epochs_begun(self) -> int:
        """How many epochs begin before the run ends."""
        return epochs_begun(self._steps_before, self.config.trainer.max_steps)

    @property
    def over(self) -> bool:
        return self.progress.step >= self.total_steps and self.progress.batch == 0

    def data_setting(self, epoch: int) -> Setting:
        """Batch and input size of an epoch."""
        setting = data_setting_at(self.data_phases, epoch)
        return setting | {"input_size": setting["input_size"] or self.data.image_size}

    def sizes(self, epoch: int | None = None) -> dict[str, int]:
        """Batch and input size of an epoch (the current one), as a source takes them."""
        data = self.data_setting(self.progress.epoch if epoch is None else epoch)
        return {"batch_size": data["batch_size"], "input_size": data["input_size"]}

    def batches_in(self, epoch: int) -> int:
        return self.data.train.steps(self.data_setting(epoch)["batch_size"], self.world.size)

    def setting(self, *, at_start_of_epoch: bool = False) -> Setting:
        """Optimizer, learning rate and all else that holds at the next step, or held at the first one of this epoch."""
        p = self.progress
        batch, step = (0, self._steps_before[p.epoch]) if at_start_of_epoch else (p.batch, p.step)
        clock = Clock(epoch=p.epoch, batch=batch, batches=self.batches_in(p.epoch), step=step)
        setting = setting_at(self.phases, clock, epochs=self.config.total_epochs, steps=self._steps_before[-1])
        factor = p.lr_factor_at_start if at_start_of_epoch else p.lr_factor
        return setting | {"lr": setting["lr"] * factor} if factor != 1 else setting

    def train_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What is left of the current epoch."""
        p = self.progress
        left = min(self.batches_in(p.epoch) - p.batch, self.total_steps - p.step)
        batches = self.data.train.batches(
            seed=self.config.seed, epoch=p.epoch, start=p.batch, **self.sizes(), **self.world.shard()
        )
        for _ in range(left):
            yield next(batches)

    def mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A batch mixed as `trainer.mixup` and `trainer.cutmix` ask; otherwise as it is."""
        trainer, p = self.config.trainer, self.progress
        alphas: Alphas = {k: a for k, a in (("mixup", trainer.mixup), ("cutmix", trainer.cutmix)) if a is not None}
        if not alphas:
            return images, labels
        draw = (self.config.seed, p.epoch, p.batch, self.world.place.rank)
        return mix(images, labels, alphas, len(self.data.classes), draw)

    def first_images(self) -> Tensor:
        """The first training batch of the run, for what must be set or measured before step 0."""
        images, _ = next(iter(self.data.train.batches(seed=self.config.seed, epoch=0, **self.sizes(epoch=0))))
        return self.transform(images) if self.transform else images

    def agree(self, images: int) -> Share:
        """What this rank computes of the next global batch. Raises Preempted on all ranks where any was asked to stop."""
        share = self.world.share(images, stop=self.stop.received is not None)
        if share.stop:
            self.stop.check()
            raise Preempted("another rank was asked to stop; run the same command again to go on from here")
        return share

    def check(self) -> None:
        """Between two batches: this process lives, and stops here if it is alone and was asked to; ranks stop together."""
        self.world.alive()
        if self.world.size == 1:
            self.stop.check()

    def next_epoch(self) -> None:
        """The epoch is over: the next one starts with nothing counted."""
        p, now = self.progress, time.monotonic()
        p.epoch, p.batch, p.seconds, p.grad_norms = p.epoch + 1, 0, 0.0, {}
        p.lr_factor_at_start = p.lr_factor
        self.sums.zero_()
        self.codes, self._epoch_began = codes_of(self.model), now

    def seconds_in_epoch(self) -> float:
        """Wall-clock time of the current epoch so far, over all the processes that worked at it."""
        return self.progress.seconds + time.monotonic() - self._epoch_began

    def show(self) -> None:
        """Move the bar on the terminal."""
        p = self.progress
        rate = self.sums[2].item() / max(self.seconds_in_epoch(), 1e-9) if self.screen.live else 0.0
        self.screen.step(f"epoch {p.epoch + 1}/{self.config.total_epochs}", p.step, rate)

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated: the average of the weights where one is kept."""
        return self.ema.module if self.ema is not None else self.model

    # Begin, save, take up again ------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Take up the newest checkpoint, or set steps and ranges for a run that starts."""
        found = self.world.first_says(self.checkpoints.newest() if self.world.first else None)
        if found is not None:
            self._refuse_foreign(found.manifest)
            self._restore(found.state, found.manifest, found.best)
        else:
            for log in self.folder.logs.values():
                log.clear()
            asking("quant", calibrate_, self.model.train(), self.first_images(), self._calibrated)
            self.optimizer = optimizer_for(self.model, self.setting(), None)
            self.codes = codes_of(self.model)
            if self.ema is not None:
                self.ema.module.load_state_dict(self.model.state_dict())
            seed_rank(self.config.seed, self.world.place)
        self.penalty = watch(regularizer_of(self.config), self.model)
        self.penalty.shares |= found.state["penalty"] if found is not None else {}
        self._epoch_began = time.monotonic()
        self._say_how_exact(found.manifest["environment"] if found is not None else None)

    def _say_how_exact(self, before: dict[str, Any] | None) -> None:
        """Whether this run, stopped and taken up here, ends with the bits of one that was left alone."""
        reasons = differences(before or self.environment, self.environment)
        verdict = f"no, because {'; '.join(reasons)}" if reasons else "yes"
        resumed = f"goes on after step {self.progress.step} of {self.total_steps}; " if before else ""
        self.screen.say(f"{resumed}exact resume: {verdict}")

    def save(self) -> None:
        """Commit a checkpoint of this point, where there is none yet; never of weights that are lost."""
        if bool(self.unsound):
            raise Diverged(
                f"loss or gradient was not finite shortly before step {self.progress.step}; nothing is saved"
            )
        here = (self.progress.epoch, self.progress.step)
        if here == self._committed:
            return
        began = time.monotonic()
        self.progress.seconds += began - self._epoch_began
        self._epoch_began = began
        best = (self.progress.best_step, self.best) if self.best else None
        facts = self.facts() | {"logs": {name: log.mark() for name, log in self.folder.logs.items()}}
        with self.world.pause():
            self.world.align_(self.model)
            state = self._state()
            if self.world.first:
                self.checkpoints.save(self.progress.step, state, best, facts)
        self._committed, self._saved_at = here, time.monotonic()
        self._save_seconds = self._saved_at - began

    def facts(self) -> dict[str, Any]:
        """What is stored beside weights. The config has the mean and deviation that were measured: they belong to the weights."""
        config = flat(self.config)
        config["dataset"] |= {"mean": list(self.data.mean), "std": list(self.data.std)}
        return {
            "config_hash": self._hash,
            "config": config,
            "data": self.data.fingerprint,
            "environment": self.environment,
        }

    def save_if_due(self) -> None:
        """Commit where `trainer.checkpoint_every` says so, or as often as costs almost nothing."""
        every = self.config.trainer.checkpoint_every
        if isinstance(every, int):
            due = self.progress.step % every == 0
        else:
            pause = 60 * float(every.removesuffix("min")) if every else self._save_seconds / SHARE_OF_TIME
            due = self.world.decided(time.monotonic() - self._saved_at > max(pause, SHORTEST_PAUSE))
        if due:
            self.save()

    def _state(self) -> dict[str, Any]:
        assert self.optimizer is not None
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "optimizer": {"name": type(self.optimizer).__name__, "state": self.optimizer.state_dict()},
            "scaler": self.scaler.state_dict(),
            "progress": asdict(self.progress),
            "sums": self.sums,
            "codes": self.codes,
            "penalty": self.penalty.shares,
            **self._generators(),
        } | ({"ranks": self.world.gathered(self._generators())} if self.world.size > 1 else {})

    def _generators(self) -> dict[str, Tensor | None]:
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {"rng": torch.get_rng_state(), "cuda_rng": cuda}

    def _restore(self, state: dict[str, Any], manifest: dict[str, Any], best: dict[str, Any] | None) -> None:
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.progress = Progress(**state["progress"])
        setting = self.setting() | {"optimizer": state["optimizer"]["name"]}
        self.optimizer = optimizer_for(self.model, setting, None)
        self.optimizer.load_state_dict(state["optimizer"]["state"])
        self.scaler.load_state_dict(state["scaler"])
        self.sums = state["sums"].to(self.device)
        self.codes, self.best = state["codes"], best or {}
        for name, log in self.folder.logs.items():
            log.rewind(manifest["logs"][name])
        ranks = state.get("ranks", [])
        own = ranks[self.world.place.rank] if len(ranks) == self.world.size else state
        torch.set_rng_state(own["rng"])
        if own["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda_rng"], self.device)
        if own is state:  # of other ranks than these: their streams begin anew
            seed_rank(self.config.seed, self.world.place, self.progress.step)

    def _refuse_foreign(self, manifest: dict[str, Any]) -> None:
        if manifest["config_hash"] != self._hash:
            raise BadData(
                f"{self.folder.path}: its checkpoint was made with another config; use another name= or outputs="
            )
        if manifest["data"] != self.data.fingerprint:
            raise BadData(
                f"{self.folder.path}: the data set changed since the checkpoint; restore it or start a new run"
            )


def refuse_thin_shares(config: RunConfig, phases: Sequence[DataPhase], world: World) -> None:
    """Batch norm has no variance of one image: every rank needs two of every batch."""
    smallest = min(phase.batch_size for phase in phases if phase.batch_size)
    if world.size > 1 and smallest < 2 * world.size:
        message = f"{smallest} images for {world.size} ranks; it is of all ranks together, and each needs two"
        raise ConfigError([Fault("batch_size", message)])
