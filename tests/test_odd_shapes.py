"""Inputs that torch's own layers take without a word: one vector without a batch, and a batch of nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant.actgrad import ActGrad
from quant.base import Quantizer
from quant.dorefa import Dorefa
from quant.lsq import Lsq
from quant.none import NoQuantizer
from quant.rangebn8 import EightBit
from quant.surgery import quantize_
from quant.ternary import Ternary
from quant.xnor import Xnor

VECTORS: list[Quantizer] = [
    NoQuantizer(),
    Xnor(input_norm="none", kernel="float"),
    Xnor(input_norm="none", input_scale=True),
    Xnor(binary_activations=False),
    Lsq(act_bits=3),
    Lsq(preset="plus"),
    Dorefa(input_norm="none"),
    Dorefa(input_norm="none", grad_bits=4, weight_bits=1),
    Ternary(scale="layer"),
    ActGrad(rounding="nearest"),
    ActGrad(rounding="nearest", scheme="power_of_two"),
    EightBit(grad_rounding="nearest"),
]
BATCHES: list[Quantizer] = [
    *VECTORS,
    Xnor(input_scale=True),
    Lsq(preset="plain"),
    Dorefa(grad_bits=4),
    ActGrad(group=None, norm="quantized"),
    ActGrad(scheme="power_of_two"),
    EightBit(zero_exact=False, grad_weight_bits=16),
]


def net(settings: Quantizer, *modules: nn.Module) -> nn.Sequential:
    model = nn.Sequential(*modules)
    quantize_(model, settings)
    return model


def gradients(model: nn.Module, x: Tensor, g: Tensor) -> list[Tensor]:
    """The output, and what comes back to the input and to every parameter."""
    x = x.clone().requires_grad_()
    torch.manual_seed(0)
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], g)]


@pytest.mark.parametrize("settings", VECTORS, ids=repr)
def test_one_vector_is_a_batch_of_one(settings: Quantizer) -> None:
    torch.manual_seed(3)
    model: Any = net(settings, nn.Linear(8, 3))
    x, g = torch.randn(8), torch.randn(3)
    if not isinstance(settings, NoQuantizer):
        model[0].calibrate_(x[None])
    alone, row = gradients(model, x, g), gradients(model, x[None], g[None])
    assert [len(t.shape) for t in alone[:2]] == [1, 1]
    for ours, theirs in zip(alone, row, strict=True):
        torch.testing.assert_close(ours, theirs.view_as(ours))


@pytest.mark.parametrize("settings", BATCHES, ids=repr)
@pytest.mark.parametrize("flat", [True, False])
def test_a_batch_of_nothing_gives_nothing_and_changes_nothing(settings: Quantizer, flat: bool) -> None:
    if flat:
        model, shape = net(settings, nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)), (0, 8)
    else:
        layers = (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 3, 1))
        model, shape = net(settings, *layers), (0, 4, 6, 6)
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if not name.endswith("tracked")}
    size = (0, 3) if flat else (0, 3, 2, 2)
    y, dx, *rest = gradients(model, torch.zeros(shape), torch.zeros(size))
    assert (y.shape, dx.shape) == (size, shape)
    assert all(not t.any() for t in rest)
    buffers = dict(model.named_buffers())
    assert all(torch.equal(buffers[name], value) for name, value in before.items())
    model.eval()
    assert model(torch.zeros(shape)).shape == size


@pytest.mark.parametrize("settings", [Xnor(), Dorefa()], ids=repr)
def test_one_vector_behind_a_norm_of_its_own(settings: Quantizer) -> None:
    """In training a batch norm of one row is an error of torch's own; trained, it takes it."""
    torch.manual_seed(3)
    model: Any = net(settings, nn.Linear(8, 3))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.randn(8))
    model.eval()
    x = torch.randn(8)
    torch.testing.assert_close(model(x), model(x[None])[0])
    assert model[0].health(x) == model[0].health(x[None])
