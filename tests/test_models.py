"""Models: parameter counts against arithmetic and published numbers, shapes, gradients, names, errors, the registry."""

import inspect
import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import models
from models.base import MODELS, build, import_all
from models.resnet import FAMILIES

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "conf" / "model"
OWN_MODELS = ("lenet5", "nin", "resnet", "resnet18", "vgg6", "vgg_small")  # all but torchvision's
VARIANTS = [
    *[(name, {}) for name in OWN_MODELS],
    ("lenet5", {"channels": [10, 30], "hidden": 64, "kernel": 3}),
    ("nin", {"batch_norm": True, "dropout": 0.0}),
    ("resnet", {"depth": 20, "block": "bireal", "activation": "hardtanh", "shortcut": "pool"}),
    ("resnet", {"depth": 50, "shortcut": "pool", "activation": "prelu", "stem": "imagenet"}),
    ("resnet", {"depth": 50, "shortcut": "pad"}),
    ("resnet18", {"block": "bireal", "activation": "prelu"}),
    ("resnet", {"depth": 20, "block": "bireal", "activation": "rprelu", "shortcut": "pool"}),
    ("vgg6", {"batch_norm": True}),
    ("vgg_small", {"activation": "hardtanh"}),
]
SMALLEST_IMAGE = {"lenet5": 16, "vgg6": 8, "vgg_small": 8}


def on_meta(name: str, in_channels: int = 3, size: int = 32, classes: int = 10, **arguments: object) -> nn.Module:
    """The network without storage: shapes and names only, at no cost."""
    with torch.device("meta"):
        return build(name, in_channels=in_channels, num_classes=classes, image_size=size, **arguments)


def small(name: str, arguments: dict[str, object]) -> tuple[nn.Module, torch.Tensor]:
    """A real network with two of the smallest images that it is for."""
    size = SMALLEST_IMAGE.get(name, 16)
    torch.manual_seed(0)
    network = build(name, in_channels=1, num_classes=4, image_size=size, **arguments)
    return network, torch.randn(2, 1, size, size)


def parameters(network: nn.Module) -> int:
    return sum(tensor.numel() for tensor in network.parameters())


def conv(channels_in: int, channels_out: int, kernel: int, bias: int = 1) -> int:
    return channels_out * (channels_in * kernel**2 + bias)


def linear(features_in: int, features_out: int) -> int:
    return conv(features_in, features_out, 1)


def cifar_resnet(n: int, projection: bool) -> int:
    """He et al., section 4.2: 6n + 2 layers; every convolution has a normalisation of 2 numbers per channel."""
    total = conv(3, 16, 3, bias=2) + linear(64, 10)
    for width_in, width in ((16, 16), (16, 32), (32, 64)):
        total += conv(width_in, width, 3, bias=2) + (2 * n - 1) * conv(width, width, 3, bias=2)
        if projection and width_in != width:
            total += conv(width_in, width, 1, bias=2)
    return total


LENET5 = conv(1, 20, 5) + conv(20, 50, 5) + linear(50 * 4 * 4, 500) + linear(500, 10)
NIN = (
    conv(3, 192, 5) + conv(192, 160, 1) + conv(160, 96, 1)
    + conv(96, 192, 5) + 2 * conv(192, 192, 1)
    + conv(192, 192, 3) + conv(192, 192, 1) + conv(192, 10, 1)
)  # fmt: skip
VGG_CONVOLUTIONS = list(itertools.pairwise((3, 128, 128, 256, 256, 512, 512)))
VGG6 = sum(conv(*c, 3) for c in VGG_CONVOLUTIONS) + linear(512 * 8 * 8, 1024) + linear(1024, 1024) + linear(1024, 10)
VGG_SMALL = sum(conv(*c, 3, bias=2) for c in VGG_CONVOLUTIONS) + linear(512 * 4 * 4, 10)
BATCH_NORM_OF_VGG6 = 2 * (2 * 128 + 2 * 256 + 2 * 512 + 2 * 1024)


@pytest.mark.parametrize(
    ("name", "arguments", "expected", "published"),
    [
        ("vgg6", {}, VGG6, 39_191_690),
        ("vgg6", {"batch_norm": True}, VGG6 + BATCH_NORM_OF_VGG6, None),
        ("vgg_small", {}, VGG_SMALL, 4_660_106),
        ("nin", {}, NIN, 966_986),
        ("nin", {"batch_norm": True}, NIN + 2 * (160 + 96 + 5 * 192), None),
        ("resnet", {"depth": 20}, cifar_resnet(3, projection=False), 269_722),
        ("resnet", {"depth": 20, "shortcut": "conv"}, cifar_resnet(3, projection=True), 272_474),
        ("resnet", {"depth": 20, "shortcut": "pool"}, cifar_resnet(3, projection=True), 272_474),
        ("resnet", {"depth": 20, "block": "bireal"}, cifar_resnet(3, projection=False), 269_722),
        ("resnet", {"depth": 32}, cifar_resnet(5, projection=False), 464_154),
        ("resnet", {"depth": 44}, cifar_resnet(7, projection=False), 658_586),
        ("resnet", {"depth": 56}, cifar_resnet(9, projection=False), 853_018),
        ("resnet", {"depth": 110}, cifar_resnet(18, projection=False), 1_727_962),
        ("resnet18", {}, None, 11_173_962),
        ("resnet", {"depth": 18}, None, 11_173_962),
        ("resnet", {"depth": 34}, None, 21_282_122),
        ("resnet", {"depth": 50}, None, 23_520_842),
        ("resnet", {"depth": 101}, None, 42_512_970),
    ],
)
def test_parameters_at_3x32x32(
    name: str, arguments: dict[str, object], expected: int | None, published: int | None
) -> None:
    assert {expected, published} - {None} == {parameters(on_meta(name, **arguments))}


def test_parameters_of_lenet5() -> None:
    network = on_meta("lenet5", in_channels=1, size=28)
    assert parameters(network) == LENET5 == 431_080
    binary = [weights.numel() for key, weights in network.named_parameters() if key in ("conv2.weight", "fc1.weight")]
    assert sum(binary) == 425_000  # what XNOR-Net-PyTorch binarizes


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_imagenet_resnets_have_as_many_parameters_as_torchvisions(depth: int) -> None:
    ours = on_meta("resnet", size=224, classes=1000, depth=depth)
    theirs = on_meta("torchvision", size=224, classes=1000, arch=f"resnet{depth}")
    assert sorted(tuple(p.shape) for p in ours.parameters()) == sorted(tuple(p.shape) for p in theirs.parameters())


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (3, 64), (3, 224), (3, 33)])
@pytest.mark.parametrize(("name", "arguments"), VARIANTS)
def test_output_shape(name: str, arguments: dict[str, object], channels: int, size: int) -> None:
    network = on_meta(name, channels, size, classes=7, **arguments)
    scores = network(torch.empty(2, channels, size, size, device="meta"))
    assert scores.shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "size", "shapes"),
    [
        ("lenet5", 28, {"conv1": (20, 24, 24), "pool1": (20, 12, 12), "conv2": (50, 8, 8), "pool2": (50, 4, 4)}),
        ("vgg6", 32, {
            "conv1": (128, 34, 34), "conv2": (128, 36, 36), "pool1": (128, 18, 18),
            "conv3": (256, 20, 20), "conv4": (256, 22, 22), "pool2": (256, 11, 11),
            "conv5": (512, 13, 13), "conv6": (512, 15, 15), "pool3": (512, 8, 8), "fc1": (1024,), "fc2": (1024,),
        }),
        ("vgg_small", 32, {"pool2": (128, 16, 16), "pool4": (256, 8, 8), "pool6": (512, 4, 4)}),
        ("nin", 32, {"pool1": (96, 16, 16), "pool2": (192, 8, 8), "block3": (192, 8, 8), "head.relu": (10, 8, 8)}),
        ("resnet18", 32, {"stem": (64, 32, 32), "stage1": (64, 32, 32), "stage4": (512, 4, 4)}),
        ("resnet18", 224, {"stem": (64, 56, 56), "stage1": (64, 56, 56), "stage4": (512, 7, 7)}),
        ("resnet", 32, {"stem": (16, 32, 32), "stage2": (32, 16, 16), "stage3": (64, 8, 8)}),
    ],
)  # fmt: skip
def test_inner_shapes_are_those_of_the_docstrings(name: str, size: int, shapes: dict[str, tuple[int, ...]]) -> None:
    network = on_meta(name, size=size)
    seen: dict[str, tuple[int, ...]] = {}
    for key in shapes:
        network.get_submodule(key).register_forward_hook(
            lambda module, inputs, output, key=key: seen.update({key: tuple(output.shape[1:])})
        )
    network(torch.empty(1, 3, size, size, device="meta"))
    assert seen == shapes


@pytest.mark.parametrize(("name", "arguments"), VARIANTS)
def test_every_module_is_known_by_one_name_and_used_once(name: str, arguments: dict[str, object]) -> None:
    network = on_meta(name, **arguments)
    leaves = {key: m for key, m in network.named_modules(remove_duplicate=False) if not list(m.children())}
    assert len({id(module) for module in leaves.values()}) == len(leaves)
    calls: Counter[str] = Counter()
    for key, module in leaves.items():
        module.register_forward_hook(lambda module, inputs, output, key=key: calls.update([key]))
    network(torch.empty(2, 3, 32, 32, device="meta"))
    assert calls == dict.fromkeys(leaves, 1)


@pytest.mark.parametrize(("name", "arguments"), VARIANTS)
def test_every_parameter_gets_a_finite_gradient(name: str, arguments: dict[str, object]) -> None:
    network, images = small(name, arguments)
    nn.functional.cross_entropy(network(images), torch.tensor([0, 3])).backward()
    for key, weights in network.named_parameters():
        assert weights.grad is not None, key
        assert weights.grad.isfinite().all(), key
    largest = max(float(weights.grad.abs().max()) for weights in network.parameters() if weights.grad is not None)
    assert largest > 0


@pytest.mark.parametrize("name", OWN_MODELS)
def test_the_seed_decides_the_weights(name: str) -> None:
    first, second = (small(name, {})[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["vgg6", "resnet18", "nin"])
def test_initial_signal_neither_dies_nor_explodes(name: str) -> None:
    network, images = small(name, {})
    spread = network(images).std().item()
    assert 0.01 < spread < 10


@pytest.mark.parametrize(("shortcut", "count"), [("conv", 3), ("pool", 3), ("pad", 0)])
def test_only_shortcut_convolutions_have_shortcut_in_their_name(shortcut: str, count: int) -> None:
    network = on_meta("resnet18", shortcut=shortcut)
    named = {key for key, module in network.named_modules() if "shortcut" in key and isinstance(module, nn.Conv2d)}
    one_by_one = {key for key, m in network.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)}
    assert named == one_by_one
    assert len(named) == count


def test_pad_shortcut_keeps_every_second_pixel_and_adds_zeros() -> None:
    network = build("resnet", in_channels=3, num_classes=10, image_size=32, depth=20)
    shortcut = network.get_submodule("stage2.0.shortcut")
    images = torch.randn(2, 16, 7, 7)
    passed = shortcut(images)
    assert passed.shape == (2, 32, 4, 4)
    assert torch.equal(passed[:, :16], images[:, :, ::2, ::2])
    assert not passed[:, 16:].any()


def test_bireal_has_a_shortcut_per_convolution_and_basic_one_per_block() -> None:
    """With the second branch at zero, both come down to the first branch: bireal adds the input to it, basic drops it."""
    arguments = {"in_channels": 3, "num_classes": 10, "image_size": 32}
    basic = build("resnet18", zero_init_residual=True, **arguments).get_submodule("stage1.0")
    bireal = build("resnet18", block="bireal", **arguments).get_submodule("stage1.0")
    bireal.load_state_dict(basic.state_dict())
    assert not basic.get_submodule("bn2").weight.any()
    images = torch.randn(2, 64, 8, 8)
    branch = basic.get_submodule("bn1")(basic.get_submodule("conv1")(images))
    torch.testing.assert_close(basic(images), images.relu())
    torch.testing.assert_close(bireal(images), (branch + images).relu())


def test_width_multiplies_channels() -> None:
    network = on_meta("resnet", depth=20, width=4)
    assert network.get_submodule("stem.conv").out_channels == 64
    assert network.get_submodule("fc").in_features == 256


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    ("arch", "size"),
    [("mobilenet_v2", 32), ("alexnet", 64), ("googlenet", 32), ("inception_v3", 75), ("vit_b_16", 32),
     ("vit_b_32", 64), ("swin_t", 32), ("swin_v2_t", 40), ("maxvit_t", 224), ("densenet121", 32),
     ("squeezenet1_1", 32), ("convnext_tiny", 32), ("efficientnet_b0", 28), ("shufflenet_v2_x0_5", 28)],
)  # fmt: skip
def test_torchvision(arch: str, size: int, channels: int) -> None:
    network = on_meta("torchvision", channels, size, classes=7, arch=arch)
    assert network.training
    assert network(torch.empty(2, channels, size, size, device="meta")).shape == (2, 7)


def test_torchvision_trains_on_one_channel() -> None:
    torch.manual_seed(0)
    network = build("torchvision", in_channels=1, num_classes=4, image_size=32, arch="regnet_x_400mf")
    nn.functional.cross_entropy(network(torch.randn(2, 1, 32, 32)), torch.tensor([0, 3])).backward()
    assert all(weights.grad is not None for weights in network.parameters())


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("lenet", {}, "did you mean 'lenet5'.*Accepted: .*nin.*vgg6"),
        ("lenet5", {"channels": [20]}, "two positive numbers"),
        ("lenet5", {"channels": [20, 0]}, "two positive numbers"),
        ("lenet5", {"kernel": 15}, "at least 36x36, got 32x32: its convolutions do not pad"),
        ("resnet", {"depth": 19}, "depth=19 is unknown.*18, 34, 50, 101, 20, 32, 44, 56, 110"),
        ("resnet", {"depth": 50, "block": "bireal"}, r"accepted depths: \[18, 20, 32, 34, 44, 56, 110\]"),
        ("resnet18", {"block": "bi-real"}, "did you mean 'bireal'"),
        ("resnet18", {"stem": "small"}, "Accepted: auto, cifar, imagenet"),
        ("resnet18", {"shortcut": "convolution"}, "Accepted: auto, conv, pad, pool"),
        ("resnet18", {"activation": "gelu"}, "Accepted: relu, prelu, rprelu, hardtanh"),
        ("vgg_small", {"activation": "gelu"}, "Accepted: relu, hardtanh"),
        ("torchvision", {"arch": "mobilenetv2"}, "did you mean 'mobilenet_v2'.*Accepted: alexnet"),
        ("torchvision", {"arch": "fasterrcnn_resnet50_fpn"}, "is unknown"),
        ("torchvision", {"arch": "r3d_18"}, "is unknown"),
        ("torchvision", {"arch": "alexnet"}, "alexnet does not take images of 32x32"),
        ("torchvision", {"arch": "vit_h_14"}, "no multiple of 14"),
    ],
)
def test_mistakes_are_answered_with_what_is_accepted(name: str, arguments: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        on_meta(name, **arguments)


@pytest.mark.parametrize(("name", "size"), [("lenet5", 16), ("vgg_small", 8)])
def test_smallest_image(name: str, size: int) -> None:
    assert on_meta(name, size=size)(torch.empty(2, 3, size, size, device="meta")).shape == (2, 10)
    with pytest.raises(ValueError, match=f"at least {size}x{size}"):
        on_meta(name, size=size - 1)


def test_a_new_file_is_a_new_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "perceptron_of_a_test.py").write_text(
        "from torch import nn\n"
        "from models.base import register\n"
        "@register('perceptron_of_a_test')\n"
        "def perceptron(*, in_channels: int, num_classes: int, image_size: int) -> nn.Module:\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, num_classes))\n"
    )
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    try:
        network = build("perceptron_of_a_test", in_channels=1, num_classes=3, image_size=8)
    finally:
        MODELS.pop("perceptron_of_a_test", None)
        sys.modules.pop("models.perceptron_of_a_test", None)
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


def test_a_name_can_be_taken_once() -> None:
    import_all()

    def impostor(*, in_channels: int, num_classes: int, image_size: int) -> nn.Module:
        raise NotImplementedError

    with pytest.raises(ValueError, match=r"already taken by models\.lenet"):
        models.base.register("lenet5")(impostor)


def test_looking_at_the_package_is_cheap() -> None:
    """Neither the package nor the folder's own networks may pay for what they do not use."""
    code = "import sys, models; assert 'torch' not in sys.modules; import models.base; models.base.import_all()"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torchvision' not in sys.modules"], check=True, cwd=ROOT)


def test_configs_state_every_argument_with_its_default() -> None:
    import_all()
    assert {path.stem for path in CONFIGS.glob("*.yaml")} >= set(OWN_MODELS) | {"torchvision"}
    for path in CONFIGS.glob("*.yaml"):
        keys = yaml.safe_load(path.read_text())
        assert list(keys.pop("defaults")[0]) == ["override /regime@_global_.regime"], path
        signature = inspect.signature(MODELS[keys.pop("name")]).parameters
        own = {key: p.default for key, p in signature.items() if p.default is not inspect.Parameter.empty}
        assert keys == own, path


def test_accepted_depths_are_those_of_the_annotation() -> None:
    annotation = inspect.signature(MODELS["resnet"]).parameters["depth"].annotation
    assert set(annotation.__args__) == set(FAMILIES)
