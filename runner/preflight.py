"""Does everything in a config go together? Asked before the data is read, wherever the shape of the images is known by then."""

import torch

from runner.build import build, phases_of, regularizer_of, watch
from runner.dataset_files import shape
from runner.schema import RunConfig


def refuse_misfits(config: RunConfig) -> None:
    """Build the network once, for nothing but what it refuses. Raises ConfigError."""
    known = shape(config.dataset.name, config.dataset.model_dump() | config.dataset.arguments)
    if known is None:
        return
    channels, classes, side = known
    with torch.random.fork_rng(devices=[]):
        model = build(config, in_channels=channels, num_classes=classes, image_size=side).model
        phases_of(config, model)
        watch(regularizer_of(config), model).remove()
