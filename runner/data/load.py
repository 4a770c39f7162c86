"""The data of a run. What fits is decoded once and kept on the device, what does not is streamed; the batches are alike."""

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from runner.data.augment import Augment, Normalise
from runner.data.datasets import Files, Images, Pixels, balanced_order, reader
from runner.data.decode import BadImageError, decode_all, first_size, refuse
from runner.data.locations import held_out
from runner.data.sources import MemorySource, Recipe, Source, StreamSource
from runner.data.stream import Request, Stream
from runner.faults import BadData, ConfigError, Fault
from runner.schema import DatasetConfig

IN_MEMORY = 4 * 2**30  # bytes of decoded images that `memory: auto` keeps
MEASURED = 2048  # images of a stream that its mean and deviation are measured on
Content = Pixels | Files


@dataclass(frozen=True)
class Data:
    train: Source
    val: Source
    test: Source
    classes: tuple[str, ...]
    in_channels: int
    image_size: int  # side of the images fed to the model unless a data regime says otherwise
    fingerprint: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    left_out: dict[str, int]  # by part: images that could not be decoded; of those in memory


def load(config: DatasetConfig, *, device: torch.device) -> Data:
    """Read, decode or open, split and measure a data set."""
    images = reader(config.name)(**config.arguments)
    parts, left_out = _decode(images, config)
    train_index, val_index = _split(parts["train"], config, own_validation="val" in parts)
    image_size = config.input_size or _side(parts["train"])
    mean, std = _statistics(parts["train"], train_index, image_size, config)
    fingerprint = _fingerprint(parts, images.classes)
    scale = config.augment.scale
    augment = Augment(
        config.augment.crop, config.augment.flip, config.augment.cutout, (scale[0], scale[1]) if scale else None
    )
    normalise = Normalise.of(mean, std, device)
    placed = {part: _place(content, device) for part, content in parts.items()}

    def source(part: str, index: Tensor | None = None, train: bool = False) -> Source:
        content = placed[part]
        index = torch.arange(len(content.labels)) if index is None else index
        recipe = Recipe(augment, normalise, image_size, device, train, config.drop_last)
        if isinstance(content, Pixels):
            return MemorySource(content, index, recipe)
        return StreamSource(content, index, recipe, config.workers)

    test = source("test")
    if config.validation == "test":
        val = test
    elif val_index is None:
        val = source("val")
    else:
        val = source("train", val_index)
    train = source("train", train_index, train=True)
    return Data(train, val, test, images.classes, len(mean), image_size, fingerprint, mean, std, left_out)


def _decode(images: Images, config: DatasetConfig) -> tuple[dict[str, Content], dict[str, int]]:
    """The parts, decoded if they are to be kept in memory, and how many images each had to leave out."""
    parts: dict[str, Content] = {"train": images.train, "test": images.test}
    if images.val is not None:
        parts["val"] = images.val
    left_out = dict.fromkeys(parts, 0)
    stream = _must_stream([part for part in parts.values() if isinstance(part, Files)], config)
    for name, content in parts.items():
        if isinstance(content, Files) and not stream:
            decoded = decode_all(content, Path(config.cache) if config.cache else None, config.workers)
            parts[name], left_out[name] = decoded.pixels, len(decoded.bad)
    return parts, left_out


def _must_stream(parts: list[Files], config: DatasetConfig) -> bool:
    """Whether files are decoded batch by batch. `auto` judges by the size of the first image."""
    if not parts or config.memory == "always":
        return False
    if config.memory == "auto":
        width, height = (parts[0].decode_size,) * 2 if parts[0].decode_size else first_size(parts[0])
        if sum(len(part.names) * part.channels for part in parts) * width * height <= IN_MEMORY:
            return False
    if config.input_size is None and parts[0].decode_size is None:
        message = "images that are streamed need a size: set it, or dataset.decode_size, to the side of the square"
        raise ConfigError([Fault("dataset.input_size", message)])
    return True


def _side(content: Content) -> int:
    if isinstance(content, Pixels):
        return content.pixels.shape[2]
    assert content.decode_size is not None, "_must_stream asks for one of the two sizes"
    return content.decode_size


def _channels(content: Content) -> int:
    return content.pixels.shape[1] if isinstance(content, Pixels) else content.channels


def _split(train: Content, config: DatasetConfig, own_validation: bool) -> tuple[Tensor, Tensor | None]:
    """Sorted indices of the images to train on and of those to validate on, classes in proportion in both."""
    order = balanced_order(train.labels, config.split_seed)
    if len(order) < 2:
        raise BadData(f"data set {config.name} has {len(order)} training images; at least 2 are needed")
    count = held_out(len(order), config.val_fraction)
    if config.validation == "test" or own_validation:
        return order[: config.limit].sort().values, None
    return order[count:][: config.limit].sort().values, order[:count].sort().values


def _statistics(
    train: Content, index: Tensor, image_size: int, config: DatasetConfig
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by channel of pixels in 0..1: as the config says, or measured."""
    channels = _channels(train)
    for key, given in (("mean", config.mean), ("std", config.std)):
        if given is not None and len(given) != channels:
            message = f"has {len(given)} values, but the images have {channels} channels"
            raise ConfigError([Fault(f"dataset.{key}", message)])
    if config.mean is not None and config.std is not None:
        return tuple(config.mean), tuple(config.std)
    if isinstance(train, Files):
        train, index = _sample(train, index, image_size)
    mean, std = _measure(train.pixels, index)
    return tuple(config.mean or mean), tuple(config.std or std)


def _measure(pixels: Tensor, index: Tensor) -> tuple[list[float], list[float]]:
    """Sums of whole numbers in float64 are exact, so the order of summation does not matter."""
    total = torch.zeros(pixels.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for start in range(0, len(index), 4096):
        x = pixels[index[start : start + 4096]].double()
        total += x.sum((0, 2, 3))
        squares += x.square_().sum((0, 2, 3))
    count = len(index) * pixels.shape[2] * pixels.shape[3]
    mean = [value / count for value in total.tolist()]
    variance = [value / count - m * m for value, m in zip(squares.tolist(), mean, strict=True)]
    # A channel of one value everywhere has no deviation to divide by.
    return [m / 255 for m in mean], [math.sqrt(v) / 255 if v > 0 else 1.0 for v in variance]


def _sample(files: Files, index: Tensor, size: int) -> tuple[Pixels, Tensor]:
    """Some images of a stream, evenly spread."""
    chosen = index[:: max(1, len(index) // MEASURED)]
    stream = Stream(files, None, workers=0, pin_memory=False)
    reply = next(iter(stream.replies([Request(tuple(chosen.tolist()), size)])))
    if reply.bad and files.on_bad == "stop":
        raise refuse(files, BadImageError(*reply.bad[0]))
    if not len(reply.samples):
        raise BadData(f"{files.root}: no images could be read")
    return Pixels(reply.pixels, files.labels[reply.samples]), torch.arange(len(reply.samples))


def _place(content: Content, device: torch.device) -> Content:
    if isinstance(content, Files):
        return content
    return Pixels(content.pixels.to(device), content.labels.to(device))


def _fingerprint(parts: Mapping[str, Content], classes: tuple[str, ...]) -> str:
    """Of the pixels and labels; of files that are streamed, of their names, sizes and labels."""
    digest = hashlib.sha256(repr(classes).encode())
    for name in sorted(parts):
        content = parts[name]
        if isinstance(content, Pixels):
            digest.update(f"{name} {tuple(content.pixels.shape)}".encode())
            digest.update(content.pixels.contiguous().numpy().reshape(-1).data)
        else:
            for file in content.names:
                digest.update(f"{name} ".encode() + os.fsencode(file) + f" {_size(content.root / file)}\n".encode())
        digest.update(content.labels.contiguous().numpy().data)
    return digest.hexdigest()


def _size(path: Path) -> int:
    """Bytes of a file; -1 where there is none, which is for those to judge who open it."""
    try:
        return path.stat().st_size
    except OSError:
        return -1
