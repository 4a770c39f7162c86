"""A network that trains in milliseconds and still has everything a checkpoint may forget: batch norm, dropout, a classifier."""

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from models.base import register


class Poison(nn.Module):
    """NaN for those training batches whose first value lies in the lowest `share` of a normal distribution."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.limit = float(torch.special.ndtri(torch.tensor(share)))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.where(x.flatten()[0] < self.limit, torch.nan, 0.0) if self.training else x


@register("torture_tiny")
def torture_tiny(
    *,
    in_channels: int,
    num_classes: int,
    image_size: int,
    width: Annotated[int, Ge(1)] = 4,
    dropout: float = 0.2,
    poison: float = 0.0,
) -> nn.Module:
    """Two convolutions and two linear layers, of a few hundred weights; `poison`: share of batches that give NaN."""
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1),
        nn.BatchNorm2d(width),
        *([Poison(poison)] if poison else []),
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
