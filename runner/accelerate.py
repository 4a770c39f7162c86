"""Everything that makes a model run faster without changing what it computes, in one function."""

import os
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from runner.faults import ConfigError, Fault, shortened
from runner.schema import TrainerConfig

Transform = Callable[[Tensor], Tensor]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def accelerate(
    model: nn.Module, config: TrainerConfig, device: torch.device, transform: Transform | None = None
) -> Transform:
    """The forward pass as `trainer.amp`, `trainer.compile` and `trainer.channels_last` ask; the model itself stays what it is.

    `transform` (the model's own `input_transform`) sees the images first. Raises ConfigError where `trainer.compile` is
    impossible on this machine.
    """
    forward: Transform = _compiled(model, device) if config.compile else model
    layout = torch.channels_last if config.channels_last else torch.preserve_format
    if config.channels_last:
        model.to(memory_format=torch.channels_last)

    def run(images: Tensor) -> Tensor:
        images = transform(images) if transform else images
        with _autocast(config, device):
            return forward(images.contiguous(memory_format=layout) if config.channels_last else images).float()

    return run


def _compiled(model: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    """One graph, compiled at its first call; on a GPU replayed as CUDA graphs: launching small kernels is what takes time."""
    on_gpu = device.type == "cuda"
    if not on_gpu and not cpp_compiler():
        raise _impossible("there is no C++ compiler; install g++, or set CXX to one")
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(True, warn_only=True)  # tells the compiler, too: no choice by stopwatch
    compiled: Callable[[Tensor], Tensor] = torch.compile(model, mode="reduce-overhead" if on_gpu else "default")

    def call(images: Tensor) -> Tensor:
        if on_gpu:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # the results of the call before are no longer needed
        try:
            return compiled(images)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            cause = error.inner_exception
            raise _impossible(f"the compiler failed: {type(cause).__name__}: {shortened(str(cause))}") from error

    return call


def cpp_compiler() -> str | None:
    """The compiler that torch would use on a CPU, or None."""
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))


def _impossible(reason: str) -> ConfigError:
    return ConfigError([Fault("trainer.compile", f"true, but {reason}; accepted here: false")])


def _autocast(config: TrainerConfig, device: torch.device) -> AbstractContextManager[Any]:
    if config.amp == "none":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[config.amp])
