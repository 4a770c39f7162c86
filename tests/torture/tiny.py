"""A network that trains in milliseconds and still has everything a checkpoint may forget: batch norm, dropout, a classifier."""

from typing import Annotated

from annotated_types import Ge
from torch import nn

from models.base import register


@register("torture_tiny")
def torture_tiny(
    *, in_channels: int, num_classes: int, image_size: int, width: Annotated[int, Ge(1)] = 4, dropout: float = 0.2
) -> nn.Module:
    """Two convolutions and two linear layers, of a few hundred weights."""
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(4 * width, 2 * width),
        nn.ReLU(),
        nn.Linear(2 * width, num_classes),
    )
