"""The gradients of binary layers: the same from packed bits and from floats, and what rounding them to bfloat16 changes."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant.xnor import BinaryConv2d, BinaryLinear, Xnor
from runner.build import build
from runner.compose import config_from
from runner.faults import ConfigError

LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv2d(64, 64, 3, padding=1), (8, 64, 8, 8)),
    (nn.Conv2d(64, 128, 3, stride=2, padding=1, bias=False), (8, 64, 8, 8)),
    (nn.Conv2d(16, 32, 3, groups=2), (4, 16, 9, 9)),
    (nn.Linear(512, 10), (64, 512)),
]


def gradients(layer: Any, x: Tensor, g: Tensor) -> list[Tensor]:
    """dx and dW."""
    leaf = x.clone().requires_grad_()
    layer.zero_grad()
    layer(leaf).backward(g)
    return [leaf.grad, layer.weight.grad.clone()]  # type: ignore[list-item]


@pytest.mark.parametrize("kernel", ["auto", "float"])
@pytest.mark.parametrize(("module", "size"), LAYERS, ids=str)
def test_bfloat16_turns_no_gradient_by_more_than_its_own_rounding(
    module: nn.Module, size: tuple[int, ...], kernel: Any
) -> None:
    """A rounding error is at most 2^-9 of a value; the gradient, and what comes of it, are rounded once each.

    That makes 2^-8; a processor without AVX-512 may round its sums on the way, too (0.0044 was seen, and 0.0049).
    """
    exact: Any = Xnor(kernel=kernel, input_norm="none").layer(copy.deepcopy(module))
    rounded: Any = copy.deepcopy(exact)
    assert rounded.backward_in_bf16_()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, generator=generator)
    g = torch.randn(exact(x).shape, generator=generator)
    assert torch.equal(exact(x), rounded(x))
    for a, b in zip(gradients(exact, x, g), gradients(rounded, x, g), strict=True):
        assert 0 < (a - b).norm() / a.norm() < 2**-7
        assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 1 - 2**-15


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_the_rounded_gradient_is_the_same_from_bits_and_from_floats(kind: str) -> None:
    module, size = LAYERS[0] if kind == "conv" else LAYERS[3]
    found = []
    for kernel in ("packed", "float"):
        layer: Any = Xnor(kernel=kernel).layer(copy.deepcopy(module))  # type: ignore[arg-type]
        assert isinstance(layer, BinaryConv2d | BinaryLinear)
        layer.backward_in_bf16_()
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(size, generator=generator)
        found.append(gradients(layer, x, torch.randn(layer(x).shape, generator=generator)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_methods_whose_operands_bfloat16_would_round_refuse() -> None:
    assert not Xnor(binary_activations=False).layer(nn.Linear(4, 2)).backward_in_bf16_()  # type: ignore[operator]
    config = config_from(["dataset=synthetic", "quant=8bit-rangebn", "trainer.backward=bf16"])
    with pytest.raises(
        ConfigError, match="8bit-rangebn has no layer whose operands bfloat16 holds exactly; accepted: exact"
    ):
        build(config, in_channels=3, num_classes=10, image_size=32)
