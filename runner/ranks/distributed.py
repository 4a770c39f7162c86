"""One training on several processes and hosts: `torchrun --nproc-per-node=2 -m runner …`.

The batch size of a config is that of all ranks together, so a config means the same on any number of them: each takes its
share of every global batch, gradients are those of the mean over the global batch, figures are sums over all ranks.
The first rank chooses the folder and alone writes. What agrees across ranks, and how:

weights            the same seed, and the gradients that DistributedDataParallel averages (arXiv:2006.15704)
first-batch steps  LSQ and others: every rank calibrates on the whole first global batch, as a run on one process does
batch norm         BatchNorm is synced: it normalises by the figures of the global batch (runner/ranks/synced_norm.py); with
                   trainer.sync_norm=false each rank by those of its share
range BN           per rank: each normalises its share by the ranges of that share
buffers            those of the first rank, sent to the others before every forward pass
randomness         a stream of its own a rank, kept in the checkpoint

A model whose weights, gradients and optimizer state do not fit one GPU would need FSDP2 and torch.distributed.checkpoint
(ResNet-50 in float32 with momentum takes 0.3 GB, so nothing here does).
"""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from runner.faults import ConfigError, Fault
from runner.ranks.meeting import RankLost, meet
from runner.ranks.place import Place
from runner.ranks.synced_norm import synced_
from runner.ranks.watchdog import LONG, Watchdog

T = TypeVar("T")
LOST = re.compile(
    r"gloo|nccl|ProcessGroup|Connection (closed|reset|refused)|Timed out|recvValue|Broken pipe", re.IGNORECASE
)


@dataclass(frozen=True)
class Share:
    """The part of a global batch that this rank computes."""

    images: int  # of the global batch
    fewest: int  # of any rank
    weight: float = 1.0  # of this rank's mean in the mean over the ranks that is the mean over the batch
    stop: bool = False  # somebody was asked to stop
    hold: Callable[[], AbstractContextManager[Any]] = nullcontext  # gradients stay on this rank while it is open


@dataclass
class World:
    """The processes of this training. Every method is a plain one where there is only one."""

    place: Place = field(default_factory=Place)
    watch: Watchdog | None = None
    model: DistributedDataParallel | None = None

    @property
    def first(self) -> bool:
        return self.place.first

    @property
    def size(self) -> int:
        return self.place.size

    def shard(self) -> dict[str, int]:
        """What a source has to know."""
        return {"rank": self.place.rank, "world": self.size}

    def wrap(self, model: nn.Module, device: torch.device, sync_norm: bool) -> nn.Module:
        """The model with gradients averaged over the ranks, its batch norms synced or not. `model` itself keeps its names."""
        if self.size == 1:
            return model
        if sync_norm:
            model = synced_(model, device)
        # Without find_unused_parameters the buckets are laid out anew after the first step of a process: with three or more
        # ranks a resumed run would then sum in another order than one that was never stopped.
        self.model = DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            find_unused_parameters=True,
            gradient_as_bucket_view=True,
        )
        return self.model

    def share(self, images: int, stop: bool) -> Share:
        """Agree on a global batch of which this rank has `images`, and on whether to stop before it."""
        if self.size == 1:
            return Share(images, images)
        said = torch.zeros(self.size + 1, dtype=torch.int64)
        said[self.place.rank], said[-1] = images, int(stop)
        *shares, stops = self._sum(said).tolist()
        whole = sum(shares)
        assert self.model is not None
        return Share(whole, min(shares), self.size * images / whole, bool(stops), self.model.no_sync)

    def over_batch(self, loss: Tensor, right: Tensor, images: int, share: Share) -> tuple[Tensor, Tensor]:
        """Mean loss and right answers of the global batch, from those of this rank."""
        if self.size == 1:
            return loss, right
        both = self.total(torch.stack([loss.double() * images, right.double()]))
        return (both[0] / share.images).to(loss.dtype), both[1].to(right.dtype)

    def total(self, sums: Tensor) -> Tensor:
        """Sums over all ranks."""
        return sums if self.size == 1 else self._sum(sums)

    def _sum(self, values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values

    def first_says(self, value: T) -> T:
        """The first rank's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def decided(self, here: bool) -> bool:
        """What the first rank decides; cheaper than `first_says`, for every step."""
        if self.size == 1:
            return here
        box = torch.tensor(int(here))
        dist.broadcast(box, src=0)
        return bool(box)

    def gathered(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def align_(self, model: nn.Module) -> None:
        """Running figures as the first rank has them: what is evaluated and saved is one network."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def alive(self) -> None:
        """A step, or a batch of an evaluation, is over."""
        if self.watch is not None:
            self.watch.alive()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Something that is no step and may take the first rank long, after which all go on together."""
        if self.watch is None:
            yield
            return
        with self.watch.long():
            yield
            dist.barrier()

    @contextmanager
    def in_turn(self, careful: bool) -> Iterator[None]:
        """With `careful`, one rank of each host goes before the others: it fills the caches that they read."""
        if self.size > 1 and careful and self.place.local_rank:
            dist.barrier()
        yield
        if self.size > 1 and careful and not self.place.local_rank:
            dist.barrier()

    def blame(self, error: BaseException) -> BaseException:
        """The error as a person should read it: what breaks here when another rank goes is not this rank's fault."""
        if self.size > 1 and isinstance(error, RuntimeError) and LOST.search(str(error)):
            return RankLost("another rank is gone; run the same command again to go on from the last checkpoint")
        return error

    def leave(self, done: bool = False) -> None:
        """This rank waits for nobody any more; with `done`, nobody for it."""
        if self.watch is not None:
            self.watch.stop(done)


def seed_rank(seed: int, place: Place, step: int = 0) -> None:
    """A random stream of its own for every rank but the first, which keeps the one that a single process has."""
    if not place.first:
        torch.manual_seed(seed + 1_000_003 * place.rank + 7919 * step)


def device_of(device: torch.device, place: Place) -> torch.device:
    """One GPU a rank. Raises ConfigError where there are more ranks than GPUs."""
    if device.type != "cuda" or place.size == 1:
        return device
    if place.local_rank >= torch.cuda.device_count():
        message = (
            f"{place.local_rank + 1} ranks on this host, but {torch.cuda.device_count()} GPUs; lower --nproc-per-node"
        )
        raise ConfigError([Fault("trainer.device", message)])
    torch.cuda.set_device(place.local_rank)
    return torch.device("cuda", place.local_rank)


def join(place: Place, device: torch.device, last_words: Callable[[str], None]) -> World:
    """Meet the other ranks. `last_words` is called, with the reason, before a rank leaves because another one hangs."""
    if place.size == 1:
        return World(place)
    meeting = meet(place)
    world = World(place, Watchdog(meeting, place.rank, last_words, looks_at_cpu=device.type == "cpu"))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend, store=meeting.store, rank=place.rank, world_size=place.size, timeout=timedelta(seconds=LONG)
        )
    except BaseException:
        world.leave()
        raise
    return world
