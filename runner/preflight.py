"""Does everything in a config go together? Asked before the data is read, wherever the shape of the images is known by then."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from runner.build import build, phases_of, regularizer_of, watch
from runner.data.locations import shape
from runner.faults import ConfigError, Fault
from runner.regime import data_setting_at
from runner.schema import DataPhase, RunConfig


def refuse_misfits(config: RunConfig) -> None:
    """Build the network once, for nothing but what it refuses. Raises ConfigError."""
    known = shape(config.dataset.name, config.dataset.model_dump() | config.dataset.arguments)
    if known is None:
        return
    channels, classes, side = known
    with torch.random.fork_rng(devices=[]):
        model = build(config, in_channels=channels, num_classes=classes, image_size=side).model
        _, data_phases = phases_of(config, model)
        watch(regularizer_of(config), model).remove()
        refuse_unfit_images(model, data_phases, channels, side)


def refuse_unfit_images(
    model: nn.Module, phases: Sequence[DataPhase], channels: int, side: int, *, trains: bool = True
) -> None:
    """Send one image of every size of the schedule through the network. Raises ConfigError where one does not fit.

    Nor does a batch of one image fit a network that `trains` and normalises vectors: one value has no variance.
    """
    sizes: dict[int, bool] = {}  # whether a batch of one is wanted
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for setting in (data_setting_at(phases, phase.epoch) for phase in phases):
        size = setting["input_size"] or side
        sizes[size] = sizes.get(size, False) or setting["batch_size"] == 1
    for size, alone in sizes.items():
        with _norms_of_one_value(model) as norms:
            try:
                _see(model, torch.zeros(1, channels, size, size, device=device))
            except (RuntimeError, ValueError) as error:
                message = f"{size}: the network cannot take images of {size} x {size} ({error}); choose another size"
                raise ConfigError([Fault("input_size" if trains else "distill", message)]) from error
        if trains and alone and norms:
            message = f"1: {norms[0]} normalises over the batch, and one value has no variance; accepted: 2 or more"
            raise ConfigError([Fault("batch_size", message)])


@torch.no_grad()
def _see(model: nn.Module, images: Tensor) -> None:
    transform, training = getattr(model, "input_transform", None), model.training
    model.eval()
    try:
        model(transform(images) if transform else images)
    finally:
        model.train(training)


@contextmanager
def _norms_of_one_value(model: nn.Module) -> Iterator[list[str]]:
    """The names of those batch norms that see one value a channel, meanwhile."""
    found: list[str] = []
    names: dict[nn.Module, str] = {
        module: name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].numel() == inputs[0].shape[1]:
            found.append(names[module])

    hooks = [module.register_forward_pre_hook(look) for module in names]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
