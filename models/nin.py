"""Network in Network for small images.

Lin, Chen, Yan, Network In Network, arXiv 1312.4400; widths and order as in
https://github.com/jiecaoyu/XNOR-Net-PyTorch (its `CIFAR_10/models/nin.py`), the network of its published binary
CIFAR-10 result.
"""

from collections import OrderedDict
from typing import Annotated

from annotated_types import Ge, Lt
from torch import nn

from models.base import register


@register("nin")
def nin(
    *,
    in_channels: int,
    num_classes: int,
    image_size: int,
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.5,
    batch_norm: bool = False,
) -> nn.Module:
    """Nine convolutions, five of them 1x1; the class scores are the means of the last maps, so any image size will do.

    Shapes at 3x32x32: block1 96x16x16 (behind its pool), block2 192x8x8 (behind its pool), block3 192x8x8, head 10.
    966,986 parameters at 10 classes.

    The reference's float layers keep their normalisation without scale and shift: behind the first convolution and
    in front of the last. With He's initialisation these two are what the float network needs to train; between them
    a binary quantizer normalises in front of each of its layers. Dropout stands in front of the block here; the
    reference drops behind the sign of its binary layer.

    Args:
        dropout: share of the activations that is dropped in front of block2 and block3.
        batch_norm: normalise behind the inner convolutions as well (for large learning rates of a float network).

    >>> net = nin(in_channels=3, num_classes=10, image_size=32)
    >>> sum(p.numel() for p in net.parameters())
    966986
    """
    head = OrderedDict(
        bn=nn.BatchNorm2d(192, eps=1e-4, affine=False),
        conv=nn.Conv2d(192, num_classes, 1),
        relu=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
    )
    net = nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(
                OrderedDict(
                    conv=nn.Conv2d(in_channels, 192, 5, padding=2),
                    bn=nn.BatchNorm2d(192, eps=1e-4, affine=False),
                    relu=nn.ReLU(),
                )
            ),
            block1=block([(192, 160, 1), (160, 96, 1)], batch_norm),
            pool1=nn.MaxPool2d(3, stride=2, padding=1),
            dropout1=nn.Dropout(dropout),
            block2=block([(96, 192, 5), (192, 192, 1), (192, 192, 1)], batch_norm),
            pool2=nn.AvgPool2d(3, stride=2, padding=1),
            dropout2=nn.Dropout(dropout),
            block3=block([(192, 192, 3), (192, 192, 1)], batch_norm),
            head=nn.Sequential(head),
        )
    )
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return net


def block(convolutions: list[tuple[int, int, int]], batch_norm: bool) -> nn.Sequential:
    """Convolutions of (channels in, channels out, side of the filter) that keep the image size, each with its ReLU."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (width_in, width_out, kernel) in enumerate(convolutions, start=1):
        layers[f"conv{number}"] = nn.Conv2d(width_in, width_out, kernel, padding=kernel // 2)
        if batch_norm:
            layers[f"bn{number}"] = nn.BatchNorm2d(width_out)
        layers[f"relu{number}"] = nn.ReLU()
    return nn.Sequential(layers)
