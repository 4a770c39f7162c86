"""What a network is said to cost, counted a second time by hand."""

import torch

from runner.build import build
from runner.compose import config_from
from runner.cost import Cost, cost_of

CONV2, FC1 = 20 * 50 * 5 * 5, 50 * 4 * 4 * 500  # weights of the two layers of LeNet-5 that are rewritten


def lenet5(quant: str) -> Cost:
    config = config_from([f"quant={quant}", "dataset=synthetic"])
    model = build(config, in_channels=1, num_classes=10, image_size=28).model
    return cost_of(model, torch.randn(1, 1, 28, 28))


def test_products_are_counted_by_their_kind() -> None:
    ends = 20 * 24 * 24 * 25 + 500 * 10  # first and last layer
    inner = 50 * 8 * 8 * 20 * 25 + FC1
    assert lenet5("none").macs == {"float": ends + inner, "int": 0, "binary": 0}
    assert lenet5("xnor").macs == {"float": ends, "int": 0, "binary": inner}
    assert lenet5("bwn").macs == {"float": ends + inner, "int": 0, "binary": 0}
    assert lenet5("lsq").macs == {"float": 0, "int": ends + inner, "binary": 0}


def test_packed_weights_take_their_bits_and_all_else_its_floats() -> None:
    plain, binary = lenet5("none"), lenet5("xnor")
    assert plain.packed_bytes == plain.float_bytes == 4 * (431_080 + 2 * 20)  # parameters, running statistics
    own_norms = 4 * 20 + 4 * 800  # of the inputs of both layers: weight, bias and running statistics
    assert binary.float_bytes == plain.float_bytes + 4 * own_norms
    assert binary.packed_bytes == binary.float_bytes - 4 * (CONV2 + FC1) + (CONV2 + FC1) // 8
