"""A batch norm that has its input computed again: the same numbers as torch's, and none of its input kept."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant import kernels
from quant.lsq import Lsq
from quant.recomputed_norm import RecomputedBatchNorm2d
from quant.saved import saved_bytes
from quant.surgery import calibrate_, quantize_

pytestmark = pytest.mark.skipif(kernels.why_not() is not None, reason=str(kernels.why_not()))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, affine=False)
        self.short, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.norm(self.short(x)))


def network(**settings: object) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Residual(), Residual())
    quantize_(model, Lsq(**settings))  # type: ignore[arg-type]
    calibrate_(model, images())
    return model


def images() -> Tensor:
    return torch.rand(4, 8, 16, 16, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module, x: Tensor) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [t.clone() for t in model.state_dict().values()]


@pytest.mark.parametrize("last", [False, True])
def test_training_is_the_same_to_the_last_bit(last: bool) -> None:
    x = images().to(memory_format=torch.channels_last if last else torch.contiguous_format)
    states = [trained(network(norm_input=kind), x) for kind in ("recomputed", "kept")]
    assert all(map(torch.equal, *states))


def test_float_outputs_are_not_kept() -> None:
    def kept(kind: str) -> int:
        model = network(norm_input=kind)
        return saved_bytes(lambda: model(images()).sum(), [*model.parameters(), *model.buffers()])

    one = images().numel() * 4
    assert kept("kept") - kept("recomputed") == 4 * one  # all but the two with momentum=None, which torch computes


def test_whoever_cannot_compute_again_is_kept() -> None:
    norm, x = RecomputedBatchNorm2d(nn.BatchNorm2d(3)), torch.randn(2, 3, 4, 4, requires_grad=True)
    want = nn.BatchNorm2d(3)
    assert torch.equal(norm(2 * x), want(2 * x))
    assert torch.equal(norm.eval()(2 * x), want.eval()(2 * x))
    assert list(norm.state_dict()) == list(want.state_dict())


def test_backward_twice() -> None:
    model = network()
    loss = model(images()).sum()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, list(model.parameters()))))


@pytest.mark.parametrize("index", [0, 1], ids=["weight", "bias"])
def test_a_parameter_changed_before_backward_is_noticed(index: int) -> None:
    model = network()
    loss = model(images()).sum()
    with torch.no_grad():
        list(model.parameters())[index].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_was_changed_behind_the_convolution_is_not_computed_again() -> None:
    found = []
    for norm in ("kept", "recomputed"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
        quantize_(model, Lsq(norm_input=norm), [])
        calibrate_(model, images())
        y = model[0](images())
        with torch.no_grad():
            y.clamp_(-0.1, 0.1)
        (model[1](y) * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        found.append(model[1].weight.grad)
    assert torch.equal(*found)


def test_a_norm_of_another_width_is_torchs_error() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(4))
    quantize_(model, Lsq(), [])
    with pytest.raises(RuntimeError, match="running_mean should contain 8 elements not 4"):
        model(images())
