"""`trainer.backward=bf16`: signs and codes lose nothing in bfloat16, and the gradient no more than its own rounding."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant.actgrad import ActGrad
from quant.lsq import Lsq
from quant.rangebn8 import EightBit
from quant.xnor import Xnor
from runner.build import build
from runner.compose import config_from
from runner.faults import ConfigError

CONV = (nn.Conv2d(16, 32, 3, stride=2, padding=1), (4, 16, 9, 8))
GROUPS = (nn.Conv2d(16, 32, 3, groups=2, bias=False), (4, 16, 9, 9))
LINEAR = (nn.Linear(96, 10), (64, 96))
METHODS: dict[str, Callable[..., Any]] = {
    "xnor": lambda: Xnor(input_norm="none"),
    "xnor in floats": lambda: Xnor(input_norm="none", kernel="float"),
    "lsq": lambda: Lsq(weight_bits=8, act_bits=8),
    "lsq 2 bits": lambda: Lsq(weight_bits=2, act_bits=2),
    "lsq steps of channels": lambda: Lsq(weight_bits=8, act_bits=8, weight_steps="channel"),
    "8bit-rangebn": lambda: EightBit(grad_rounding="nearest"),
}
cases = pytest.mark.parametrize(("module", "size"), [CONV, GROUPS, LINEAR], ids=["conv", "groups", "linear"])
methods = pytest.mark.parametrize("method", METHODS)


def pair(module: nn.Module, method: str, x: Tensor) -> tuple[Any, Any]:
    """The layer, and the same one told to round."""
    exact: Any = METHODS[method]().layer(copy.deepcopy(module))
    exact.calibrate_(x)
    rounded = copy.deepcopy(exact)
    assert rounded.backward_in_bf16_()
    return exact, rounded


def gradients(layer: Any, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    leaf = x.clone().requires_grad_()
    layer.zero_grad()
    layer(leaf).backward(g)
    return {"input": leaf.grad} | {name: p.grad.clone() for name, p in layer.named_parameters()}  # type: ignore[dict-item]


@cases
@methods
def test_the_gradient_turns_by_no_more_than_its_own_rounding(module: nn.Module, size: Any, method: str) -> None:
    """A rounding error is at most 2^-9 of a value; the gradient, and what comes of it, are rounded once each.

    That makes 2^-8; a processor without AVX-512 may round its sums on the way, too (0.0044 was seen, and 0.0049).
    """
    x = torch.randn(size)
    exact, rounded = pair(module, method, x)
    assert torch.equal(exact(x), rounded(x))
    g = torch.randn(exact(x).shape)
    want, got = gradients(exact, x, g), gradients(rounded, x, g)
    for name in ("input", "weight"):
        a, b = want[name], got[name]
        assert 0 < (a - b).norm() / a.norm() < 2**-7
        assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 1 - 2**-15


@cases
@methods
def test_operands_lose_nothing(module: nn.Module, size: Any, method: str) -> None:
    """A gradient of one power of two leaves no sum, and nothing that could be rounded but units of channels on their way in."""
    x = torch.randn(size)
    exact, rounded = pair(module, method, x)
    g = torch.zeros_like(exact(x))
    g[1, 3].view(-1)[0] = 0.25
    want, got = gradients(exact, x, g), gradients(rounded, x, g)
    assert want["weight"].count_nonzero() > 20
    torch.testing.assert_close(got["weight"], want["weight"], rtol=2**-23, atol=0)
    several = method not in ("lsq", "lsq 2 bits")
    torch.testing.assert_close(got["input"], want["input"], rtol=2**-7 if several else 2**-23, atol=0)


@cases
def test_the_rounded_gradient_is_the_same_from_bits_and_from_floats(module: nn.Module, size: Any) -> None:
    x, found = torch.randn(size), []
    for method in ("xnor", "xnor in floats"):
        _, rounded = pair(module, method, x)
        found.append(gradients(rounded, x, torch.linspace(-1, 1, rounded(x).numel()).view(rounded(x).shape)))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"8bit-rangebn"}))  # whose ranges are those of samples
def test_one_image_without_a_batch_around_it(method: str) -> None:
    """In float32 and in bfloat16, and vectors of one answer likewise."""
    for module, x in ((nn.Conv2d(4, 6, 3), torch.rand(4, 7, 7)), (nn.Linear(7, 1), torch.rand(7))):
        for layer in pair(module, method, x.unsqueeze(0)):
            g = torch.randn(layer(x).shape)
            alone, batched = gradients(layer, x, g), gradients(layer, x.unsqueeze(0), g.unsqueeze(0))
            torch.testing.assert_close(alone["input"], batched["input"].squeeze(0), rtol=2**-7, atol=1e-6)
            torch.testing.assert_close(alone["weight"], batched["weight"], rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("float activations", Xnor(binary_activations=False)),
        ("float weights", ActGrad()),
        ("an offset", Lsq(act_offset=True)),
        ("no codes of the input", Lsq(placement="post_act")),
        ("a zero between the codes", EightBit(zero_exact=False)),
        ("codes of 9 bits", EightBit(act_bits=9)),
    ],
)
def test_layers_whose_operands_it_would_round_stay_exact(name: str, method: Any) -> None:
    assert not method.layer(nn.Linear(4, 2)).backward_in_bf16_()


def test_a_network_says_how_many_of_its_products_are_rounded() -> None:
    config = config_from(["dataset=synthetic", "quant=lsq", "trainer.backward=bf16", "model=resnet18"])
    built = build(config, in_channels=3, num_classes=10, image_size=32)
    assert "gradients rounded to bfloat16 in front of 21 of 21 quantized products" in built.remarks


def test_a_network_without_such_a_layer_is_refused() -> None:
    config = config_from(["dataset=synthetic", "quant=actgrad", "trainer.backward=bf16"])
    with pytest.raises(
        ConfigError, match="actgrad has no layer whose operands bfloat16 holds exactly; accepted: exact"
    ):
        build(config, in_channels=3, num_classes=10, image_size=32)
