"""Image files to uint8 tensors: decoding that names the bad file, and a cache of whole decoded data sets."""

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from runner.data.datasets import Files, Pixels
from runner.faults import BadData, ConfigError, Fault, about_content

log = logging.getLogger(__name__)
Bytes = npt.NDArray[np.uint8]
T = TypeVar("T")
Box = tuple[float, float, float, float]  # left, top, right, bottom
MAX_PIXELS = 89_478_485  # Pillow only warns from here to twice as much; a training image is never so large


class BadImageError(Exception):
    """An image that cannot be decoded; `name` is relative to the root of its data set."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason


def refuse(files: Files, bad: BadImageError) -> BadData:
    return BadData(
        f"{files.root / bad.name}: {bad.reason} (dataset.on_bad=skip leaves such images out and counts them)"
    )


@contextmanager
def opened(files: Files, name: str) -> Iterator[Image.Image]:
    """The image with only its header read. Whatever its decoder raises, then or later, becomes a BadImageError."""
    try:
        with Image.open(files.root / name) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImageError(name, f"{image.width} x {image.height} pixels may be a decompression bomb")
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                raise BadImageError(name, f"pixels of more than 8 bits (mode {image.mode}) are not supported")
            yield image
    except BadImageError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged input
        if not about_content(error):
            raise
        raise BadImageError(name, f"{type(error).__name__}: {error}") from error


def centre_box(width: int, height: int, share: float = 1.0) -> Box:
    """The central square, its side that share of the image's shorter side."""
    side = min(width, height) * share
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def to_array(image: Image.Image, channels: int, size: int | None, box: Box | None = None) -> Bytes:
    """The image, or a box of it resized to size x size, as uint8 (channels, height, width)."""
    image = image.convert("RGB" if channels == 3 else "L")
    if size is not None:
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box or centre_box(*image.size))
    array = np.asarray(image)
    return np.ascontiguousarray(array.transpose(2, 0, 1)) if channels == 3 else array[None]


def first_size(files: Files) -> tuple[int, int]:
    """Width and height of the first image that has a readable header."""
    for name in files.names:
        try:
            with opened(files, name) as image:
                return image.size
        except BadImageError as bad:
            if files.on_bad == "stop":
                raise refuse(files, bad) from bad
    raise BadData(f"{files.root}: none of the {len(files.names)} images can be read")


@dataclass(frozen=True)
class Decoded:
    """A decoded data set, and the names of the images that were left out."""

    pixels: Pixels
    bad: tuple[str, ...]


def decode_all(files: Files, cache: Path | None, workers: int) -> Decoded:
    """Every image as one tensor: from the cache where its files have not changed since, else decoded now."""
    if cache is None:
        return _assemble(files, *_decode(files, workers))
    source = _source_fingerprint(files)
    key = hashlib.sha256(f"{files.root.resolve()} {files.part} {files.decode_size} {files.channels}".encode())
    stem = cache / f"{files.root.resolve().name}-{files.part}-{key.hexdigest()[:12]}"
    stored = _read_cache(stem, source)
    if stored is None:
        stored = _decode(files, workers)
        _write_cache(stem, source, *stored)
    elif stored[1] and files.on_bad == "stop":
        raise refuse(files, BadImageError(stored[1][0], "cannot be decoded"))
    return _assemble(files, *stored)


def _assemble(files: Files, array: Bytes, bad: list[str]) -> Decoded:
    left_out = set(bad)
    kept = torch.tensor([name not in left_out for name in files.names])
    return Decoded(Pixels(torch.from_numpy(array), files.labels[kept]), tuple(bad))


def _decode(files: Files, workers: int) -> tuple[Bytes, list[str]]:
    log.info("decoding %d images of %s", len(files.names), files.root)
    size = files.decode_size or _common_size(files, workers)

    def decode(name: str) -> Bytes | BadImageError:
        try:
            with opened(files, name) as image:
                return to_array(image, files.channels, files.decode_size)
        except BadImageError as bad:
            return bad

    array = np.empty((len(files.names), files.channels, size, size), np.uint8)
    bad: list[str] = []
    kept = 0
    for image in _in_threads(decode, files.names, workers):
        if isinstance(image, BadImageError):
            bad.append(_skip(files, image))
        else:
            array[kept] = image
            kept += 1
    if not kept:
        raise BadData(f"{files.root}: none of the {len(files.names)} images can be read")
    return array[:kept], bad


def _skip(files: Files, bad: BadImageError) -> str:
    if files.on_bad == "stop":
        raise refuse(files, bad) from bad
    log.warning("left out %s: %s", files.root / bad.name, bad.reason)
    return bad.name


def _common_size(files: Files, workers: int) -> int:
    """The side all images share, from their headers."""

    def size(name: str) -> tuple[int, int] | None:
        try:
            with opened(files, name) as image:
                return image.size
        except BadImageError:
            return None  # reported when it is decoded

    width, height = first_size(files)
    for name, found in zip(files.names, _in_threads(size, files.names, workers), strict=True):
        if found is not None and found != (width, height):
            message = (
                f"images differ in size: {files.names[0]} is {width} x {height}, {name} is {found[0]} x {found[1]}"
            )
            raise ConfigError(
                [Fault("dataset.decode_size", f"{message}; set it to the side of the square they become")]
            )
    if width != height:
        message = f"images are {width} x {height}; set it to the side of the square they become"
        raise ConfigError([Fault("dataset.decode_size", message)])
    return width


def _in_threads(function: Callable[[str], T], names: tuple[str, ...], workers: int) -> Iterator[T]:
    """In order, a chunk at a time: results that wait to be stored stay few."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for start in range(0, len(names), 1024):
            yield from pool.map(function, names[start : start + 1024])


def _source_fingerprint(files: Files) -> str:
    """Changes with any file's name, size or time of change."""
    digest = hashlib.sha256()
    for name in files.names:
        try:
            stat = os.stat(files.root / name)
            state = f"{stat.st_size}\0{stat.st_mtime_ns}"
        except OSError:  # a link to nowhere, say: what to do with it is for those who open it
            state = "absent"
        digest.update(os.fsencode(name) + f"\0{state}\n".encode())
    return digest.hexdigest()


def _array_digest(array: Bytes) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).data).hexdigest()


def _read_cache(stem: Path, source: str) -> tuple[Bytes, list[str]] | None:
    """The stored array, mapped copy-on-write so that processes share it; None if it is absent, stale or damaged."""
    if not Path(f"{stem}.json").is_file():
        return None
    try:
        about = json.loads(Path(f"{stem}.json").read_text())
        if about["source"] != source:
            log.info("%s: the images have changed; decoding them again", stem)
            return None
        array = np.load(Path(f"{stem}.npy"), mmap_mode="c", allow_pickle=False)
        if _array_digest(array) == about["sha256"]:
            return array, [str(name) for name in about["bad"]]
        log.warning("%s: the stored copy is damaged; decoding the images again", stem)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        log.warning("%s: the stored copy cannot be read (%s); decoding the images again", stem, error)
    return None


def _write_cache(stem: Path, source: str, array: Bytes, bad: list[str]) -> None:
    """The array first, then the JSON that vouches for it. A run goes on without a cache where none can be written."""
    about = json.dumps({"source": source, "sha256": _array_digest(array), "bad": bad}).encode()
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        _write_atomically(Path(f"{stem}.npy"), lambda file: np.save(file, array, allow_pickle=False))
        _write_atomically(Path(f"{stem}.json"), lambda file: file.write(about))
    except OSError as error:
        log.warning("the decoded images could not be stored in %s: %s", stem.parent, error)


def _write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
