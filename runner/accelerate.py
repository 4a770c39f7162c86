"""Everything that makes a model run faster without changing what it computes, in one function."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from runner.schema import TrainerConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def accelerate(model: nn.Module, config: TrainerConfig, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The forward pass as `trainer.amp`, `trainer.compile` and `trainer.channels_last` ask; the model itself stays what it is."""
    forward: Callable[[Tensor], Tensor] = torch.compile(model) if config.compile else model
    layout = torch.channels_last if config.channels_last else torch.preserve_format
    if config.channels_last:
        model.to(memory_format=torch.channels_last)

    def run(images: Tensor) -> Tensor:
        with _autocast(config, device):
            return forward(images.contiguous(memory_format=layout) if config.channels_last else images).float()

    return run


def _autocast(config: TrainerConfig, device: torch.device) -> AbstractContextManager[Any]:
    if config.amp == "none":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[config.amp])
