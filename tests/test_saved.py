"""Saved bytes: against networks counted by hand, and the table of the network of arXiv 1510.03009's family, layer by layer."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.resnet import resnet, resnet18
from models.vgg import vgg6
from quant.actgrad import ActGrad
from quant.rangebn8 import EightBit
from quant.saved import saved_bytes, saved_bytes_per_sample
from quant.surgery import Rule, quantize_


def head(batch: int) -> float:
    """What cross entropy keeps a sample: log probabilities of 10 classes, the int64 label, its share of one total weight."""
    return 10 * 4 + 8 + 4 / batch


def test_counts_a_storage_once_and_a_view_as_the_whole_that_it_keeps_alive() -> None:
    x = torch.ones(10, 10, requires_grad=True)
    assert saved_bytes(lambda: (x * x).sum()) == 400
    assert saved_bytes(lambda: (x[:2] * x[:2]).sum()) == 400
    assert saved_bytes(lambda: x.exp().sum()) == 400
    assert saved_bytes(lambda: (x + x).sum()) == 0
    assert saved_bytes(lambda: (x * x).sum(), exclude=[x]) == 0


def test_counts_what_is_saved_inside_the_run_but_not_what_is_dropped() -> None:
    x = torch.ones(100, requires_grad=True)
    assert saved_bytes(lambda: x.exp().exp().exp().sum()) == 3 * 400
    with torch.no_grad():
        assert saved_bytes(lambda: x.exp().sum()) == 400, "measured with gradients whatever the caller's mode"


def test_plain_network_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10))
    images, conv, pooled = 3 * 8 * 8, 4 * 8 * 8, 4 * 4 * 4
    expected = 4 * (images + conv + pooled) + 8 * pooled + head(batch=5)
    assert saved_bytes_per_sample(net, torch.randn(5, 3, 8, 8), torch.arange(5)) == expected


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_quantized_network_by_hand(bits: int) -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10))
    quantize_(net, ActGrad(bits=bits, group=64))
    images, conv, pooled = 4 * 8 * 8, 4 * 8 * 8, 4 * 4 * 4
    codes, masks, places = (images + pooled) * bits // 8, conv // 8, pooled * 2 // 8
    ranges = (images + pooled) // 64 * 8
    measured = saved_bytes_per_sample(net, torch.randn(2, 4, 8, 8), torch.arange(2))
    assert measured == codes + masks + places + ranges + head(batch=2)


def test_a_tensor_hidden_in_the_context_counts_too() -> None:
    class Hiding(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.pair = (1, x.sign())
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g * ctx.pair[1]

    x = torch.ones(3, requires_grad=True)
    assert saved_bytes(lambda: Hiding.apply(x).sum()) == 3 * 4


def test_measuring_leaves_the_model_and_the_random_state_alone() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    quantize_(net, ActGrad(norm="quantized"))
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    saved_bytes_per_sample(net, torch.randn(2, 3, 8, 8, generator=torch.Generator()), torch.arange(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_a_compiled_network_keeps_the_same() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    quantize_(net, ActGrad(bits=2, group=None))
    images, labels = torch.randn(2, 3, 8, 8), torch.arange(2)
    eager = saved_bytes_per_sample(net, images, labels)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert saved_bytes_per_sample(compiled, images, labels) <= eager + 64


# bytes a sample = inputs of the nine layers at `bits`, 743,936 ReLU masks of a bit, 105,216 places of 2 bits
VGG6_INPUTS, VGG6_RELUS, VGG6_POOLED, VGG6_BEFORE_POOLS = 447_232, 743_936, 105_216, 404_992
VGG6_FLOAT = 4 * (VGG6_INPUTS + VGG6_BEFORE_POOLS) + 8 * VGG6_POOLED


QUANT_PAGE = (Path(__file__).parent.parent / "quant" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("bits", "megabytes", "ratio"), [(8, 0.567, 7.5), (4, 0.343, 12.4), (2, 0.231, 18.4), (1, 0.175, 24)]
)
def test_vgg6_keeps_what_the_codes_alone_take(bits: int, megabytes: float, ratio: float) -> None:
    images, labels = torch.randn(2, 3, 32, 32), torch.arange(2)
    with torch.device("meta"):
        net = vgg6(in_channels=3, num_classes=10, image_size=32)
    net.to_empty(device="cpu")  # the values do not matter here, and drawing 39 million of them takes long
    if bits == 8:
        assert saved_bytes_per_sample(net, images, labels) == VGG6_FLOAT + head(batch=2)
    quantize_(net, ActGrad(bits=bits, group=None))
    measured = saved_bytes_per_sample(net, images, labels)
    ranges = 9 * 8 / 2
    assert measured == VGG6_INPUTS * bits / 8 + VGG6_RELUS / 8 + VGG6_POOLED / 4 + ranges + head(batch=2)
    assert round(measured / 1e6, 3) == megabytes
    assert f"{measured:,.0f} ({VGG6_FLOAT / measured:.1f}x" in QUANT_PAGE
    assert round(VGG6_FLOAT / measured, 1 if ratio < 20 else 0) == ratio


def test_resnet20_in_8_bits_keeps_what_the_page_says() -> None:
    images, labels = torch.randn(64, 3, 32, 32), torch.arange(64) % 10
    net = resnet(in_channels=3, num_classes=10, image_size=32)
    floats = saved_bytes_per_sample(net, images, labels)
    quantize_(net, EightBit())
    codes = saved_bytes_per_sample(net, images, labels)
    assert f"float {floats:,.0f}, `8bit-rangebn` **{codes:,.0f}**, {floats / codes:.1f} times less" in QUANT_PAGE


def test_resnet18_at_two_bits_keeps_less_than_an_eighth() -> None:
    images, labels = torch.randn(2, 3, 32, 32), torch.arange(2)
    net = resnet18(in_channels=3, num_classes=10, image_size=32)
    whole = saved_bytes_per_sample(net, images, labels)
    quantize_(net, ActGrad(bits=2, norm="quantized"))
    assert saved_bytes_per_sample(net, images, labels) <= 0.12 * whole


def test_rules_choose_the_bits_of_a_layer() -> None:
    def network() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1), nn.Flatten())

    def measured(rules: list[Rule]) -> int:
        net = network()
        quantize_(net, ActGrad(bits=2, group=None), rules)
        weights = list(net.parameters())
        return saved_bytes(
            lambda: F.mse_loss(net(torch.ones(1, 4, 8, 8)), torch.zeros(1, 256), reduction="sum"), weights
        )

    first_at_8 = measured([Rule(match=["first"], settings={"bits": 8})])
    assert first_at_8 - measured([]) == 4 * 8 * 8 * (8 - 2) // 8
