"""Networks that have trained for a moment, for tests of what becomes of trained ones."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from models.base import build
from quant.base import find
from quant.surgery import Rule, calibrate_, quantize_

KEPT = [
    Rule(match=["first", "last"], keep=True),
    Rule(match=["*shortcut*", "*downsample*"], keep=True, optional=True),
]


def after_two_steps(
    model: str, quant: str, size: int, channels: int = 3, *, seed: int = 0, arguments: dict[str, Any] | None = None,
    **settings: Any,
) -> nn.Module:  # fmt: skip
    """`arguments` are those of the model, `settings` those of the quantizer; still in training mode."""
    torch.manual_seed(seed)
    net = build(model, in_channels=channels, num_classes=10, image_size=size, **(arguments or {}))
    quantize_(net, find(quant)(**settings), KEPT if quant in ("xnor", "ternary", "dorefa") else [])
    calibrate_(net, torch.randn(16, channels, size, size))
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(net(torch.randn(8, channels, size, size)), torch.randint(10, (8,))).backward()
        optimizer.step()
    return net


def dilated(quant: str, padding: int, groups: int = 1, **settings: Any) -> nn.Module:
    """A convolution whose window has gaps, in eval mode; 4 channels in."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 10, 3, stride=2, padding=padding, dilation=(2, 3), groups=groups)
    net = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    quantize_(net, find(quant)(**settings), [])
    calibrate_(net, torch.randn(8, 4, 12, 12))
    return net.eval()


class Woven(nn.Module):
    """The same value at two places of one concatenation, and twice in a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.a(x), self.b(x)
        y = torch.cat([a, b, a], 1)
        return self.fc((y + y).mean((2, 3)))  # type: ignore[no-any-return]
