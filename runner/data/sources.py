"""Batches out of what is in memory or streamed: order, shards and augmentation are the same for both.

A batch is a pure function of (seed, epoch, index of the batch): training can stop and go on anywhere.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from runner.data.augment import Augment, Draw, Normalise, crop_boxes, resize, resized_crop
from runner.data.datasets import Files, Pixels
from runner.data.decode import BadImageError, refuse
from runner.data.stream import TEST_CROP, Reply, Request, Stream
from runner.faults import BadData
from runner.regime import steps_per_epoch

log = logging.getLogger(__name__)
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Recipe:
    """What turns stored pixels into batches; `train` shuffles and augments."""

    augment: Augment
    normalise: Normalise
    image_size: int
    device: torch.device
    train: bool
    drop_last: bool

    def finish(self, pixels: Tensor, samples: Tensor, draw: Draw | None, size: int, crop: bool) -> Tensor:
        """uint8 to float32. With `crop`, random boxes are still to be cut (of images that were stored whole)."""
        if draw is None:
            return resize(self.normalise(pixels), size)
        if crop and self.augment.scale:
            boxes = crop_boxes(draw, samples.cpu(), pixels.shape[2], pixels.shape[3], self.augment.scale)
            pixels = resized_crop(pixels, boxes, size)
        x = self.normalise(self.augment.pixels(pixels, samples, draw))
        return resize(self.augment.erase_(x, samples, draw), size)


class Source(ABC):
    """Batches of images with labels: which samples make up which, and in what order; where they lie is for its kinds.

    One global order is cut into global batches; each process takes its contiguous share of every one. The
    last, uneven one is shared out as evenly as can be. In training it is dropped, in all processes alike, if that
    leaves any of them fewer than two images (batch norm has no variance of one) or if `drop_last` asks for it; in
    evaluation every image is seen exactly once, and a process with an empty share has a batch less.
    """

    def __init__(self, index: Tensor, recipe: Recipe) -> None:
        self.index, self.recipe = index, recipe

    def __len__(self) -> int:
        return len(self.index)

    def steps(self, batch_size: int, world: int = 1) -> int:
        """Batches of one pass; in training the same number in each of `world` processes."""
        if self.recipe.train:
            return steps_per_epoch(len(self), batch_size, self.recipe.drop_last, world)
        return -(-len(self) // batch_size)

    def batches(
        self,
        *,
        seed: int,
        epoch: int,
        batch_size: int,
        input_size: int | None = None,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[Batch]:
        """(float32 NCHW, normalised; int64 labels) on the device, from batch `start` on; `batch_size` is of all processes."""
        draw, size = Draw(seed, epoch), input_size or self.recipe.image_size
        shares = self._samples(draw, batch_size, start, rank, world)
        return self._read(shares, draw if self.recipe.train else None, size)

    @abstractmethod
    def _read(self, shares: Iterator[Tensor], draw: Draw | None, size: int) -> Iterator[Batch]:
        """The images and labels of each share, at that size; augmented where there is a draw."""

    def _samples(self, draw: Draw, batch_size: int, start: int, rank: int, world: int) -> Iterator[Tensor]:
        """The samples of each batch of this process, on the device."""
        order = self.index[draw.order(len(self))] if self.recipe.train else self.index
        order = order.to(self.recipe.device)
        for step in range(start, self.steps(batch_size, world)):
            together = order[step * batch_size : (step + 1) * batch_size]
            share = together[len(together) * rank // world : len(together) * (rank + 1) // world]
            if len(share):
                yield share


class MemorySource(Source):
    """Batches of images that lie on the device."""

    def __init__(self, content: Pixels, index: Tensor, recipe: Recipe) -> None:
        super().__init__(index, recipe)
        self.content = content

    def _read(self, shares: Iterator[Tensor], draw: Draw | None, size: int) -> Iterator[Batch]:
        for samples in shares:
            pixels = self.content.pixels.index_select(0, samples)
            x = self.recipe.finish(pixels, samples, draw, size, crop=True)
            yield x, self.content.labels.index_select(0, samples)


class StreamSource(Source):
    """Batches of images that are decoded as they are needed."""

    def __init__(self, content: Files, index: Tensor, recipe: Recipe, workers: int) -> None:
        super().__init__(index, recipe)
        self.content = content
        self.stream = Stream(content, recipe.augment.scale, workers, pin_memory=recipe.device.type == "cuda")
        self.bad: set[str] = set()  # names of those that could not be decoded, as far as is known by now

    @property
    def test_crop(self) -> float:
        """The side of the square that is tested on, as a share of the image's shorter side."""
        return TEST_CROP if self.recipe.augment.scale and self.content.decode_size is None else 1.0

    def _read(self, shares: Iterator[Tensor], draw: Draw | None, size: int) -> Iterator[Batch]:
        for reply in self.stream.replies(Request(tuple(samples.tolist()), size, draw) for samples in shares):
            self._note(reply)
            if not len(reply.samples):
                continue
            pixels = reply.pixels.to(self.recipe.device, non_blocking=True)
            samples = reply.samples.to(self.recipe.device, non_blocking=True)
            stored_whole = self.content.decode_size is not None
            x = self.recipe.finish(pixels, samples, draw, size, crop=stored_whole)
            yield x, self.content.labels[reply.samples].to(self.recipe.device, non_blocking=True)

    def _note(self, reply: Reply) -> None:
        """Stop at a bad image, or leave it out; a training batch needs two (batch norm has no variance of one)."""
        for name, reason in reply.bad:
            if self.content.on_bad == "stop":
                raise refuse(self.content, BadImageError(name, reason))
            if name not in self.bad:
                log.warning("left out %s: %s", self.content.root / name, reason)
            self.bad.add(name)
        if self.recipe.train and reply.bad and len(reply.samples) < 2:
            count = len(reply.samples) + len(reply.bad)
            raise BadData(f"{self.content.root}: of the {count} images of a batch {len(reply.bad)} could not be read")
