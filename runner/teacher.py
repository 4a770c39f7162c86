"""The trained network that a run learns from besides its labels (`distill=PATH`). It never changes."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from runner.build import build
from runner.config import check, flat
from runner.faults import BadData, ConfigError, Fault
from runner.preflight import refuse_unfit_images
from runner.schema import DataPhase, RunConfig
from runner.weights import load_exactly, read_weights

ITS_OWN = (
    "model",
    "quant",
    "classifier",
    "regularizer",  # which a phase of the regime may drive
    "regime",
)  # what a stored config says of the network, and how that was driven


def teacher_of(
    config: RunConfig, phases: Sequence[DataPhase], *, in_channels: int, num_classes: int, image_size: int
) -> nn.Module | None:
    """The network stored at `config.distill`, in eval mode; None without one.

    Raises MissingInput, BadData where the file is damaged, does not say what network it is, or answers to other classes, and
    ConfigError where the network cannot take images of the sizes of `phases`.
    """
    if config.distill is None:
        return None
    weights = read_weights(Path(config.distill))
    if not weights.config:
        what = "a teacher has to say what network it is: give a run folder, or a file that a run wrote"
        raise BadData(f"distill: {config.distill}: {what}")
    if unsaid := sorted(set(weights.config.get("plugins") or ()) - set(config.plugins)):
        why = f"the stored model needs {unsaid}; a plugin is code, so say plugins= to have it run"
        raise ConfigError([Fault("distill", f"{config.distill}: {why}")])
    plain = {"pretrained": None, "distill": None}
    trainer = flat(config)["trainer"] | {"backward": "exact", "recompute": "none"}
    stored = {key: weights.config[key] for key in ITS_OWN}
    its_config = check(flat(config) | plain | {"trainer": trainer} | stored)
    teacher = build(its_config, in_channels=in_channels, num_classes=num_classes, image_size=image_size).model
    load_exactly(teacher, weights)
    refuse_unfit_images(teacher, phases, in_channels, image_size, trains=False)
    return teacher.eval().requires_grad_(False)
