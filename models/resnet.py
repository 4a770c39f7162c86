"""Residual networks: He, Zhang, Ren, Sun, Deep Residual Learning for Image Recognition, arXiv 1512.03385.

Depths 18, 34, 50, 101 are the paper's table 1 (four stages from 64 channels); 20, 32, 44, 56, 110 its section 4.2
(three stages of n blocks, depth 6n + 2, from 16 channels). Variants for binary networks are arguments here, because
a quantizer replaces layers and leaves the order of a block alone: Bi-Real Net (Liu et al., arXiv 1808.00278) and
ReActNet (Liu et al., arXiv 2003.03488).

Names: stem.conv, stage1.0.conv1, stage1.0.bn1, ..., fc; a shortcut with weights is stage2.0.shortcut.conv and
stage2.0.shortcut.bn.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge
from torch import nn

from models.base import pick, register
from models.resnet_blocks import (
    ACTIVATIONS,
    SHORTCUTS,
    BasicBlock,
    BiRealBlock,
    Block,
    Bottleneck,
    MakeActivation,
    MakeShortcut,
    cifar_stem,
    imagenet_stem,
)

LARGEST_IMAGE_FOR_THE_CIFAR_STEM = 64


@dataclass(frozen=True)
class Family:
    """What a depth stands for: blocks per stage, channels of the first stage, its kind of block and of shortcut."""

    blocks: tuple[int, ...]
    channels: int = 64
    bottleneck: bool = False
    shortcut: str = "conv"


FAMILIES = {
    18: Family((2, 2, 2, 2)),
    34: Family((3, 4, 6, 3)),
    50: Family((3, 4, 6, 3), bottleneck=True),
    101: Family((3, 4, 23, 3), bottleneck=True),
    **{6 * n + 2: Family((n, n, n), channels=16, shortcut="pad") for n in (3, 5, 7, 9, 18)},
}


@register("resnet")
def resnet(
    *,
    in_channels: int,
    num_classes: int,
    image_size: int,
    depth: Literal[18, 20, 32, 34, 44, 50, 56, 101, 110] = 20,
    stem: Literal["auto", "cifar", "imagenet"] = "auto",
    block: Literal["basic", "bireal"] = "basic",
    shortcut: Literal["auto", "conv", "pad", "pool"] = "auto",
    activation: Literal["relu", "prelu", "rprelu", "hardtanh"] = "relu",
    width: Annotated[int, Ge(1)] = 1,
    zero_init_residual: bool = False,
) -> nn.Module:
    """A residual network for images of any size.

    Shapes of depth 20 at 3x32x32: stem and stage1 16x32x32, stage2 32x16x16, stage3 64x8x8, pool 64x1x1, fc 10.
    Parameters at 10 classes, 3x32x32: 269,722 (20), 464,154 (32), 658,586 (44), 853,018 (56), 1,727,962 (110),
    11,173,962 (18), 21,282,122 (34), 23,520,842 (50), 42,512,970 (101). At 1000 classes, 3x224x224, as torchvision:
    11,689,512 (18), 25,557,032 (50).

    Args:
        depth: number of layers with weights; 50 and 101 have bottleneck blocks, with the stride on their 3x3
            convolution.
        stem: `cifar` is a 3x3 convolution; `imagenet` a 7x7 one of stride 2 and a max-pool; `auto` is `cifar` up to
            64 pixels.
        block: `basic` has one shortcut around two convolutions; `bireal` one around each, for binary networks,
            whose signs the float sum then passes by (arXiv 1808.00278, fig. 3; the paper has no activation besides
            the sign). Both have the same layers, so weights of one fit the other. Depths 50 and 101 have no bireal
            form.
        shortcut: where the shape changes: `conv` is a strided 1x1 convolution with normalisation (option B), `pad`
            takes every second pixel and adds channels of zeros (option A, no weights), `pool` averages before a 1x1
            convolution with normalisation (Bi-Real Net, ReActNet). `auto` is `pad` for 20, 32, 44, 56, 110 and
            `conv` otherwise, as printed by He et al.
        activation: behind the stem and in the blocks; `prelu` learns a slope per channel, `rprelu` also moves its corner
            (both ReActNet), `hardtanh` is IR-Net's choice.
        width: factor on the channels of every stage (Zagoruyko, Komodakis, arXiv 1605.07146).
        zero_init_residual: start every block as its shortcut (Goyal et al., arXiv 1706.02677). Not for 8-bit
            gradients: a scale of zero gives gradients of zero, and so ranges of zero, in the first step.

    >>> net = resnet(in_channels=3, num_classes=10, image_size=32, depth=20)
    >>> sum(p.numel() for p in net.parameters())
    269722
    """
    family = pick("depth", depth, FAMILIES)
    auto_stem = cifar_stem if image_size <= LARGEST_IMAGE_FOR_THE_CIFAR_STEM else imagenet_stem
    make_stem = pick("stem", stem, {"auto": auto_stem, "cifar": cifar_stem, "imagenet": imagenet_stem})
    make_shortcut = pick("shortcut", shortcut, {"auto": SHORTCUTS[family.shortcut], **SHORTCUTS})
    make_activation = pick("activation", activation, ACTIVATIONS)
    kind = pick_block(depth, block)

    channels = family.channels * width
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=make_stem(in_channels, channels, make_activation))
    width_in = channels
    for number, blocks in enumerate(family.blocks):
        stride = 1 if number == 0 else 2
        layers[f"stage{number + 1}"] = make_stage(
            kind, blocks, width_in, channels * 2**number, stride, make_activation, make_shortcut
        )
        width_in = channels * 2**number * kind.expansion
    layers.update(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(width_in, num_classes))
    net = nn.Sequential(layers)
    initialise_(net, zero_init_residual)
    return net


@register("resnet18")
def resnet18(
    *,
    in_channels: int,
    num_classes: int,
    image_size: int,
    stem: Literal["auto", "cifar", "imagenet"] = "auto",
    block: Literal["basic", "bireal"] = "basic",
    shortcut: Literal["auto", "conv", "pad", "pool"] = "auto",
    activation: Literal["relu", "prelu", "rprelu", "hardtanh"] = "relu",
    width: Annotated[int, Ge(1)] = 1,
    zero_init_residual: bool = False,
) -> nn.Module:
    """`resnet` of depth 18; see there for the arguments.

    Shapes at 3x32x32: stem and stage1 64x32x32, stage2 128x16x16, stage3 256x8x8, stage4 512x4x4, pool 512x1x1, fc
    10. 11,173,962 parameters at 10 classes.

    >>> net = resnet18(in_channels=3, num_classes=10, image_size=32)
    >>> sum(p.numel() for p in net.parameters())
    11173962
    """
    return resnet(
        in_channels=in_channels,
        num_classes=num_classes,
        image_size=image_size,
        depth=18,
        stem=stem,
        block=block,
        shortcut=shortcut,
        activation=activation,
        width=width,
        zero_init_residual=zero_init_residual,
    )


def pick_block(depth: int, block: str) -> type[BasicBlock] | type[Bottleneck]:
    """The class of the blocks; a bottleneck has no bireal form."""
    kind = pick("block", block, {"basic": BasicBlock, "bireal": BiRealBlock})
    if not FAMILIES[depth].bottleneck:
        return kind
    if kind is BiRealBlock:
        accepted = sorted(other for other, family in FAMILIES.items() if not family.bottleneck)
        raise ValueError(
            f"block='bireal' has no form for the bottlenecks of depth={depth}; accepted depths: {accepted}"
        )
    return Bottleneck


def make_stage(
    kind: type[BasicBlock] | type[Bottleneck],
    blocks: int,
    in_channels: int,
    channels: int,
    stride: int,
    make_activation: MakeActivation,
    make_shortcut: MakeShortcut,
) -> nn.Sequential:
    """`blocks` blocks; the first one has the stride and the change of channels."""
    first = kind(in_channels, channels, stride, make_activation, make_shortcut)
    width = channels * kind.expansion
    others = [kind(width, channels, 1, make_activation, make_shortcut) for _ in range(blocks - 1)]
    return nn.Sequential(first, *others)


def initialise_(net: nn.Module, zero_init_residual: bool) -> None:
    """He's initialisation by fan-out (arXiv 1502.01852, eq. 14); optionally branches that start at zero."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, Block) and zero_init_residual:
            for name, normalisation in module.named_children():
                if name in module.branch_ends and isinstance(normalisation, nn.BatchNorm2d):
                    nn.init.zeros_(normalisation.weight)
