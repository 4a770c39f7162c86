"""Two VGG-like networks for small images (after Simonyan, Zisserman, arXiv 1409.1556)."""

from collections import OrderedDict
from typing import Literal

from torch import nn

from models.base import pick, register

WIDTHS = (128, 128, 256, 256, 512, 512)  # of the six convolutions of both networks
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "hardtanh": nn.Hardtanh}


@register("vgg6")
def vgg6(*, in_channels: int, num_classes: int, image_size: int, batch_norm: bool = False) -> nn.Module:
    """Six convolutions and three linear layers, with a padding of 2 around every 3x3 convolution.

    BinaryConnect's CIFAR network (Courbariaux, Bengio, David, arXiv 1511.00363) with the padding, and without the
    normalisation, of https://github.com/FxPiGaAo/implementation-for-neuron-network, which trains it with weight
    gradients from quantized activations. That code pools twice with one module; here these are pool1 and pool2, and
    pool3 is its pool with a padding of 1.

    Shapes at 3x32x32: conv1 128x34x34, conv2 128x36x36, pool1 128x18x18, conv3 256x20x20, conv4 256x22x22, pool2
    256x11x11, conv5 512x13x13, conv6 512x15x15, pool3 512x8x8, fc1 1024, fc2 1024, fc3 10. 39,191,690 parameters at
    10 classes.

    Args:
        batch_norm: normalise behind each convolution and each hidden linear layer, as BinaryConnect does.

    >>> import torch
    >>> with torch.device("meta"):  # shapes only, no memory
    ...     net = vgg6(in_channels=3, num_classes=10, image_size=32)
    >>> sum(p.numel() for p in net.parameters())
    39191690
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    width_in, side = in_channels, image_size
    for number, width in enumerate(WIDTHS, start=1):
        layers[f"conv{number}"] = nn.Conv2d(width_in, width, 3, padding=2)
        if batch_norm:
            layers[f"bn{number}"] = nn.BatchNorm2d(width)
        layers[f"relu{number}"] = nn.ReLU()
        width_in, side = width, side + 2
        if number % 2 == 0:
            padding = 1 if number == 6 else 0
            layers[f"pool{number // 2}"] = nn.MaxPool2d(2, padding=padding)
            side = (side + 2 * padding) // 2
    layers["flatten"] = nn.Flatten()
    for number, features in enumerate((width_in * side * side, 1024), start=1):
        layers[f"fc{number}"] = nn.Linear(features, 1024)
        if batch_norm:
            layers[f"bn{6 + number}"] = nn.BatchNorm1d(1024)
        layers[f"relu{6 + number}"] = nn.ReLU()
    layers["fc3"] = nn.Linear(1024, num_classes)
    net = nn.Sequential(layers)
    initialise_(net)
    return net


@register("vgg_small")
def vgg_small(
    *,
    in_channels: int,
    num_classes: int,
    image_size: int,
    activation: Literal["relu", "hardtanh"] = "relu",
) -> nn.Module:
    """Six convolutions with normalisation and one linear layer: the VGG of the papers on low-bit CIFAR-10.

    Zhang, Yang, Ye, Hua, LQ-Nets, arXiv 1807.10029, section 4; the order convolution, pool, normalisation,
    activation is the one of https://github.com/htqin/IR-Net (Qin et al., arXiv 1909.10788).

    Shapes at 3x32x32: conv1 and conv2 128x32x32, pool2 128x16x16, conv4 256x16x16, pool4 256x8x8, conv6 512x8x8,
    pool6 512x4x4, fc 10. 4,660,106 parameters at 10 classes.

    Args:
        activation: relu for float and multi-bit networks; hardtanh keeps the sign information for binary ones
            (IR-Net).

    >>> net = vgg_small(in_channels=3, num_classes=10, image_size=32)
    >>> sum(p.numel() for p in net.parameters())
    4660106
    """
    if image_size < 8:
        raise ValueError(f"vgg_small halves the image three times and needs at least 8x8, got {image_size}")
    make_activation = pick("activation", activation, ACTIVATIONS)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    width_in = in_channels
    for number, width in enumerate(WIDTHS, start=1):
        layers[f"conv{number}"] = nn.Conv2d(width_in, width, 3, padding=1, bias=False)
        if number % 2 == 0:
            layers[f"pool{number}"] = nn.MaxPool2d(2)
        layers[f"bn{number}"] = nn.BatchNorm2d(width)
        layers[f"act{number}"] = make_activation()
        width_in = width
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(width_in * (image_size // 8) ** 2, num_classes)
    net = nn.Sequential(layers)
    initialise_(net)
    return net


def initialise_(net: nn.Module) -> None:
    """He's initialisation (arXiv 1502.01852, eq. 10): torch's default would shrink the variance to a sixth per ReLU layer."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
