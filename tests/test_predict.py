"""`predict` says of an image what evaluation says of it, and refuses what is no image."""

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_inference import resealed, set_in

from quant.inference import PackedModel
from runner.cli import run
from runner.compose import config_from
from runner.data.load import load
from runner.data.sources import MemorySource
from runner.job import train

SMALL = [
    "trainer.progress=none",
    "trainer.dashboard=none",
    "trainer.threads=1",
    "epochs=2",
    "model=lenet5",
    "quant=xnor",
]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    import signal

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    folder = tmp_path_factory.mktemp("outputs")
    words = [*SMALL, f"outputs={folder}"]
    found = train(config_from(words))
    assert run(["export", f"checkpoint={found}", "format=packed", f"out={folder / 'net.packed.safetensors'}"]) == 0
    yield folder / "net.packed.safetensors"
    for number, handler in before.items():
        signal.signal(number, handler)


def test_an_image_of_the_data_set_gets_the_answer_of_evaluation(
    network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = load(config_from(SMALL).dataset, device=torch.device("cpu"))
    assert isinstance(data.val, MemorySource)
    model = PackedModel.load(network)
    images, _ = next(data.val.batches(seed=0, epoch=0, batch_size=6, input_size=28))
    chances = torch.softmax(model(images), 1)
    for k, sample in enumerate(data.val.index[:6].tolist()):
        Image.fromarray(data.val.content.pixels[sample, 0].numpy()).save(tmp_path / f"{k}.png")
    assert run(["predict", str(network), *[str(tmp_path / f"{k}.png") for k in range(6)]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    for k, line in enumerate(lines):
        name, _, said = line.partition(": ")
        assert name == str(tmp_path / f"{k}.png")
        first, share, _ = said.split(" ", 2)
        assert int(first) == int(chances[k].argmax())
        assert float(share) == pytest.approx(100 * float(chances[k].max()), abs=0.2)
        assert said.count("%") == 5


def test_colour_and_size_are_brought_to_what_the_network_takes(
    network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grey = np.tile(np.arange(0, 240, 30, dtype=np.uint8), (8, 1))
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(np.stack([grey] * 3, 2)).save(tmp_path / "colour.png")
    assert run(["predict", str(network), str(tmp_path / "grey.png"), str(tmp_path / "colour.png")]) == 0
    first, second = (line.partition(": ")[2] for line in capsys.readouterr().out.splitlines())
    assert first == second


def test_a_folder_stands_for_the_images_in_it(
    network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("b.png", "a.PNG", "inner/c.png", ".hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (9, 9)).save(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    assert run(["predict", str(network), str(tmp_path), str(tmp_path / "b.png")]) == 0
    names = [line.partition(": ")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [str(tmp_path / name) for name in ("a.PNG", "b.png", "b.png")]


def test_folders_that_hold_nothing_for_it_are_called_folders(
    network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["predict", str(network), str(tmp_path)]) == 66
    assert f"{tmp_path}: a folder without images (.jpg" in capsys.readouterr().err
    assert run(["predict", str(tmp_path), str(network)]) == 66
    error = capsys.readouterr().err
    assert f"{tmp_path}: is a folder, not a packed network; export checkpoint={tmp_path} format=packed" in error


def test_names_that_forge_lines_are_escaped(network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of classes, which come with the file, and of images, which come from anywhere."""
    classes = [f"café {k}\nb.png: cat\x1b[2J\ud800\u202e\r" for k in range(10)]
    (tmp_path / "net").write_bytes(resealed(network.read_bytes(), set_in("graph/classes", classes)))
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a\n.png")
    assert run(["predict", str(tmp_path / "net"), str(tmp_path / "a\n.png")]) == 0
    (line,) = capsys.readouterr().out.split("\n")[:-1]
    assert line.startswith(f"{tmp_path}/a\\n.png: café ")
    assert line.count("\\nb.png: cat\\x1b[2J\\ud800\\u202e\\r ") == 5
    assert line.isprintable()


def bomb(side: int) -> bytes:
    """A PNG that claims a large square of one bit a pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_what_is_no_image_is_refused(network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    contents = {"text.png": b"hello", "half.png": whole[: len(whole) // 2], "empty.png": b"", "bomb.png": bomb(30_000)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert run(["predict", str(network), str(tmp_path / name)]) == 65, name
        error = capsys.readouterr().err
        assert str(tmp_path / name) in error
        assert "Traceback" not in error


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], 78, "predict FILE IMAGE"),
        (["{net}"], 78, "predict FILE IMAGE"),
        (["{net}", "model=lenet5"], 78, "predict FILE IMAGE"),
        (["{net}", "/nowhere.png"], 66, "no such file: /nowhere.png"),
        (["/nowhere", "{net}"], 66, "no such file: /nowhere"),
        (["{this}", "{this}"], 65, "not a packed network"),
    ],
)
def test_bad_words(words: list[str], code: int, says: str, network: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["predict", *[word.format(net=network, this=__file__) for word in words]]) == code
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error


def test_streamed_images_are_seen_as_in_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With random resized crops, networks are tested on the centre of an image: so they are when packed."""
    draw = np.random.default_rng(0)
    for part in ("train", "test"):
        for label in "ab":
            (tmp_path / "photos" / part / label).mkdir(parents=True)
            for k in range(12):
                pixels = draw.integers(0, 255, (40, 52, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "photos" / part / label / f"{k:02}.png")
    streamed = ["dataset.memory=never", "dataset.input_size=28", "dataset.augment.scale=[0.5,1]", "dataset.workers=0"]
    words = [*SMALL, "dataset=folder", f"dataset.root={tmp_path / 'photos'}", *streamed, f"outputs={tmp_path}"]
    config = config_from([*words, "batch_size=8"])
    found, packed = train(config), tmp_path / "net.packed.safetensors"
    assert run(["export", f"checkpoint={found}", "format=packed", f"out={packed}"]) == 0
    losses = []
    for stored in (found, packed):
        assert run(["evaluate", f"checkpoint={stored}", "batch_size=8"]) == 0
        saved = Path(capsys.readouterr().out.rpartition("saved: ")[2].strip())
        losses.append(json.loads(saved.read_bytes())["test_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)

    images, _ = next(load(config.dataset, device=torch.device("cpu")).test.batches(seed=0, epoch=0, batch_size=1))
    chances = torch.softmax(PackedModel.load(packed)(images)[0], 0)
    assert run(["predict", str(packed), str(tmp_path / "photos/test/a/00.png")]) == 0
    said = capsys.readouterr().out
    assert float(said.split()[2]) == pytest.approx(100 * float(chances.max()), abs=0.1)
