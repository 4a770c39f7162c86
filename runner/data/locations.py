"""Where the files of each data set lie and how many images they hold.

Answers in milliseconds: nothing heavy is imported, so that a config can be checked before torch is loaded.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.faults import BadData

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
KINDS = " ".join(IMAGE_SUFFIXES)  # for people
COUNT_AT_MOST = 20_000  # files listed before a folder counts as 'large': a scan beyond that is no longer quick


@dataclass(frozen=True)
class IdxFiles:
    """MNIST's format: http://yann.lecun.com/exdb/mnist (big-endian header, then bytes)."""

    folder: str
    train_samples: int = 60_000
    train: tuple[str, str] = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
    test: tuple[str, str] = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@dataclass(frozen=True)
class CifarFiles:
    """The 'python version' of https://www.cs.toronto.edu/~kriz/cifar.html: pickles, so each has a checksum to meet."""

    folder: str
    archive: str
    train: dict[str, str]  # file name: MD5
    test: dict[str, str]
    meta: dict[str, str]
    labels: str  # key of the labels in a batch
    names: str  # key of the class names in the meta file
    train_samples: int = 50_000


IDX = {"mnist": IdxFiles("MNIST/raw"), "fashion_mnist": IdxFiles("FashionMNIST/raw")}
CIFAR = {
    "cifar10": CifarFiles(
        folder="cifar-10-batches-py",
        archive="cifar-10-python.tar.gz",
        train={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        test={"test_batch": "40351d587109b95175f43aff81a1287e"},
        meta={"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"},
        labels="labels",
        names="label_names",
    ),
    "cifar100": CifarFiles(
        folder="cifar-100-python",
        archive="cifar-100-python.tar.gz",
        train={"train": "16019d7e3df5f24257cddd939b257f8d"},
        test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        meta={"meta": "7973b15100ade9c7d40fb424638fde48"},
        labels="fine_labels",
        names="fine_label_names",
    ),
}
DIGITS_SAMPLES = 1797


def held_out(samples: int, fraction: float) -> int:
    """How many of `samples` a split sets aside: at least one, and never all."""
    return max(1, min(samples - 1, round(samples * fraction)))


def class_folders(folder: Path) -> list[str]:
    """The class names below a folder, sorted: the order of a directory listing differs between file systems."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def listed(folder: Path) -> Iterator[str]:
    """Names of all that is directly in a folder and not hidden, in no particular order."""
    with os.scandir(folder) as entries:
        yield from (entry.name for entry in entries if not entry.name.startswith("."))


def folder_layout(root: Path) -> dict[str, Path]:
    """{'train': …, 'test': …[, 'val': …]}, or {'all': root} for one tree of class folders.

    A tree with val/ but no test/ is tested on val/.
    """
    splits = {name: root / name for name in ("train", "val", "test") if (root / name).is_dir()}
    if "train" not in splits:
        return {"all": root}
    if "test" not in splits and "val" in splits:
        splits["test"] = splits.pop("val")
    if "test" not in splits:
        raise BadData(f"{root} has train/ but neither test/ nor val/ beside it")
    return splits


def missing(name: str, arguments: Mapping[str, Any]) -> str | None:
    """One sentence on what is missing and how to get it, or None if the files are there or need not be."""
    root = Path(str(arguments.get("root", "data")))
    download = bool(arguments.get("download", False))
    if name in IDX:
        return None if download else _missing_idx(name, root)
    if name in CIFAR:
        return None if download else _missing_cifar(name, root)
    if name == "imagenet":
        return _missing_imagenet(root)
    if name == "folder":
        return _missing_folder(root)
    return None


def which_files(name: str, arguments: Mapping[str, Any]) -> str:
    """What tells images in folders from others of the same data set, before one is read; nothing where the name says it all.

    A folder of one's own is known by its place, however that is written; of ImageNet, which lies elsewhere on every
    machine, people take subsets: by the names of its classes.
    """
    root = Path(str(arguments.get("root", "data")))
    if name == "folder":
        return str(root.resolve())
    if name != "imagenet":
        return ""
    try:
        return " ".join(class_folders(root / "train"))
    except OSError:  # not there yet: the check of the config says so
        return ""


def train_samples(name: str, arguments: Mapping[str, Any]) -> int | None:
    """Images in a training epoch; None where counting them would take long.

    `arguments` are the keys of `dataset`, the reader's own and the common ones: validation, val_fraction and limit count.
    """
    try:
        samples, has_own_validation = _samples_before_split(name, arguments)
    except (OSError, BadData):
        return None
    if samples is None:
        return None
    if arguments.get("validation", "test") == "split" and not has_own_validation and samples > 1:
        samples -= held_out(samples, float(arguments["val_fraction"]))
    limit = arguments.get("limit")
    return samples if limit is None else min(samples, int(limit))


def shape(name: str, arguments: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """(channels, classes, side) of the images that a model will see; None where only reading them would tell.

    `arguments` are the keys of `dataset`, the reader's own and the common ones.
    """
    known: tuple[int, int, int] | None = None
    if name in IDX:
        known = 1, 10, 28
    elif name in CIFAR:
        known = 3, 100 if name == "cifar100" else 10, 32
    elif name == "digits":
        known = 1, 10, 8
    elif name == "synthetic":
        known = int(arguments["channels"]), int(arguments["classes"]), int(arguments["size"])
    elif name in ("imagenet", "folder") and (arguments.get("decode_size") or arguments.get("input_size")):
        known = _shape_of_folders(arguments)
    if known is None:
        return None
    return known[0], known[1], int(arguments.get("input_size") or known[2])


def _shape_of_folders(arguments: Mapping[str, Any]) -> tuple[int, int, int] | None:
    root = Path(str(arguments.get("root", "data")))
    try:
        classes = len(class_folders(root / "train" if (root / "train").is_dir() else root))
    except OSError:
        return None
    return int(arguments.get("channels", 3)), classes, int(arguments.get("decode_size") or 0)


def _samples_before_split(name: str, arguments: Mapping[str, Any]) -> tuple[int | None, bool]:
    """The training images of the files, and whether a validation set of their own stands beside them."""
    if name in IDX:
        return IDX[name].train_samples, False
    if name in CIFAR:
        return CIFAR[name].train_samples, False
    if name == "digits":
        return DIGITS_SAMPLES - held_out(DIGITS_SAMPLES, float(arguments["test_fraction"])), False
    if name == "synthetic":
        return int(arguments["samples"]), False
    root = Path(str(arguments.get("root", "data")))
    if name == "imagenet":
        return _count(root / "train"), False
    if name == "folder":
        layout = folder_layout(root)
        if "train" in layout:
            return _count(layout["train"]), "val" in layout
        everything = _count(root)
        return everything and everything - held_out(everything, float(arguments["test_fraction"])), False
    return None, False


def _count(folder: Path) -> int | None:
    count = 0
    for name in class_folders(folder):
        count += sum(map(is_image, listed(folder / name)))
        if count > COUNT_AT_MOST:
            return None
    return count


def _missing_idx(name: str, root: Path) -> str | None:
    files = IDX[name]
    folder = root / files.folder
    for file in files.train + files.test:
        if not (folder / file).is_file() and not (folder / f"{file}.gz").is_file():
            return (
                f"{name}: {file} (or {file}.gz) was looked for in {folder.absolute()}; "
                "put the four idx files there, set dataset.root to the folder above, or set dataset.download=true"
            )
    return None


def _missing_cifar(name: str, root: Path) -> str | None:
    files = CIFAR[name]
    if (root / files.archive).is_file():
        return None
    for file in files.train | files.test | files.meta:
        if not (root / files.folder / file).is_file():
            return (
                f"{name}: {files.folder}/{file} (or the archive {files.archive}) was looked for in {root.absolute()}; "
                "put the folder or the archive there, set dataset.root, or set dataset.download=true"
            )
    return None


def _missing_imagenet(root: Path) -> str | None:
    for split in ("train", "val"):
        if not (root / split).is_dir():
            return (
                f"imagenet: {split}/ was looked for in {root.absolute()}; ILSVRC 2012 cannot be downloaded without "
                "an account (https://image-net.org): unpack it as train/<wnid>/*.JPEG and val/<wnid>/*.JPEG"
            )
    return None


def _missing_folder(root: Path) -> str | None:
    whole = root / "train" if (root / "train").is_dir() else root
    classes = class_folders(whole) if whole.is_dir() else []
    if not root.is_dir():
        problem = f"there is no folder {root.absolute()}"
    elif not classes:
        problem = f"{whole.absolute()} has no folders in it"
    elif len(classes) == 1:
        problem = f"{whole.absolute()} has one class only, {classes[0]!r}, and there is nothing to tell it from"
    elif not any(is_image(name) for label in classes for name in listed(whole / label)):
        problem = f"{whole.absolute()} has no images in its {len(classes)} folders ({KINDS})"
    else:
        return None
    return f"folder: {problem}; expected train/<class>/* and test/<class>/* (or val/), or <class>/* in one tree"
