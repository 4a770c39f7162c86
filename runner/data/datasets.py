"""Readers of data sets: each turns files into `Images`. A reader's keyword arguments are keys of conf/dataset/NAME.yaml.

Adding a data set: a function with @register here or in a module named under `plugins`, and its YAML.
"""

import importlib.util
import logging
import os
import tempfile
import urllib.error
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from torch import Tensor

from runner.data import locations
from runner.data.augment import Draw
from runner.data.formats import read_idx, verified_pickles
from runner.faults import BadData, MissingInput

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pixels:
    """Decoded images."""

    pixels: Tensor  # uint8 (N, C, H, W)
    labels: Tensor  # int64 (N,)


@dataclass(frozen=True)
class Files:
    """Images still to be decoded."""

    root: Path
    part: str  # 'train', 'test' …: names the decoded copy in the cache
    names: tuple[str, ...]  # relative to root, sorted
    labels: Tensor
    channels: int = 3
    decode_size: int | None = None  # side of the square that is decoded; None = the images' own size
    on_bad: Literal["stop", "skip"] = "stop"


@dataclass(frozen=True)
class Images:
    train: Pixels | Files
    test: Pixels | Files
    classes: tuple[str, ...]
    val: Pixels | Files | None = None  # a validation set of its own; None = split off the training images


Reader = Callable[..., Images]
_READERS: dict[str, Reader] = {}


def register(name: str) -> Callable[[Reader], Reader]:
    def add(reader: Reader) -> Reader:
        if name in _READERS:
            raise ValueError(f"data set '{name}' is registered twice")
        _READERS[name] = reader
        return reader

    return add


def reader(name: str) -> Reader:
    if name not in _READERS:
        raise ValueError(f"unknown data set '{name}'; accepted: {', '.join(sorted(_READERS))}")
    return _READERS[name]


def balanced_order(labels: Tensor, seed: int) -> Tensor:
    """A random order of the samples in which every beginning holds the classes in their proportions."""
    count = len(labels)
    random = Draw(seed, epoch=0).bits("split", torch.arange(count)).numpy()
    by_class = np.lexsort((random, labels.numpy()))
    sizes = np.bincount(labels.numpy())
    rank = np.arange(count) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    place = np.empty(count)
    place[by_class] = (rank + 0.5) / np.repeat(sizes, sizes)
    return torch.from_numpy(np.lexsort((random, place)))


def _split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Sorted indices of (the rest, the `fraction` held out)."""
    order = balanced_order(labels, seed)
    count = locations.held_out(len(labels), fraction)
    return order[count:].sort().values, order[:count].sort().values


@register("digits")
def digits(*, test_fraction: Annotated[float, Interval(gt=0, lt=1)] = 0.2, test_seed: int = 0) -> Images:
    """The 1,797 8x8 digits of scikit-learn (a part of E. Alpaydin's 'Optical Recognition of Handwritten Digits')."""
    table = _digits_table()
    pixels = np.round(table[:, :64].reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    images, labels = torch.from_numpy(pixels), torch.from_numpy(table[:, 64].astype(np.int64))
    train, test = _split(labels, test_fraction, test_seed)
    return Images(
        Pixels(images[train], labels[train]), Pixels(images[test], labels[test]), tuple(str(i) for i in range(10))
    )


def _digits_table() -> npt.NDArray[np.float64]:
    """The file load_digits reads, without the 1.6 s that importing sklearn.datasets takes."""
    package = importlib.util.find_spec("sklearn")
    file = Path(package.origin or "").parent / "datasets" / "data" / "digits.csv.gz" if package else Path()
    if file.is_file():
        return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return np.hstack([images, labels[:, None]])


@register("mnist")
def mnist(*, root: str = "data", download: bool = False) -> Images:
    """MNIST: 60,000 + 10,000 handwritten digits, 28x28 (LeCun, Cortes, Burges)."""
    return _idx("mnist", "MNIST", Path(root), download, tuple(str(i) for i in range(10)))


@register("fashion_mnist")
def fashion_mnist(*, root: str = "data", download: bool = False) -> Images:
    """Fashion-MNIST: 60,000 + 10,000 articles of clothing, 28x28 (Xiao et al., arXiv:1708.07747)."""
    names = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
    return _idx("fashion_mnist", "FashionMNIST", Path(root), download, names)


@register("cifar10")
def cifar10(*, root: str = "data", download: bool = False) -> Images:
    """CIFAR-10: 50,000 + 10,000 photographs, 32x32 (Krizhevsky 2009)."""
    return _cifar("cifar10", "CIFAR10", Path(root), download)


@register("cifar100")
def cifar100(*, root: str = "data", download: bool = False) -> Images:
    """CIFAR-100: as CIFAR-10 with 100 classes, 500 training images each (Krizhevsky 2009)."""
    return _cifar("cifar100", "CIFAR100", Path(root), download)


@register("imagenet")
def imagenet(
    *,
    root: str = "data/imagenet",
    decode_size: Annotated[int, Ge(1)] | None = None,
    on_bad: Literal["stop", "skip"] = "stop",
) -> Images:
    """ILSVRC 2012 (Russakovsky et al., arXiv:1409.0575): train/<wnid>/ and val/<wnid>/; its test set is val/."""
    _require("imagenet", root)
    return _trees({"train": Path(root, "train"), "test": Path(root, "val")}, 3, decode_size, on_bad)


@register("folder")
def folder(
    *,
    root: str = "data",
    decode_size: Annotated[int, Ge(1)] | None = None,
    channels: Literal[1, 3] = 3,
    test_fraction: Annotated[float, Interval(gt=0, lt=1)] = 0.2,
    test_seed: int = 0,
    on_bad: Literal["stop", "skip"] = "stop",
) -> Images:
    """Images in class folders: train/ and test/ (or val/, or all three), or one tree of which a share is the test set."""
    _require("folder", root)
    layout = locations.folder_layout(Path(root))
    if "all" not in layout:
        return _trees(layout, channels, decode_size, on_bad)
    whole = _trees({"train": layout["all"], "test": layout["all"]}, channels, decode_size, on_bad)
    assert isinstance(whole.train, Files)
    train, test = _split(whole.train.labels, test_fraction, test_seed)
    split = f"of-{test_fraction}-{test_seed}"
    return Images(
        _select(whole.train, train, f"train-{split}"), _select(whole.train, test, f"test-{split}"), whole.classes
    )


@register("synthetic")
def synthetic(
    *,
    samples: Annotated[int, Ge(2)] = 2048,
    test_samples: Annotated[int, Ge(1)] = 512,
    classes: Annotated[int, Ge(2)] = 10,
    channels: Annotated[int, Ge(1)] = 3,
    size: Annotated[int, Ge(2)] = 32,
    noise: Annotated[float, Ge(0)] = 0.2,
    seed: int = 0,
) -> Images:
    """Smooth patterns, one a class, each image shifted round the edges, of random contrast and noisy."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(classes, channels, 4, 4, generator=generator)
    patterns = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)
    patterns /= patterns.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-6)

    def draw(count: int) -> Pixels:
        labels = torch.arange(count) % classes
        pixels = torch.empty(count, channels, size, size, dtype=torch.uint8)
        shifts = torch.randint(size // 2 + 1, (count, 2), generator=generator)
        for i, (down, across) in enumerate(shifts.tolist()):
            contrast = 0.2 + 0.3 * torch.rand(1, generator=generator)
            image = 0.5 + contrast * patterns[labels[i]].roll((down, across), (1, 2))
            image += noise * torch.randn(image.shape, generator=generator)
            pixels[i] = (image * 255).round().clamp(0, 255).to(torch.uint8)
        return Pixels(pixels, labels)

    return Images(draw(samples), draw(test_samples), tuple(f"pattern {i}" for i in range(classes)))


def _require(name: str, root: str, download: bool = False) -> None:
    sentence = locations.missing(name, {"root": root, "download": download})
    if sentence:
        raise MissingInput(sentence)


def _download(name: str, torchvision_class: str, root: Path) -> None:
    """Let torchvision fetch and verify into a temporary folder, then move what is missing into place."""
    from torchvision import datasets  # here, because importing torchvision takes seconds

    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as temporary:
            getattr(datasets, torchvision_class)(temporary, download=True)
            for file in sorted(path for path in Path(temporary).rglob("*") if path.is_file()):
                target = root / file.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
    except (RuntimeError, urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise MissingInput(f"{name}: not in {root.absolute()}, and the download failed: {error}") from error


def _fetch(name: str, torchvision_class: str, root: Path, download: bool) -> None:
    if download and locations.missing(name, {"root": str(root)}):
        _download(name, torchvision_class, root)
    _require(name, str(root))


def _idx(name: str, torchvision_class: str, root: Path, download: bool, classes: tuple[str, ...]) -> Images:
    _fetch(name, torchvision_class, root, download)
    files = locations.IDX[name]

    def pair(images: str, labels: str) -> Pixels:
        pixels = torch.from_numpy(read_idx(root / files.folder / images))
        targets = torch.from_numpy(read_idx(root / files.folder / labels)).long()
        if pixels.ndim != 3 or targets.ndim != 1 or len(pixels) != len(targets) or int(targets.max()) >= len(classes):
            raise BadData(f"{root / files.folder}: {images} and {labels} are not {name} images and their labels")
        return Pixels(pixels[:, None], targets)

    return Images(pair(*files.train), pair(*files.test), classes)


def _cifar(name: str, torchvision_class: str, root: Path, download: bool) -> Images:
    _fetch(name, torchvision_class, root, download)
    files = locations.CIFAR[name]
    content = verified_pickles(root, files)
    try:
        classes = tuple(str(label) for label in content[next(iter(files.meta))][files.names])
        return Images(
            _batches(content, files.train, files.labels), _batches(content, files.test, files.labels), classes
        )
    except (KeyError, ValueError) as error:
        raise BadData(f"{root / files.folder}: not the python version of {name} ({error!r})") from error


def _batches(content: dict[str, Any], names: Iterable[str], labels: str) -> Pixels:
    data = np.concatenate([content[name]["data"] for name in names]).reshape(-1, 3, 32, 32)
    targets = np.concatenate([content[name][labels] for name in names]).astype(np.int64)
    return Pixels(torch.from_numpy(data), torch.from_numpy(targets))


def _trees(layout: dict[str, Path], channels: int, decode_size: int | None, on_bad: Literal["stop", "skip"]) -> Images:
    """One `Files` per split; every split must hold the same classes, each with an image at least."""
    classes = locations.class_folders(layout["train"])
    for root in layout.values():
        if locations.class_folders(root) != classes:
            odd = sorted(set(classes).symmetric_difference(locations.class_folders(root)))
            raise BadData(f"{root} and {layout['train']} hold different classes: {', '.join(odd[:5])}")
    found = {root: _list_images(root, classes) for root in dict.fromkeys(layout.values())}  # one tree is two parts
    parts = {part: Files(root, part, *found[root], channels, decode_size, on_bad) for part, root in layout.items()}
    return Images(parts["train"], parts["test"], tuple(classes), parts.get("val"))


def _list_images(root: Path, classes: list[str]) -> tuple[tuple[str, ...], Tensor]:
    names: list[str] = []
    labels: list[int] = []
    others: list[str] = []
    for label, name in enumerate(classes):
        there = sorted(locations.listed(root / name))
        images = [entry for entry in there if locations.is_image(entry)]
        if not images:
            raise BadData(f"class folder {root / name} holds no images ({locations.KINDS})")
        names += [f"{name}/{image}" for image in images]
        labels += [label] * len(images)
        if len(images) < len(there):  # of a million names there is mostly nothing else
            others += [f"{name}/{entry}" for entry in there if not locations.is_image(entry)]
    if others:
        first = ", ".join(others[:3]) + ", …" * (len(others) > 3)
        log.warning("%s: %d not taken for images (%s): %s", root, len(others), locations.KINDS, first)
    return tuple(names), torch.tensor(labels)


def _select(files: Files, index: Tensor, part: str) -> Files:
    names = tuple(files.names[i] for i in index.tolist())
    return Files(files.root, part, names, files.labels[index], files.channels, files.decode_size, files.on_bad)
