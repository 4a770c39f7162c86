"""What does not go together is refused before any image is read; the shape told beforehand is the one that is read."""

from pathlib import Path

import pytest
import torch
from made_data import dataset_config, write_images, write_mnist

from runner.compose import config_from
from runner.data.load import load
from runner.data.locations import shape
from runner.faults import ConfigError
from runner.job import train
from runner.schema import DatasetConfig

SMALL = "model=lenet5 model.hidden=8 dataset=synthetic dataset.size=16 dataset.samples=40 batch_size=8".split()
QUIET = ["trainer.progress=none", "trainer.dashboard=none", "trainer.threads=1"]
MISFITS = {
    "classifier": ["classifier=fixed"],
    "regularizer": ["quant=dorefa", "regularizer=rounding_margin"],
    "regime": ["regime=model"],
    "batch_size: 1: .* one value has no variance": ["quant=xnor", "batch_size=1"],
    "input_size: 4: the network cannot take images of 4 x 4": [
        "data_regime.phases=[{epoch:0,input_size:4,batch_size:8}]"
    ],
}


@pytest.mark.parametrize("message", MISFITS)
def test_what_does_not_go_together_is_refused_before_data_is_read(
    message: str, tmp_path: Path, own_signals: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.run.load", lambda *_, **__: pytest.fail("data was read"))
    with pytest.raises(ConfigError, match=message):
        train(config_from([*SMALL, *QUIET, *MISFITS[message], f"outputs={tmp_path}"]))


def test_asking_first_changes_no_random_number(tmp_path: Path) -> None:
    from runner.preflight import refuse_misfits

    torch.manual_seed(7)
    refuse_misfits(config_from([*SMALL, f"outputs={tmp_path}"]))
    asked = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(asked, torch.rand(3))


def told(config: DatasetConfig) -> tuple[int, int, int] | None:
    return shape(config.name, config.model_dump() | config.arguments)


def test_the_shape_that_is_told_beforehand_is_the_shape_that_is_read(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    for split in ("train", "test"):
        write_images(tmp_path / "images" / split, ["cat", "dog"], 4, size=(24, 24))
    configs = [
        dataset_config("mnist", root=str(tmp_path)),
        dataset_config("mnist", root=str(tmp_path), input_size=20),
        dataset_config("digits"),
        dataset_config("synthetic", samples=20, test_samples=5, classes=3, channels=2, size=9),
        dataset_config("folder", root=str(tmp_path / "images"), decode_size=12, cache=None),
        dataset_config("folder", root=str(tmp_path / "images"), input_size=10, cache=None),
    ]
    for config in configs:
        data = load(config, device=torch.device("cpu"))
        assert told(config) == (data.in_channels, len(data.classes), data.image_size), config


def test_where_only_reading_tells_nothing_is_told(tmp_path: Path) -> None:
    assert told(dataset_config("folder", root=str(tmp_path), cache=None)) is None
    assert told(dataset_config("folder", root=str(tmp_path / "none"), decode_size=8, cache=None)) is None
