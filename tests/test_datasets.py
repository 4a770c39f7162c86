"""Every reader on files in the original format, and what happens when the files are wrong."""

import functools
import hashlib
import http.server
import os
import pickle
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_data import dataset_keys, random_images, write_cifar, write_idx, write_images, write_mnist
from PIL import Image

from runner.data import datasets, locations
from runner.data.datasets import Files, Images, Pixels, balanced_order, reader
from runner.data.locations import missing, train_samples
from runner.faults import BadData, MissingInput


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


REAL_MNIST = os.environ.get("RUNNER_MNIST_ROOT")


def read(name: str, **arguments: Any) -> Images:
    return reader(name)(**arguments)


def pixels(part: Pixels | Files | None) -> Pixels:
    assert isinstance(part, Pixels)
    return part


def files(part: Pixels | Files | None) -> Files:
    assert isinstance(part, Files)
    return part


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    expected = np.round(images * (255 / 16)).astype(np.uint8)
    found = read("digits")
    train, test = pixels(found.train), pixels(found.test)
    assert (len(train.labels), len(test.labels)) == (1438, 359)
    together = torch.cat([train.pixels, test.pixels]).view(-1, 64).numpy()
    assert sorted(map(bytes, together)) == sorted(map(bytes, expected))
    assert torch.bincount(torch.cat([train.labels, test.labels])).tolist() == np.bincount(labels).tolist()
    assert (torch.bincount(test.labels) - 36).abs().max() <= 1, "every class gives its share"
    assert np.array_equal(datasets._digits_table(), np.hstack([images, labels[:, None]]))


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_idx_files(tmp_path: Path, name: str, folder: str, compress: bool) -> None:
    write_mnist(tmp_path, folder=folder, compress=compress)
    found = read(name, root=str(tmp_path))
    train = pixels(found.train)
    assert torch.equal(train.pixels[:, 0], torch.from_numpy(random_images(50, 28, 28, seed=50)))
    assert train.labels.tolist() == [i % 10 for i in range(50)]
    assert len(pixels(found.test).labels) == 20
    assert len(found.classes) == 10


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _other_type(path: Path) -> None:
    path.write_bytes(b"\0\0\x0d\x03" + path.read_bytes()[4:])


def _header_only(path: Path) -> None:
    path.write_bytes(b"\0\0")


def _more_dimensions_than_bytes(path: Path) -> None:
    path.write_bytes(b"\0\0\x08\xff" + bytes(40))


@pytest.mark.parametrize("damage", [_cut, _other_type, _header_only, _more_dimensions_than_bytes])
def test_damaged_idx_files_are_named(tmp_path: Path, damage: Any) -> None:
    write_mnist(tmp_path)
    damage(tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte")
    with pytest.raises(BadData, match="train-images-idx3-ubyte"):
        read("mnist", root=str(tmp_path))


def test_damaged_gz_is_named(tmp_path: Path) -> None:
    write_mnist(tmp_path, compress=True)
    _cut(tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz")
    with pytest.raises(BadData, match="t10k-images-idx3-ubyte"):
        read("mnist", root=str(tmp_path))


def test_labels_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    write_idx(tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte", np.full(50, 11, np.uint8))
    with pytest.raises(BadData, match="train-labels"):
        read("mnist", root=str(tmp_path))


@pytest.mark.skipif(REAL_MNIST is None, reason="RUNNER_MNIST_ROOT does not name a folder that holds MNIST/raw")
def test_real_mnist() -> None:
    found = read("mnist", root=REAL_MNIST)
    train, test = pixels(found.train), pixels(found.test)
    assert train.pixels.shape == (60_000, 1, 28, 28)
    assert train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert torch.bincount(test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert float(train.pixels.double().mean()) / 255 == pytest.approx(0.1307, abs=1e-4)


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize(("name", "train", "classes"), [("cifar10", 200, 10), ("cifar100", 40, 100)])
def test_cifar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, train: int, classes: int, archive: bool
) -> None:
    write_cifar(tmp_path, name, monkeypatch, archive)
    before = sorted(tmp_path.rglob("*"))
    found = read(name, root=str(tmp_path))
    first = pixels(found.train)
    assert first.pixels.shape == (train, 3, 32, 32)
    assert torch.equal(first.pixels[:40], torch.from_numpy(random_images(40, 3072, seed=0)).view(40, 3, 32, 32))
    assert first.labels[:40].tolist() == [i % classes for i in range(40)]
    assert found.classes[:2] == ("class 0", "class 1")
    assert len(found.classes) == classes
    assert sorted(tmp_path.rglob("*")) == before, "nothing is unpacked"


def test_the_checksums_are_those_torchvision_checks() -> None:
    from torchvision.datasets import CIFAR10, CIFAR100

    for name, theirs in (("cifar10", CIFAR10), ("cifar100", CIFAR100)):
        ours = locations.CIFAR[name]
        assert ours.train == dict(theirs.train_list)
        assert ours.test == dict(theirs.test_list)
        assert ours.meta == {theirs.meta["filename"]: theirs.meta["md5"]}
        assert (ours.folder, ours.archive, ours.names) == (theirs.base_folder, theirs.filename, theirs.meta["key"])


class _RunsCode:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("archive", [False, True])
def test_a_wrong_checksum_is_refused_before_anything_is_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, archive: bool
) -> None:
    write_cifar(tmp_path, "cifar10", monkeypatch)
    marker = tmp_path / "code has run"
    folder = tmp_path / "cifar-10-batches-py"
    harmful = pickle.dumps(_RunsCode(marker))
    (folder / "data_batch_1").write_bytes(harmful)
    if archive:
        with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
            tar.add(folder, arcname=folder.name)
        folder.rename(tmp_path / "elsewhere")
    with pytest.raises(BadData, match="data_batch_1 is damaged or not the original"):
        read("cifar10", root=str(tmp_path))
    assert not marker.exists()
    pickle.loads(harmful)
    assert marker.exists(), "the pickle would have run code"


def test_a_cut_archive_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, "cifar10", monkeypatch, archive=True)
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(BadData, match=r"cifar-10-python\.tar\.gz"):
        read("cifar10", root=str(tmp_path))


def test_folders_by_train_and_test(tmp_path: Path) -> None:
    write_images(tmp_path / "train", ["b", "a", "ü c"], 3)
    write_images(tmp_path / "test", ["b", "a", "ü c"], 2)
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".hidden").mkdir()
    found = read("folder", root=str(tmp_path))
    assert found.classes == ("a", "b", "ü c")
    assert files(found.train).names[:4] == ("a/000.png", "a/001.png", "a/002.png", "b/000.png")
    assert files(found.train).labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert found.val is None


def test_val_is_the_test_set_unless_there_is_one(tmp_path: Path) -> None:
    write_images(tmp_path / "train", ["a", "b"], 3)
    write_images(tmp_path / "val", ["a", "b"], 2)
    found = read("folder", root=str(tmp_path))
    assert files(found.test).root == tmp_path / "val"
    write_images(tmp_path / "test", ["a", "b"], 1)
    found = read("folder", root=str(tmp_path))
    assert files(found.test).root == tmp_path / "test"
    assert files(found.val).root == tmp_path / "val"


def test_one_tree_is_split_by_seed(tmp_path: Path) -> None:
    write_images(tmp_path, ["a", "b"], 10)
    found = read("folder", root=str(tmp_path), test_fraction=0.3)
    train, test = files(found.train), files(found.test)
    assert set(train.names) | set(test.names) == {f"{c}/{i:03}.png" for c in "ab" for i in range(10)}
    assert torch.bincount(train.labels).tolist() == [7, 7]
    assert torch.bincount(test.labels).tolist() == [3, 3]
    again = read("folder", root=str(tmp_path), test_fraction=0.3)
    assert files(again.test).names == test.names
    other = read("folder", root=str(tmp_path), test_fraction=0.3, test_seed=1)
    assert files(other.test).names != test.names


def test_imagenet_folders(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 1)):
        write_images(tmp_path / split, ["n01440764", "n01443537"], count, size=None, suffix=".JPEG")
    found = read("imagenet", root=str(tmp_path))
    assert found.classes == ("n01440764", "n01443537")
    assert (len(files(found.train).names), len(files(found.test).names)) == (6, 2)


def test_an_empty_class_is_named(tmp_path: Path) -> None:
    write_images(tmp_path / "train", ["a", "b"], 1)
    write_images(tmp_path / "test", ["a"], 1)
    (tmp_path / "test" / "b").mkdir()
    with pytest.raises(BadData, match="test/b holds no images"):
        read("folder", root=str(tmp_path))


def test_folders_that_nothing_can_be_learned_from_are_missing_something(tmp_path: Path) -> None:
    for root in (tmp_path / "tree", tmp_path / "split" / "train"):
        (root / "a").mkdir(parents=True)
        keys = dataset_keys("folder", root=str(tmp_path / root.relative_to(tmp_path).parts[0]))
        assert f"{root} has one class only, 'a'" in str(missing("folder", keys))
        (root / "b").mkdir()
        (root / "b" / "notes.txt").touch()
        assert f"{root} has no images in its 2 folders (.jpg" in str(missing("folder", keys))
        Image.new("L", (4, 4)).save(root / "b" / "0.png")
        assert missing("folder", keys) is None


def test_what_is_not_taken_for_an_image_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path, ["a", "b"], 4)
    for name in ("a/notes.txt", "a/c.gif", "b/d.GIF", "b/.hidden"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "b" / "more").mkdir()
    found = read("folder", root=str(tmp_path), test_fraction=0.5)
    assert len(files(found.train).names) == len(files(found.test).names) == 4
    (told,) = caplog.messages
    assert told.startswith(f"{tmp_path}: 4 not taken for images (.jpg .jpeg")
    assert told.endswith(": a/c.gif, a/notes.txt, b/d.GIF, …")


def test_splits_with_different_classes_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "train", ["a", "b"], 1)
    write_images(tmp_path / "test", ["a", "c"], 1)
    with pytest.raises(BadData, match="different classes: b, c"):
        read("folder", root=str(tmp_path))


def test_train_alone_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "train", ["a", "b"], 1)
    with pytest.raises(BadData, match="neither test/ nor val/"):
        read("folder", root=str(tmp_path))


def test_synthetic_can_be_learned_but_not_at_a_glance() -> None:
    found = read("synthetic", samples=600, test_samples=200, classes=5, size=16)
    train, test = pixels(found.train), pixels(found.test)
    assert train.pixels.shape == (600, 3, 16, 16)
    again = pixels(read("synthetic", samples=600, test_samples=200, classes=5, size=16).train)
    assert torch.equal(train.pixels, again.pixels)
    other = pixels(read("synthetic", samples=600, test_samples=200, classes=5, size=16, seed=1).train)
    assert not torch.equal(train.pixels, other.pixels)
    x, y = train.pixels.float().flatten(1), test.pixels.float().flatten(1)
    nearest_image = train.labels[torch.cdist(y, x).argmin(1)]
    assert float((nearest_image == test.labels).float().mean()) > 0.5
    means = torch.stack([x[train.labels == c].mean(0) for c in range(5)])
    nearest_mean = torch.cdist(y, means).argmin(1)
    assert float((nearest_mean == test.labels).float().mean()) < 0.9


def test_any_beginning_of_a_balanced_order_is_balanced() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    order = balanced_order(labels, seed=0)
    assert torch.equal(order.sort().values, torch.arange(100))
    for count in (10, 20, 50):
        share = torch.bincount(labels[order[:count]], minlength=3) / count
        assert (share - torch.tensor([0.6, 0.3, 0.1])).abs().max() <= 1 / count
    assert not torch.equal(order, balanced_order(labels, seed=1))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mnist", ["train-images-idx3-ubyte", "MNIST/raw", "dataset.download=true"]),
        ("fashion_mnist", ["FashionMNIST/raw", "dataset.download=true"]),
        ("cifar10", ["cifar-10-batches-py", "cifar-10-python.tar.gz", "dataset.download=true"]),
        ("cifar100", ["cifar-100-python.tar.gz"]),
        ("imagenet", ["train/<wnid>/*.JPEG", "image-net.org"]),
        ("folder", ["train/<class>/*"]),
    ],
)
def test_missing_data_says_where_it_was_looked_for_and_how_to_get_it(
    tmp_path: Path, name: str, words: list[str]
) -> None:
    root = tmp_path / "nowhere"
    sentence = missing(name, dataset_keys(name, root=str(root)))
    assert sentence is not None
    assert str(root) in sentence
    assert all(word in sentence for word in words), sentence
    with pytest.raises(MissingInput, match=name):
        read(name, root=str(root))
    if name in {"mnist", "cifar10"}:
        assert missing(name, dataset_keys(name, root=str(root), download=True)) is None


@pytest.mark.parametrize("name", ["digits", "synthetic", "a plugin's"])
def test_what_needs_no_files_misses_none(name: str) -> None:
    assert missing(name, {}) is None


def test_a_failed_download_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real attempt at a port nobody listens on: no network is needed to fail."""
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(MissingInput, match="download failed"):
        read("mnist", root=str(tmp_path / "data"), download=True)
    assert list((tmp_path / "data").rglob("*")) == []


def test_a_download_is_moved_into_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's own download, from a server on this machine."""
    from torchvision.datasets import MNIST

    write_mnist(tmp_path / "mirror", compress=True)
    mirror = tmp_path / "mirror" / "MNIST" / "raw"
    sums = [(file.name, hashlib.md5(file.read_bytes()).hexdigest()) for file in sorted(mirror.iterdir())]
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(mirror))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setattr(MNIST, "resources", sums)
        found = read("mnist", root=str(tmp_path / "data"), download=True)
        server.shutdown()
    assert len(pixels(found.train).labels) == 50
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["MNIST"]


def test_sizes_known_beforehand() -> None:
    assert train_samples("mnist", dataset_keys("mnist")) == 55_000
    assert train_samples("cifar10", dataset_keys("cifar10", validation="test")) == 50_000
    assert train_samples("cifar100", dataset_keys("cifar100", limit=100)) == 100
    assert train_samples("digits", dataset_keys("digits")) == 1150
    assert train_samples("imagenet", dataset_keys("imagenet", root="/nowhere")) is None
    assert train_samples("a plugin's", {}) is None


def test_counting_stops_where_it_would_take_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, ["a", "b"], 6)
    keys = dataset_keys("folder", root=str(tmp_path), test_fraction=0.5, val_fraction=0.5)
    assert train_samples("folder", keys) == 3
    monkeypatch.setattr(locations, "COUNT_AT_MOST", 5)
    assert train_samples("folder", keys) is None


def test_checks_before_a_run_import_nothing_heavy() -> None:
    code = "import runner.data.locations, sys; print([m for m in ('torch', 'numpy', 'torchvision', 'PIL') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_unknown_and_doubled_names() -> None:
    with pytest.raises(ValueError, match="accepted: cifar10, cifar100, digits"):
        reader("cifar")
    with pytest.raises(ValueError, match="twice"):
        datasets.register("digits")(datasets.digits)


def test_a_listing_does_not_depend_on_the_order_of_the_directory(tmp_path: Path) -> None:
    names = [f"{i:03}.png" for i in range(20)]
    for root, order in ((tmp_path / "one", names), (tmp_path / "two", names[::-1])):
        for name in order:
            for label in "ab":
                (root / label).mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (4, 4)).save(root / label / name)
    one, two = (files(read("folder", root=str(tmp_path / side)).train).names for side in ("one", "two"))
    assert one == two
