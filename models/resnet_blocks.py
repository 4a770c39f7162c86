"""The parts of a residual network: activations, stems, shortcuts, blocks.

Every block has the layers conv1, bn1, act1, conv2, bn2, act2 (Bottleneck: also conv3, bn3, act3) and `shortcut`. A
shortcut that has weights holds them in shortcut.conv and shortcut.bn. All tensors are images, of shape (N, C, H, W).
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn

MakeActivation = Callable[[int], nn.Module]  # from the number of channels
MakeShortcut = Callable[[int, int, int], nn.Module]  # from channels in, channels out, stride


class Shift(nn.Module):
    """x + b, one b a channel, 0 at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.bias.view(-1, 1, 1)


def rprelu(channels: int) -> nn.Sequential:
    """PReLU(x - g) + z: a PReLU whose corner each channel may move anywhere (ReActNet, arXiv 2003.03488, eq. 4); -g is `before`.

    >>> act = rprelu(2)
    >>> _ = nn.init.constant_(act.before.bias, -1.0), nn.init.constant_(act.after.bias, 0.5)
    >>> act(torch.tensor([-1.0, 3.0]).expand(1, 2, 1, 2)).tolist()              # 0.25 (-1 - 1) + 0.5 and 3 - 1 + 0.5
    [[[[0.0, 2.5]], [[0.0, 2.5]]]]
    """
    return nn.Sequential(OrderedDict(before=Shift(channels), prelu=nn.PReLU(channels), after=Shift(channels)))


ACTIVATIONS: dict[str, MakeActivation] = {
    "relu": lambda channels: nn.ReLU(),
    "prelu": nn.PReLU,
    "rprelu": rprelu,
    "hardtanh": lambda channels: nn.Hardtanh(),
}


def cifar_stem(in_channels: int, channels: int, make_activation: MakeActivation) -> nn.Sequential:
    """A 3x3 convolution that keeps the image size."""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
            bn=nn.BatchNorm2d(channels),
            act=make_activation(channels),
        )
    )


def imagenet_stem(in_channels: int, channels: int, make_activation: MakeActivation) -> nn.Sequential:
    """A 7x7 convolution and a max-pool, both of stride 2: a quarter of the image size."""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(in_channels, channels, 7, stride=2, padding=3, bias=False),
            bn=nn.BatchNorm2d(channels),
            act=make_activation(channels),
            pool=nn.MaxPool2d(3, stride=2, padding=1),
        )
    )


class PadShortcut(nn.Module):
    """Option A of He et al.: every `stride`-th pixel, and channels of zeros behind those of the input; no weights."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.extra_channels = out_channels - in_channels
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return nn.functional.pad(x, (0, 0, 0, 0, 0, self.extra_channels))

    def extra_repr(self) -> str:
        return f"extra_channels={self.extra_channels}, stride={self.stride}"


def conv_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Option B of He et al.: a 1x1 convolution with the stride, and normalisation."""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
            bn=nn.BatchNorm2d(out_channels),
        )
    )


def pool_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The mean of stride x stride pixels, then a 1x1 convolution and normalisation (Bi-Real Net, ReActNet)."""
    shortcut = nn.Sequential()
    if stride > 1:  # ceil_mode: an odd side is halved upwards, as by the strided convolution beside it
        shortcut.add_module("pool", nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False))
    shortcut.add_module("conv", nn.Conv2d(in_channels, out_channels, 1, bias=False))
    shortcut.add_module("bn", nn.BatchNorm2d(out_channels))
    return shortcut


SHORTCUTS: dict[str, MakeShortcut] = {"conv": conv_shortcut, "pad": PadShortcut, "pool": pool_shortcut}


class Block(nn.Module):
    """What all blocks have in common: the shortcut, and which normalisations end a branch that is added to one."""

    expansion = 1  # channels out / channels of the 3x3 convolutions
    branch_ends: tuple[str, ...] = ("bn2",)

    def __init__(self, in_channels: int, channels: int, stride: int, make_shortcut: MakeShortcut) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        changes_shape = stride != 1 or in_channels != out_channels
        self.shortcut = make_shortcut(in_channels, out_channels, stride) if changes_shape else nn.Identity()


class BasicBlock(Block):
    """act2(bn2(conv2(act1(bn1(conv1(x))))) + shortcut(x))"""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        make_activation: MakeActivation,
        make_shortcut: MakeShortcut,
    ) -> None:
        super().__init__(in_channels, channels, stride, make_shortcut)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = make_activation(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = make_activation(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y)) + self.shortcut(x)
        out: torch.Tensor = self.act2(y)
        return out


class BiRealBlock(BasicBlock):
    """y = act1(bn1(conv1(x)) + shortcut(x)); act2(bn2(conv2(y)) + y): the layers of BasicBlock, a shortcut per convolution."""

    branch_ends = ("bn1", "bn2")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act1(self.bn1(self.conv1(x)) + self.shortcut(x))
        out: torch.Tensor = self.act2(self.bn2(self.conv2(y)) + y)
        return out


class Bottleneck(Block):
    """1x1 to `channels`, 3x3 with the stride, 1x1 to 4 `channels`, each normalised; then as in BasicBlock."""

    expansion = 4
    branch_ends = ("bn3",)

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        make_activation: MakeActivation,
        make_shortcut: MakeShortcut,
    ) -> None:
        super().__init__(in_channels, channels, stride, make_shortcut)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = make_activation(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = make_activation(channels)
        self.conv3 = nn.Conv2d(channels, channels * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)
        self.act3 = make_activation(channels * self.expansion)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.act2(self.bn2(self.conv2(y)))
        out: torch.Tensor = self.act3(self.bn3(self.conv3(y)) + self.shortcut(x))
        return out
