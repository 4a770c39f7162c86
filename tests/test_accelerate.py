"""What `trainer.compile` refuses."""

from pathlib import Path

import pytest
import torch

from runner.accelerate import accelerate, cpp_compiler
from runner.build import build
from runner.compose import config_from
from runner.faults import ConfigError

CPU = torch.device("cpu")


def test_compiling_without_a_compiler_is_a_fault_of_the_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = config_from(["model=lenet5", "dataset=synthetic", "trainer.compile=true"])
    model = build(config, in_channels=3, num_classes=10, image_size=32).model
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert cpp_compiler() is None
    with pytest.raises(ConfigError, match=r"trainer.compile: true, but there is no C\+\+ compiler"):
        accelerate(model, config.trainer, CPU)
