"""Health of quantized layers: figures by hand, and alarms that name the layer."""

import math

import pytest
import torch
from torch import nn

from quant.base import find
from quant.surgery import calibrate_, quantize_
from runner.health import alarms, codes_of, gradient_norms, health_rows


def binary() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    quantize_(model, find("xnor")(input_norm="none"))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1, 1, -1], [1, -1, -1, -1]]))
    return model


def test_flips_entropy_and_gradient_norm_are_what_they_say() -> None:
    model = binary()
    before = codes_of(model)
    with torch.no_grad():
        model[0].weight[0, 0] = -1.0
    model(torch.rand(3, 4)).sum().backward()
    (row,) = health_rows(model, torch.rand(3, 4), before, gradient_norms(model), {"0": 0.5})
    assert row["flip_rate"] == 1 / 8
    assert row["code_entropy"] == pytest.approx(-(3 / 8) * math.log2(3 / 8) - (5 / 8) * math.log2(5 / 8))
    assert row["grad_norm"] == pytest.approx(float(model[0].weight.grad.norm()))
    assert row["near_threshold"] == 0.5


def test_looking_at_health_changes_nothing() -> None:
    model = binary().train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    health_rows(model, torch.rand(3, 4), codes_of(model), {}, {})
    assert model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_dead_step_and_a_layer_of_one_code_raise_an_alarm_that_names_them() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    quantize_(model, find("lsq")())
    calibrate_(model, torch.rand(8, 4))
    with torch.no_grad():
        model[0].act_quantizer.step.fill_(-0.1)
        model[0].weight.fill_(1.0)
    said = list(alarms(health_rows(model, torch.rand(3, 4), codes_of(model), {}, {})))
    assert any(line.startswith("0: ") and "steps are dead" in line for line in said)
    assert any(line.startswith("0: ") and "same code" in line for line in said)


def test_a_first_batch_that_does_not_fit_names_the_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    quantize_(model, find("lsq")(act_range="unsigned"))
    with pytest.raises(ValueError, match=r"layer '0': .*act_range"):
        calibrate_(model, torch.randn(8, 4))
