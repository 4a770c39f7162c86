"""Parts that are computed again in backward: the same numbers to the bit, with less kept."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Runner
from torch import Tensor, nn
from torch.nn import functional as F

from models.base import build
from quant.base import find
from quant.recompute import recompute_
from quant.saved import saved_bytes_per_sample
from quant.surgery import Rule, calibrate_, quantize_
from runner.compose import config_from
from runner.config import config_hash
from runner.faults import ConfigError

ENDS = [Rule(match=["first", "last"], keep=True)]
METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "xnor": {},
    "lsq": {},
    "dorefa": {},
    "actgrad": {"bits": 2},
    "8bit-rangebn": {},
}


def network(model: str, quant: str, **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    net = build(model, in_channels=3, num_classes=10, image_size=16, **arguments)
    quantize_(net, find(quant)(**METHODS[quant]), ENDS)
    return net.train()


def batch(count: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 16, 16, generator=generator), torch.arange(count)


def trained(net: nn.Module, steps: int = 2) -> list[Tensor]:
    """Losses, last gradients and all state after some steps, and the random number that comes next."""
    images, labels = batch()
    torch.manual_seed(7)
    calibrate_(net, images)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    return [*losses, *gradients, *net.state_dict().values(), torch.rand(3)]


@pytest.mark.parametrize("unit", ["blocks", "stages"])
@pytest.mark.parametrize("quant", METHODS)
def test_every_method_computes_the_same_twice(quant: str, unit: Any) -> None:
    plain, twice = (network("resnet", quant, depth=20) for _ in range(2))
    assert len(recompute_(twice, unit)) == (10 if unit == "blocks" else 4)
    for a, b in zip(trained(plain), trained(twice), strict=True):
        assert torch.equal(a, b)


def test_dropout_draws_the_same_numbers() -> None:
    plain, twice = (network("nin", "xnor") for _ in range(2))
    recompute_(twice, "blocks")
    for a, b in zip(trained(plain), trained(twice), strict=True):
        assert torch.equal(a, b)


class Drifting(nn.Module):
    """Reads a buffer and changes it in every forward pass, as a running range does."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Buffer(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.scale.mul_(2)
        return x * x * self.scale


def test_a_buffer_is_read_as_it_was_and_changed_once() -> None:
    net = nn.Sequential(nn.Sequential(Drifting(), Drifting()), nn.Flatten())
    recompute_(net, "stages")
    x = torch.ones(1, 1, requires_grad=True)
    y = net(x)
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    assert [part.scale.item() for part in net.modules() if isinstance(part, Drifting)] == [2, 2]
    assert x.grad is not None
    assert x.grad.item() == 2 * 32  # of y = 2 (2 x^2)^2, twice


def test_less_is_kept_and_evaluation_is_as_ever() -> None:
    images, labels = batch(8)
    kept = {}
    for unit in ("none", "blocks", "stages"):
        net = network("resnet", "xnor", depth=20)
        if unit != "none":
            recompute_(net, unit)  # type: ignore[arg-type]
        kept[unit] = saved_bytes_per_sample(net, images, labels)
        with torch.no_grad():
            assert torch.equal(net.eval()(images), network("resnet", "xnor", depth=20).eval()(images))
    assert kept["blocks"] < 0.3 * kept["none"]
    assert kept["stages"] < 0.15 * kept["none"]


def test_names_and_copies_stay_what_they_were() -> None:
    net = network("resnet", "xnor", depth=20)
    names, kinds = list(net.state_dict()), [type(m).__name__ for m in net.modules()]
    recompute_(net, "blocks")
    assert list(net.state_dict()) == names
    assert [type(m).__name__ for m in net.modules()] == kinds
    copied = copy.deepcopy(net)
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    assert not copied(batch()[0]).any()
    assert net(batch()[0]).any()


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="Sequential has no stages; accepted: none, blocks, stages"):
        recompute_(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), "stages")
    for words, reason in (
        (["trainer.compile=true"], "compiled"),
        (["quant=lsq", "regularizer=rounding_margin"], "twice"),
    ):
        with pytest.raises(ConfigError, match=reason):
            config_from(["dataset=synthetic", "trainer.recompute=blocks", *words])


def test_a_run_is_the_same_run(runner: Runner, tmp_path: Path) -> None:
    """One name, one metrics.csv; only timing.csv says that less was kept."""
    words = [
        "model=resnet",
        "quant=xnor",
        "dataset=synthetic",
        "dataset.samples=64",
        "dataset.test_samples=16",
        "batch_size=16",
    ]
    runs = []
    for unit in ("none", "blocks"):
        keys = [*words, "epochs=1", "trainer.threads=1", "trainer.dashboard=none", f"trainer.recompute={unit}"]
        done = runner(*keys, f"outputs={tmp_path / unit}", timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        (run,) = (tmp_path / unit / "runs").iterdir()
        runs.append(run)
    assert runs[0].name == runs[1].name
    assert (runs[0] / "metrics.csv").read_bytes() == (runs[1] / "metrics.csv").read_bytes()
    base = ["dataset=synthetic", "quant=xnor"]
    hashes = {config_hash(config_from([*base, *more])) for more in ([], ["trainer.recompute=blocks"])}
    assert len(hashes) == 1
    assert config_hash(config_from([*base, "trainer.backward=bf16"])) not in hashes


def test_layers_keep_their_own_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    recompute_(model, "blocks")
    model.train()
    model[1].eval()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert not model[1].training
    assert int(model[1].num_batches_tracked) == 0
