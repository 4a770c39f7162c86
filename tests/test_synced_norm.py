"""Batch norm over all ranks: with one rank it is torch's, value and gradients; with two it is torch's on both halves together."""

import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT

CODE = """
import os, sys, torch, torch.distributed as dist
from torch import nn
from runner.ranks.synced_norm import SyncedBatchNorm, synced_
world, kind, affine = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
torch.set_num_threads(1)
rank = 0 if world == 1 or os.fork() else 1
dist.init_process_group("gloo", init_method="file://" + sys.argv[4], rank=rank, world_size=world)
plain = (nn.BatchNorm1d if kind == "1d" else nn.BatchNorm2d)(3, affine=affine, dtype=torch.float64)
model = nn.Sequential(plain, nn.Identity())
generator = torch.Generator().manual_seed(0)
whole = torch.randn((7, 3) if kind == "1d" else (7, 3, 4, 5), generator=generator, dtype=torch.float64) * 3 + 5
if affine:
    with torch.no_grad():
        plain.weight.copy_(torch.tensor([0.5, -2.0, 1.5])); plain.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
want = whole.clone().requires_grad_()
import copy
native = copy.deepcopy(plain)
native(want).pow(3).sum().backward()
synced_(model, torch.device("cpu"))
assert type(model[0]) is SyncedBatchNorm and list(model.state_dict()) == ["0." + name for name in native.state_dict()]
part = [slice(0, 7)] if world == 1 else [slice(0, 3), slice(3, 7)]
x = whole[part[rank]].clone().requires_grad_()
model(x).pow(3).sum().backward()
torch.testing.assert_close(x.grad, want.grad[part[rank]])
for name, value in native.state_dict().items():
    torch.testing.assert_close(model[0].state_dict()[name], value)
for name, parameter in native.named_parameters():
    mine = dict(model[0].named_parameters())[name].grad.clone()
    dist.all_reduce(mine)
    torch.testing.assert_close(mine, parameter.grad)
torch.testing.assert_close(model.eval()(x), native.eval()(x))
with torch.no_grad():
    torch.testing.assert_close(model.train()(x), native.train()(x))
if world == 2 and rank == 0:
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
"""


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", ["1d", "2d"])
@pytest.mark.parametrize("affine", [True, False])
def test_it_is_batch_norm_of_the_whole_batch(tmp_path: object, world: int, kind: str, affine: bool) -> None:
    command = [sys.executable, "-c", CODE, str(world), kind, str(affine), f"{tmp_path}/store"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_model_keeps_its_parameters() -> None:
    from torch import nn

    from runner.ranks.synced_norm import synced_

    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4)))
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    synced_(model, torch.device("cpu"))
    assert before == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
