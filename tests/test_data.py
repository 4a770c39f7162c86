"""Whole data sets as batches: the same for any number of workers, after any interruption, over any number of processes."""

import io
import json
import logging
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_data import dataset_config, dataset_keys, write_cifar, write_images, write_mnist
from PIL import Image

from runner.data import decode
from runner.data.datasets import Files
from runner.data.load import Data, load
from runner.data.locations import train_samples
from runner.data.sources import MemorySource, Source, StreamSource
from runner.faults import BadData, ConfigError, Preempted

CPU = torch.device("cpu")
Batches = list[tuple[torch.Tensor, torch.Tensor]]
AUGMENT = {"crop": 2, "flip": True, "cutout": 4, "scale": None}


def data(name: str, **overrides: Any) -> Data:
    return load(dataset_config(name, **overrides), device=CPU)


def synthetic(**overrides: Any) -> Data:
    keys = {"samples": 130, "test_samples": 37, "size": 12, "classes": 5, "augment": AUGMENT}
    return data("synthetic", **(keys | overrides))


def images(root: Path, count: int = 12, size: tuple[int, int] | None = (16, 16), **overrides: Any) -> Data:
    """A folder data set of two classes; without a size, every image is of another and they are streamed."""
    if not root.exists():
        write_images(root / "train", ["a", "b"], count, size)
        write_images(root / "test", ["a", "b"], 4, size)
    keys = {"root": str(root), "workers": 0, "cache": None, "val_fraction": 0.25, "augment": AUGMENT}
    return data("folder", **(keys | overrides))


def batches(source: Source, seed: int = 0, epoch: int = 0, batch_size: int = 8, **more: Any) -> Batches:
    return list(source.batches(seed=seed, epoch=epoch, batch_size=batch_size, **more))


def assert_equal(first: Batches, second: Batches) -> None:
    assert len(first) == len(second)
    for (x, labels), (y, others) in zip(first, second, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(labels, others)
        assert x.is_contiguous()
        assert y.is_contiguous()


def rows(source: Source, found: Batches) -> list[bytes]:
    """What tells images apart, sorted: their pixels."""
    return sorted(x.numpy().tobytes() for batch, _ in found for x in batch)


def test_batches_are_float32_nchw_on_the_device_with_int64_labels() -> None:
    made = synthetic()
    x, labels = batches(made.train)[0]
    assert x.shape == (8, 3, 12, 12)
    assert (x.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert x.is_contiguous()
    assert (made.in_channels, made.image_size, len(made.classes)) == (3, 12, 5)
    assert (len(made.train), len(made.val), len(made.test)) == (104, 26, 37)


def test_training_images_are_normalised() -> None:
    made = synthetic(augment={"crop": 0, "flip": False, "cutout": 0})
    x = torch.cat([x for x, _ in batches(made.train)])
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3), rtol=0, atol=1e-5)


def test_same_seed_and_epoch_same_batches_else_others() -> None:
    made = synthetic()
    first = batches(made.train)
    assert_equal(first, batches(synthetic().train))
    assert not torch.equal(first[0][0], batches(made.train, epoch=1)[0][0])
    assert not torch.equal(first[0][0], batches(made.train, seed=1)[0][0])


def test_the_global_generator_neither_matters_nor_moves() -> None:
    made = synthetic()
    first = batches(made.train)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert_equal(first, batches(made.train))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("start", [0, 1, 7, 13])
def test_an_interrupted_epoch_goes_on_with_the_same_batches(start: int) -> None:
    made = synthetic()
    assert_equal(batches(made.train)[start:], batches(made.train, start=start))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [6, 8, 52, 104, 200])
def test_processes_share_every_sample_once(world: int, batch_size: int) -> None:
    made = synthetic(augment={"crop": 0, "flip": False, "cutout": 0})
    whole = rows(made.train, batches(made.train, batch_size=104))
    shares = [batches(made.train, batch_size=batch_size, rank=rank, world=world) for rank in range(world)]
    assert {len(share) for share in shares} == {made.train.steps(batch_size, world)}
    seen = sorted(row for share in shares for row in rows(made.train, share))
    rest = 104 % batch_size
    if rest // world >= 2 or rest == 0:
        assert seen == whole
    else:
        assert len(seen) == 104 - rest, "a last batch that leaves a process fewer than two images is dropped"
        assert set(seen) <= set(whole)
    for step in zip(*shares, strict=True):
        sizes = [len(labels) for _, labels in step]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_cut_up_one_global_batch(world: int) -> None:
    made = synthetic()
    alone = batches(made.train, batch_size=4 * world)
    shares = [batches(made.train, batch_size=4 * world, rank=rank, world=world) for rank in range(world)]
    for step, (x, _) in enumerate(alone):
        assert torch.equal(x, torch.cat([share[step][0] for share in shares]))


@pytest.mark.parametrize("world", [1, 2, 3, 40])
def test_evaluation_sees_every_image_once_and_in_order(world: int) -> None:
    made = synthetic(drop_last=True)
    for source, count in ((made.val, 26), (made.test, 37)):
        shares = [batches(source, batch_size=3 * world, rank=rank, world=world) for rank in range(world)]
        seen = [row for share in shares for row in rows(source, share)]
        assert sorted(seen) == rows(source, batches(source, batch_size=count))
        assert len(seen) == count
        assert max(len(share) for share in shares) == source.steps(3 * world, world)
    assert_equal(batches(made.test, epoch=3, seed=5), batches(made.test))


@pytest.mark.parametrize(("samples", "steps"), [(16, 2), (17, 2), (18, 3)])
def test_a_last_training_batch_of_one_is_dropped(samples: int, steps: int) -> None:
    made = synthetic(samples=samples, validation="test")
    assert made.train.steps(8) == steps == len(batches(made.train))


def test_drop_last() -> None:
    made = synthetic(samples=23, validation="test", drop_last=True)
    assert [len(labels) for _, labels in batches(made.train)] == [8, 8]
    assert made.train.steps(24) == 0


def test_validation_is_apart_from_training_and_follows_the_split_seed() -> None:
    plain = {"crop": 0, "flip": False, "cutout": 0}
    made, other = synthetic(augment=plain), synthetic(augment=plain, split_seed=1)
    train, val = rows(made.train, batches(made.train)), rows(made.val, batches(made.val))
    assert not set(train) & set(val)
    assert len(set(train) | set(val)) == 130
    labels = torch.cat([labels for _, labels in batches(made.val)])
    assert torch.bincount(labels).max() - torch.bincount(labels).min() <= 1
    assert rows(other.val, batches(other.val)) != val


def test_on_request_the_test_set_validates() -> None:
    made = synthetic(validation="test")
    assert len(made.train) == 130
    assert_equal(batches(made.val), batches(made.test))


def test_limit_keeps_the_classes_in_proportion() -> None:
    made = synthetic(limit=20)
    labels = torch.cat([labels for _, labels in batches(made.train)])
    assert len(labels) == 20
    assert (torch.bincount(labels, minlength=5) - 4).abs().max() <= 1
    assert len(made.val) == 26


@pytest.mark.parametrize("size", [None, 12, 20, 6])
def test_input_size_of_a_phase(size: int | None) -> None:
    made = synthetic()
    for source in (made.train, made.test):
        assert batches(source, input_size=size)[0][0].shape == (8, 3, size or 12, size or 12)


def test_random_resized_crops_of_images_in_memory() -> None:
    made = synthetic(augment={"crop": 0, "flip": True, "cutout": 0, "scale": [0.3, 1.0]})
    first = batches(made.train, input_size=10)
    assert first[0][0].shape == (8, 3, 10, 10)
    assert_equal(first[2:], batches(made.train, input_size=10, start=2))
    assert not torch.equal(first[0][0], batches(made.train, input_size=10, epoch=1)[0][0])


def test_the_default_data_set_is_enlarged_for_networks_of_28_pixels() -> None:
    made = data("digits")
    x, _ = batches(made.train, batch_size=32)[0]
    assert x.shape == (32, 1, 28, 28)
    assert made.image_size == 28
    assert len(made.train) == train_samples("digits", dataset_keys("digits")) == 1150


def test_files_of_mnist_and_cifar_become_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path)
    write_cifar(tmp_path, "cifar10", monkeypatch)
    mnist, cifar = data("mnist", root=str(tmp_path)), data("cifar10", root=str(tmp_path))
    assert batches(mnist.train)[0][0].shape == (8, 1, 28, 28)
    assert batches(cifar.train)[0][0].shape == (8, 3, 32, 32)
    assert cifar.mean == (0.4914, 0.4822, 0.4465)
    assert (len(cifar.train), len(cifar.val), len(cifar.test)) == (180, 20, 40)


def test_mean_and_deviation_need_a_value_a_channel() -> None:
    with pytest.raises(ConfigError, match=r"dataset\.mean: has 1 values, but the images have 3 channels"):
        synthetic(mean=[0.5])


def test_the_fingerprint_follows_the_images() -> None:
    assert synthetic().fingerprint == synthetic(split_seed=4).fingerprint
    assert synthetic().fingerprint != synthetic(seed=1).fingerprint


# Image files


def test_images_of_one_size_are_kept_in_memory(tmp_path: Path) -> None:
    made = images(tmp_path / "tree")
    assert isinstance(made.train, MemorySource)
    assert made.image_size == 16
    x = torch.cat([x for x, _ in batches(made.test)])
    first = np.array(Image.open(tmp_path / "tree" / "test" / "a" / "000.png"))
    mean, std = torch.tensor(made.mean).view(3, 1, 1), torch.tensor(made.std).view(3, 1, 1)
    expected = torch.from_numpy(first).permute(2, 0, 1).float()
    torch.testing.assert_close((x[0] * std + mean) * 255, expected, rtol=0, atol=0.01)


def test_one_tree_becomes_train_val_and_test(tmp_path: Path) -> None:
    write_images(tmp_path / "tree", ["a", "b"], 20)
    keys = {"root": str(tmp_path / "tree"), "cache": str(tmp_path / "cache"), "workers": 0}
    made = data("folder", **keys)
    assert (len(made.train), len(made.val), len(made.test)) == (29, 3, 8)
    assert len(made.train) == train_samples("folder", dataset_keys("folder", **keys))
    again = data("folder", **keys)
    assert_equal(batches(made.test), batches(again.test))


def test_a_validation_folder_of_its_own_is_used(tmp_path: Path) -> None:
    write_images(tmp_path / "tree" / "val", ["a", "b"], 3)
    write_images(tmp_path / "tree" / "train", ["a", "b"], 12)
    write_images(tmp_path / "tree" / "test", ["a", "b"], 4)
    made = images(tmp_path / "tree")
    assert (len(made.train), len(made.val), len(made.test)) == (24, 6, 8)
    assert train_samples("folder", dataset_keys("folder", root=str(tmp_path / "tree"))) == 24


def test_images_of_many_sizes_need_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.decode_size: images differ in size: a/000\.png is"):
        images(tmp_path / "tree", size=None)
    made = images(tmp_path / "tree", decode_size=20)
    assert batches(made.train)[0][0].shape == (8, 3, 20, 20)
    with pytest.raises(ConfigError, match=r"dataset\.input_size"):
        images(tmp_path / "tree", memory="never")


def test_images_that_are_not_square_need_a_size(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.decode_size: images are 20 x 16"):
        images(tmp_path / "tree", size=(20, 16))


def test_auto_streams_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.data.load.IN_MEMORY", 1000)
    made = images(tmp_path / "tree", input_size=16)
    assert isinstance(made.train, StreamSource)


@pytest.mark.parametrize("scale", [None, [0.3, 1.0]])
def test_streaming_gives_the_batches_of_memory(tmp_path: Path, scale: list[float] | None) -> None:
    keys: dict[str, Any] = {"size": None, "decode_size": 16, "augment": AUGMENT | {"scale": scale}}
    keys |= {"mean": [0.5] * 3, "std": [0.25] * 3}
    memory, stream = (images(tmp_path / "tree", memory=kind, **keys) for kind in ("always", "never"))
    assert isinstance(stream.train, StreamSource)
    for size in (None, 12):
        assert_equal(batches(memory.train, input_size=size), batches(stream.train, input_size=size))
        assert_equal(batches(memory.val, input_size=size), batches(stream.val, input_size=size))


def test_workers_change_nothing(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"size": None, "memory": "never", "input_size": 16}
    keys |= {"augment": AUGMENT | {"scale": [0.3, 1.0]}}
    none, two = (images(tmp_path / "tree", workers=workers, **keys) for workers in (0, 2))
    assert none.mean == two.mean
    before = torch.get_rng_state()
    for epoch in (0, 1):
        assert_equal(batches(none.train, epoch=epoch), batches(two.train, epoch=epoch))
    assert_equal(batches(none.train, start=1), batches(two.train, start=1))
    abandoned = two.train.batches(seed=0, epoch=5, batch_size=4)
    next(abandoned)
    assert_equal(batches(none.train, epoch=6), batches(two.train, epoch=6))
    assert_equal(batches(none.test, input_size=24), batches(two.test, input_size=24))
    assert torch.equal(before, torch.get_rng_state())


SIGNALLED = """
import os, signal, sys
sys.path[:0] = sys.argv[2:]
from made_data import dataset_config
import torch
from runner.data.load import load
keys = {"root": sys.argv[1], "memory": "never", "input_size": 16, "workers": 2, "cache": None}
data = load(dataset_config("folder", **keys), device=torch.device("cpu"))
signal.signal(signal.SIGTERM, lambda *_: print("signalled"))
abandoned = data.train.batches(seed=0, epoch=0, batch_size=2)
next(abandoned), next(abandoned)  # one of each worker: both have begun
os.killpg(0, signal.SIGTERM)
print("images", sum(len(labels) for _, labels in abandoned))
abandoned = data.train.batches(seed=0, epoch=1, batch_size=2)
next(abandoned)
"""


def test_workers_outlive_a_signal_to_the_group_but_not_their_parent(tmp_path: Path) -> None:
    images(tmp_path / "tree")
    tests = Path(__file__).parent
    command = [sys.executable, "-c", SIGNALLED, str(tmp_path / "tree"), str(tests), str(tests.parent)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, start_new_session=True, check=True)
    assert result.stdout.split("\n")[:2] == ["signalled", "images 18"]


def test_a_dead_worker_is_noticed_although_its_signal_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It dies over a pipe that nobody writes to, with nothing sent: only who looks sees it."""

    def children() -> set[int]:
        return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))

    write_images(tmp_path / "tree" / "test", ["a", "b"], 4, (16, 16))
    write_images(tmp_path / "tree" / "train", ["a", "b"], 4, (16, 16))
    for victim in (tmp_path / "tree" / "train").glob("*/*"):
        victim.unlink()
        os.mkfifo(victim)
    keys = {"memory": "never", "input_size": 16, "workers": 1, "mean": [0.5] * 3, "std": [0.5] * 3}
    found, others = images(tmp_path / "tree", **keys), children()
    handler = signal.getsignal(signal.SIGCHLD)

    def kill_the_first() -> None:
        while not (workers := children() - others):
            time.sleep(0.05)
        time.sleep(1.0)  # it reads by then
        for worker in workers:
            os.kill(worker, signal.SIGKILL)

    threading.Thread(target=kill_the_first, daemon=True).start()
    try:
        monkeypatch.setattr("torch.utils.data._utils.signal_handling._set_SIGCHLD_handler", lambda: None)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with pytest.raises(RuntimeError, match="exited unexpectedly"):
            next(found.train.batches(seed=0, epoch=0, batch_size=2))
    finally:
        signal.signal(signal.SIGCHLD, handler)


def test_streams_are_sharded_as_memory_is(tmp_path: Path) -> None:
    made = images(tmp_path / "tree", memory="never", input_size=16, augment={"crop": 0, "flip": False, "cutout": 0})
    whole = rows(made.train, batches(made.train, batch_size=18))
    shares = [batches(made.train, batch_size=6, rank=rank, world=2) for rank in range(2)]
    assert sorted(row for share in shares for row in rows(made.train, share)) == whole


def test_imagenet_is_tested_on_the_centre_of_whole_images(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_images(tmp_path / split, ["n01440764", "n01443537"], 6, size=(40, 32), suffix=".JPEG")
    made = data("imagenet", root=str(tmp_path), memory="never", input_size=28, workers=0, val_fraction=0.2)
    assert batches(made.train, batch_size=4)[0][0].shape == (4, 3, 28, 28)
    x = batches(made.test, batch_size=4)[0][0][0]
    with Image.open(tmp_path / "val" / "n01440764" / "000.JPEG") as image:  # 28 = 87.5 % of 32: only cut, not resized
        middle = np.asarray(image.convert("RGB"))[2:30, 6:34]
    mean, std = torch.tensor(made.mean).view(3, 1, 1), torch.tensor(made.std).view(3, 1, 1)
    expected = torch.from_numpy(middle.copy()).permute(2, 0, 1).float()
    torch.testing.assert_close((x * std + mean) * 255, expected, rtol=0, atol=0.01)


def half_a_png(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:400])


def half_a_jpeg(path: Path) -> None:
    content = io.BytesIO()
    Image.open(path).convert("RGB").save(content, "JPEG")
    path.write_bytes(content.getvalue()[: len(content.getvalue()) // 2])


def an_empty_file(path: Path) -> None:
    path.write_bytes(b"")


def a_text(path: Path) -> None:
    path.write_text("this is no image")


def many_bits(path: Path) -> None:
    Image.fromarray(np.full((16, 16), 40_000, np.uint16)).save(path)


def decompression_bomb(path: Path, side: int = 30_000) -> None:
    """A black 1-bit PNG: 109 kB that would become 2.7 GB."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">2I5B", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((side // 8 + 1) * side), 9)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def small_decompression_bomb(path: Path) -> None:
    """Of a size that Pillow only warns about."""
    decompression_bomb(path, side=10_000)


DAMAGE = [half_a_png, half_a_jpeg, an_empty_file, a_text, many_bits, decompression_bomb, small_decompression_bomb]


@pytest.mark.parametrize("memory", ["always", "never"])
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bad_image_stops_the_run_and_is_named_or_is_left_out_and_counted(
    tmp_path: Path, damage: Any, memory: str
) -> None:
    root = tmp_path / "tree"
    images(root)
    damage(root / "train" / "a" / "003.png")
    keys = {"memory": memory, "decode_size": 16, "validation": "test", "mean": [0.5] * 3, "std": [0.5] * 3}
    with pytest.raises(BadData, match=r"train/a/003\.png"):
        batches(images(root, **keys).train)
    made = images(root, on_bad="skip", **keys)
    found = batches(made.train)
    assert sum(len(labels) for _, labels in found) == 23
    told = len(made.train.bad) if isinstance(made.train, StreamSource) else made.left_out["train"]
    assert told == 1
    assert_equal(found, batches(images(root, on_bad="skip", **keys).train))


def test_a_stop_while_an_image_is_decoded_is_no_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    def stopped(*_: object) -> None:
        raise Preempted("stopped by SIGTERM")

    monkeypatch.setattr(Image, "open", stopped)
    with pytest.raises(Preempted), decode.opened(Files(tmp_path, "train", ("a.png",), torch.zeros(1)), "a.png"):
        pass


def test_a_set_of_bad_images_only(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    images(root)
    for path in (root / "train").rglob("*.png"):
        an_empty_file(path)
    with pytest.raises(BadData, match="none of the 24 images can be read"):
        images(root, on_bad="skip", decode_size=16)
    made = images(root, on_bad="skip", decode_size=16, memory="never", mean=[0.5] * 3, std=[0.5] * 3)
    with pytest.raises(BadData, match="images of a batch"):
        batches(made.train)


def test_a_link_to_nowhere_is_a_bad_image_and_a_name_may_be_any_bytes(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    images(root)
    os.rename(root / "train/a/000.png", os.fsencode(root / "train/a") + b"/\xff.png")
    with_cache = {"cache": str(tmp_path / "cache"), "mean": [0.5] * 3, "std": [0.5] * 3}
    assert images(root, **with_cache).left_out == {"train": 0, "test": 0}
    (root / "train/a/zzz.png").symlink_to("/nowhere.png")
    with pytest.raises(BadData, match=r"zzz\.png"):
        images(root, **with_cache)
    assert images(root, on_bad="skip", **with_cache).left_out == {"train": 1, "test": 0}
    streamed = images(root, on_bad="skip", memory="never", decode_size=16, validation="test", **with_cache)
    assert [len(labels) for _, labels in batches(streamed.train, batch_size=25)] == [24]


def test_one_image_that_is_left_of_a_streamed_batch_stops_the_run(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    images(root)
    a_text(root / "train" / "a" / "003.png")
    keys = {"memory": "never", "decode_size": 16, "validation": "test", "mean": [0.5] * 3, "std": [0.5] * 3}
    with pytest.raises(BadData, match="of the 2 images of a batch 1 could not be read"):
        batches(images(root, on_bad="skip", **keys).train, batch_size=2)


# The cache of decoded images


class CountingDecoder:
    """How often images were really decoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, real = 0, decode.to_array

        def counted(*arguments: Any) -> Any:
            self.calls += 1
            return real(*arguments)

        monkeypatch.setattr(decode, "to_array", counted)


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> CountingDecoder:
    return CountingDecoder(monkeypatch)


def cached(tmp_path: Path, **overrides: Any) -> Data:
    return images(tmp_path / "tree", cache=str(tmp_path / "cache"), **overrides)


def stored(tmp_path: Path, suffix: str) -> Path:
    return next((tmp_path / "cache").glob(f"train*.{suffix}"))


def test_images_are_decoded_once(tmp_path: Path, decoder: CountingDecoder) -> None:
    first = cached(tmp_path)
    assert decoder.calls == 32
    second = cached(tmp_path)
    assert decoder.calls == 32
    assert_equal(batches(first.train), batches(second.train))
    assert first.fingerprint == second.fingerprint == images(tmp_path / "tree").fingerprint
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".json", ".json", ".npy", ".npy"]


def flip_a_bit(tmp_path: Path) -> None:
    path = stored(tmp_path, "npy")
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def cut_the_array(tmp_path: Path) -> None:
    path = stored(tmp_path, "npy")
    path.write_bytes(path.read_bytes()[:-7])


def empty_the_array(tmp_path: Path) -> None:
    stored(tmp_path, "npy").write_bytes(b"")


def remove_the_array(tmp_path: Path) -> None:
    stored(tmp_path, "npy").unlink()


def cut_the_json(tmp_path: Path) -> None:
    stored(tmp_path, "json").write_text("{")


def another_json(tmp_path: Path) -> None:
    stored(tmp_path, "json").write_text(json.dumps([1]))


def change_an_image(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "tree" / "train" / "a" / "000.png")


CACHE_DAMAGE = [
    flip_a_bit,
    cut_the_array,
    empty_the_array,
    remove_the_array,
    cut_the_json,
    another_json,
    change_an_image,
]


@pytest.mark.parametrize("damage", CACHE_DAMAGE)
def test_a_damaged_or_stale_cache_is_made_again(
    tmp_path: Path, decoder: CountingDecoder, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    cached(tmp_path)
    damage(tmp_path)
    with caplog.at_level(logging.INFO, "runner.data.decode"):
        made = cached(tmp_path)
    assert decoder.calls == 32 + 24, "the training images once more"
    assert "again" in caplog.text
    assert_equal(batches(made.train), batches(images(tmp_path / "tree").train))
    decoder.calls = 0
    cached(tmp_path)
    assert decoder.calls == 0


def test_sizes_have_caches_of_their_own(tmp_path: Path, decoder: CountingDecoder) -> None:
    cached(tmp_path)
    assert cached(tmp_path, decode_size=8).image_size == 8
    decoder.calls = 0
    assert cached(tmp_path).image_size == 16
    assert decoder.calls == 0


def test_a_cache_made_with_skip_does_not_hide_a_bad_image(tmp_path: Path, decoder: CountingDecoder) -> None:
    images(tmp_path / "tree")
    a_text(tmp_path / "tree" / "train" / "a" / "003.png")
    first = cached(tmp_path, on_bad="skip")
    decoder.calls = 0
    second = cached(tmp_path, on_bad="skip")
    assert decoder.calls == 0
    assert first.left_out == second.left_out == {"train": 1, "test": 0}
    assert_equal(batches(first.train), batches(second.train))
    with pytest.raises(BadData, match=r"003\.png"):
        cached(tmp_path)


def test_a_run_goes_on_where_no_cache_can_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert len(cached(tmp_path).train) == 18
    assert "could not be stored" in caplog.text


def test_a_failed_write_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    assert len(cached(tmp_path).train) == 18
    assert list((tmp_path / "cache").iterdir()) == []
