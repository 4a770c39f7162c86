"""Images decoded batch by batch in worker processes, for data sets that do not fit in memory.

A worker gets a whole batch as one request that says everything (which samples, seed, epoch, size), so results do not
depend on how many workers there are, nor on what they did before.
"""

import signal
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter

from runner.data.augment import Draw, crop_boxes
from runner.data.datasets import Files
from runner.data.decode import BadImageError, Box, Bytes, centre_box, opened, to_array

TEST_CROP = 0.875  # share of the shorter side that is tested on: 224 of 256 pixels (arXiv:1512.03385, section 3.4)
TIMEOUT = 300  # seconds to wait for one batch: a worker that hangs ends the run instead of holding it for ever
LOOK_EVERY = 2  # seconds between two looks whether the workers live


@dataclass(frozen=True)
class Request:
    """One batch: which samples, at what size; with `draw`, random boxes of areas in `scale` are cut out."""

    samples: tuple[int, ...]
    size: int
    draw: Draw | None = None


class Reply(NamedTuple):  # a tuple, because that is what the loader knows how to pin
    pixels: Tensor  # uint8 (B, C, size, size)
    samples: Tensor  # those that could be decoded
    bad: tuple[tuple[str, str], ...]  # (name, reason) of those that could not


@dataclass(frozen=True)
class Decoder(Dataset[Reply]):
    """Answers requests; runs in the workers."""

    files: Files
    scale: tuple[float, float] | None

    def __getitem__(self, request: Request) -> Reply:
        images: list[Bytes] = []
        samples: list[int] = []
        bad: list[tuple[str, str]] = []
        for sample in request.samples:
            try:
                images.append(self._decode(sample, request))
                samples.append(sample)
            except BadImageError as error:
                bad.append((error.name, error.reason))
        shape = (0, self.files.channels, request.size, request.size)
        pixels = np.stack(images) if images else np.empty(shape, np.uint8)
        return Reply(torch.from_numpy(pixels), torch.tensor(samples, dtype=torch.int64), tuple(bad))

    def _decode(self, sample: int, request: Request) -> Bytes:
        with opened(self.files, self.files.names[sample]) as image:
            if self.files.decode_size is not None:  # what memory would hold; the crop follows on the whole batch
                return to_array(image, self.files.channels, self.files.decode_size)
            return to_array(image, self.files.channels, request.size, self._box(sample, request, *image.size))

    def _box(self, sample: int, request: Request, width: int, height: int) -> Box:
        if self.scale is None:
            return centre_box(width, height)
        if request.draw is None:
            return centre_box(width, height, TEST_CROP)
        box = crop_boxes(request.draw, torch.tensor([sample]), height, width, self.scale)
        top, left, box_height, box_width = box[0].tolist()
        return left, top, left + box_width, top + box_height


class Requests(Sampler[Request]):
    """The requests of the pass that is about to begin: persistent workers outlive a pass, their sampler stays."""

    def __init__(self) -> None:
        self.pending: Iterable[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.pending)


def _leave_signals_to_the_parent(_: int) -> None:
    """A signal to the process group must not kill workers: the parent finishes its step and stops them."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _stop_workers(loader: DataLoader[Reply]) -> None:
    """At the latest when the interpreter exits: it would end workers with SIGTERM, which they ignore, and wait for ever."""
    iterator = loader._iterator
    if isinstance(iterator, _MultiProcessingDataLoaderIter):
        iterator._shutdown_workers()
        for worker in iterator._workers:
            if worker.is_alive():
                worker.kill()


class _Watching(_MultiProcessingDataLoaderIter):
    """Looks after the workers while it waits: the exception that tells of a death can be lost, in a destructor say."""

    def _try_get_data(self, timeout: float = LOOK_EVERY) -> tuple[bool, Any]:
        look: Callable[..., tuple[bool, Any]] = super()._try_get_data
        while True:
            found, data = look(min(timeout, LOOK_EVERY))
            timeout -= LOOK_EVERY
            if found or timeout <= 0:
                return found, data


class _Loader(DataLoader[Reply]):
    def _get_iterator(self) -> _BaseDataLoaderIter:
        if not self.num_workers:
            return super()._get_iterator()
        self.check_worker_number_rationality()
        return _Watching(self)


class Stream:
    """Replies to requests, in their order."""

    def __init__(self, files: Files, scale: tuple[float, float] | None, workers: int, pin_memory: bool) -> None:
        self.requests = Requests()
        self.loader = _Loader(
            Decoder(files, scale),
            sampler=self.requests,
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0,
            timeout=TIMEOUT if workers else 0,
            worker_init_fn=_leave_signals_to_the_parent if workers else None,
            generator=torch.Generator(),  # its own: the global one must not move with the number of workers
            pin_memory=pin_memory,
        )
        weakref.finalize(self, _stop_workers, self.loader)

    def replies(self, requests: Iterable[Request]) -> Iterator[Reply]:
        self.requests.pending = requests
        yield from self.loader
