"""Every classification network of torchvision (https://pytorch.org/vision/stable/models.html), untrained.

torchvision takes seconds to import, so that only who asks for one of its networks should pay for it.
"""

import torch
from torch import nn

from models.base import pick, register


@register("torchvision")
def torchvision_model(*, in_channels: int, num_classes: int, image_size: int, arch: str = "mobilenet_v2") -> nn.Module:
    """The torchvision network `arch`, e.g. alexnet, vgg16, mobilenet_v2, efficientnet_b0, convnext_tiny, vit_b_16.

    Shapes are those of the papers that torchvision names; the stem is made for 3x224x224. For another number of
    channels the first convolution is replaced by one that is alike but for its input. Auxiliary classifiers
    (GoogLeNet, Inception) are left out. Nothing is downloaded. Some of these networks use one activation module
    several times, or call activations as functions, so a quantizer that replaces activations sees fewer of them
    here than in this folder's own networks.

    Args:
        arch: name in torchvision's list of classification models.

    >>> net = torchvision_model(in_channels=3, num_classes=10, image_size=224, arch="squeezenet1_1")
    >>> sum(p.numel() for p in net.parameters())
    727626
    """
    from torchvision import models as zoo

    pick("arch", arch, {name: name for name in zoo.list_models(module=zoo)})
    net: nn.Module = zoo.get_model(arch, weights=None, num_classes=num_classes, **special_arguments(arch, image_size))
    if in_channels != 3:
        adapt_first_convolution_(net, in_channels)
    check_image_size(net, arch, in_channels, image_size)
    return net


def special_arguments(arch: str, image_size: int) -> dict[str, object]:
    """What some constructors want besides the number of classes."""
    if arch in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "init_weights": True}
    if arch.startswith("vit_"):
        patch = int(arch.rsplit("_", 1)[1])
        if image_size % patch:
            raise ValueError(f"{arch} cuts the image into patches: image_size={image_size} is no multiple of {patch}")
        return {"image_size": image_size}
    if arch.startswith("maxvit_"):
        return {"input_size": (image_size, image_size)}
    return {}


def adapt_first_convolution_(net: nn.Module, in_channels: int) -> None:
    """Let the first convolution take `in_channels` channels; its weights are drawn anew (He's initialisation)."""
    name, old = next((name, module) for name, module in net.named_modules() if isinstance(module, nn.Conv2d))
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        (old.kernel_size[0], old.kernel_size[1]),
        stride=(old.stride[0], old.stride[1]),
        padding=old.padding if isinstance(old.padding, str) else (old.padding[0], old.padding[1]),
        bias=old.bias is not None,
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    parent, _, child = name.rpartition(".")
    setattr(net.get_submodule(parent), child, new)


def check_image_size(net: nn.Module, arch: str, in_channels: int, image_size: int) -> None:
    """A forward pass on the meta device, which computes shapes only, shows whether the layers fit the image."""
    tensors = dict([*net.named_parameters(), *net.named_buffers()])
    on_meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    image = torch.empty(1, in_channels, image_size, image_size, device="meta")
    net.eval()
    try:
        torch.func.functional_call(net, on_meta, (image,))
    except RuntimeError as error:
        fault = f"{arch} does not take images of {image_size}x{image_size} (made for 224x224): {error}"
        raise ValueError(fault) from error
    net.train()
