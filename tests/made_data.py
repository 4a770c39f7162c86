"""Data sets made in a test, in the format of the originals, and the config that reads them."""

import gzip
import hashlib
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import yaml
from PIL import Image

from runner.data import locations
from runner.schema import DatasetConfig

CONF = Path(__file__).parent.parent / "conf" / "dataset"


def dataset_keys(name: str, **overrides: Any) -> dict[str, Any]:
    """The keys of conf/dataset/NAME.yaml, some of them changed; `augment` is merged."""
    keys = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    keys.pop("defaults", None)
    augment = keys["augment"] | overrides.pop("augment", {})
    assert overrides.keys() <= keys.keys(), "a test changes keys that exist"
    return keys | overrides | {"augment": augment}


def dataset_config(name: str, **overrides: Any) -> DatasetConfig:
    keys = dataset_keys(name, **overrides)
    common = {key: keys[key] for key in keys if key in DatasetConfig.model_fields}
    own = {key: keys[key] for key in keys if key not in common}
    return DatasetConfig(**common, arguments=own)


def random_images(*shape: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_idx(path: Path, values: npt.NDArray[np.uint8], compress: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()
    if compress:
        Path(f"{path}.gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


def write_mnist(root: Path, train: int = 50, test: int = 20, folder: str = "MNIST", compress: bool = False) -> None:
    raw = root / folder / "raw"
    for prefix, count in (("train", train), ("t10k", test)):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", random_images(count, 28, 28, seed=count), compress)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10, compress)


def write_cifar(root: Path, name: str, monkeypatch: pytest.MonkeyPatch, archive: bool = False) -> None:
    """The original's pickles with made images; the checksums that are expected become those of the files made."""
    files = locations.CIFAR[name]
    folder = root / files.folder
    folder.mkdir(parents=True)
    classes = 10 if name == "cifar10" else 100
    for seed, batch in enumerate([*files.train, *files.test]):
        data = random_images(40, 3072, seed=seed)
        content = {"data": data, files.labels: [i % classes for i in range(40)]}
        (folder / batch).write_bytes(pickle.dumps(content, protocol=2))
    names = {files.names: [f"class {i}" for i in range(classes)]}
    (folder / next(iter(files.meta))).write_bytes(pickle.dumps(names, protocol=2))
    for group in (files.train, files.test, files.meta):
        for file in group:
            monkeypatch.setitem(group, file, hashlib.md5((folder / file).read_bytes()).hexdigest())
    if archive:
        with tarfile.open(root / files.archive, "w:gz") as tar:
            tar.add(folder, arcname=files.folder)
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def write_images(
    root: Path, classes: list[str], count: int, size: tuple[int, int] | None = (16, 16), suffix: str = ".png"
) -> None:
    """Class folders; size None = every image of another size."""
    random = np.random.default_rng(list(root.name.encode()))
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            width, height = size or random.integers(20, 60, 2)
            pixels = random.integers(0, 256, (int(height), int(width), 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03}{suffix}")
