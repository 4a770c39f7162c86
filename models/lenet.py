"""LeNet-5 in the 20-50-500 form that binary networks are measured on.

LeCun, Bottou, Bengio, Haffner, Gradient-based learning applied to document recognition, Proc. IEEE 1998 (the idea);
the widths are those of the Caffe example and of https://github.com/jiecaoyu/XNOR-Net-PyTorch (its
`MNIST/models/LeNet_5.py`).
"""

from collections import OrderedDict
from typing import Annotated

from annotated_types import Ge, Len
from torch import nn

from models.base import register

CONV1_KERNEL = 5


@register("lenet5")
def lenet5(
    *,
    in_channels: int,
    num_classes: int,
    image_size: int,
    channels: Annotated[list[Annotated[int, Ge(1)]], Len(2, 2)] = [20, 50],  # noqa: B006 - read only
    hidden: Annotated[int, Ge(1)] = 500,
    kernel: Annotated[int, Ge(1)] = 5,
) -> nn.Module:
    """Two convolutions and two linear layers.

    Shapes at 1x28x28: conv1 20x24x24, pool1 20x12x12, conv2 50x8x8, pool2 50x4x4, fc1 500, fc2 10. 431,080
    parameters at 10 classes.

    The reference normalises in front of conv2 and fc1 as a part of its binary layers; a binary quantizer adds that
    normalisation itself, so the float network has only the one behind conv1, which has no scale and no shift.

    Args:
        channels: output channels of conv1 and conv2.
        hidden: width of fc1.
        kernel: side of conv2's filter.

    >>> net = lenet5(in_channels=1, num_classes=10, image_size=28)
    >>> sum(p.numel() for p in net.parameters())
    431080
    """
    if len(channels) != 2 or min(channels) < 1:
        raise ValueError(f"channels={channels} must be two positive numbers: those of conv1 and conv2")
    conv1_out, conv2_out = channels
    side = final_side(image_size, kernel)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, conv1_out, CONV1_KERNEL),
            bn1=nn.BatchNorm2d(conv1_out, eps=1e-4, affine=False),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(conv1_out, conv2_out, kernel),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(conv2_out * side * side, hidden),
            relu3=nn.ReLU(),
            fc2=nn.Linear(hidden, num_classes),
        )
    )


def final_side(image_size: int, kernel: int) -> int:
    """Side of the maps behind pool2: neither convolution pads, both pools halve and round down."""
    side = ((image_size - CONV1_KERNEL + 1) // 2 - kernel + 1) // 2
    if side < 1:
        smallest = 2 * (kernel + 1) + CONV1_KERNEL - 1
        raise ValueError(
            f"lenet5 with kernel={kernel} needs images of at least {smallest}x{smallest}, got {image_size}x{image_size}: "
            "its convolutions do not pad, so nothing would be left behind the second pool"
        )
    return side
