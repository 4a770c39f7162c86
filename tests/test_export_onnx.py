"""ONNX files hold standard operators only, and onnxruntime computes with them what was trained."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_nets import Woven, after_two_steps, dilated
from torch import nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from quant.ternary import ternary_codes  # noqa: E402
from quant.uniform import fake_quantize  # noqa: E402
from runner.export.onnx import onnx_bytes, session  # noqa: E402  (only where both are installed)

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("lenet5", "none", {}), ("lenet5", "xnor", {}), ("lenet5", "xnor", {"input_scale": True}),
    ("lenet5", "xnor", {"binary_activations": False}), ("lenet5", "xnor", {"binary_weights": False}),
    ("lenet5", "lsq", {}), ("lenet5", "lsq", {"preset": "plus"}),
    ("lenet5", "lsq", {"preset": "plain", "weight_bits": 3}), ("lenet5", "lsq", {"weight_steps": "channel"}),
    ("lenet5", "8bit-rangebn", {}), ("lenet5", "8bit-rangebn", {"zero_exact": False}), ("lenet5", "dorefa", {}),
    ("lenet5", "ternary", {}), ("resnet", "xnor", {}), ("resnet", "lsq", {}), ("nin", "xnor", {}),
]  # fmt: skip


def exported(
    model: str, quant: str, settings: dict[str, Any]
) -> tuple[nn.Module, bytes, torch.Tensor, tuple[str, ...]]:
    """A network after two steps, its file, and images for it."""
    channels, size = (1, 28) if model == "lenet5" else (3, 16)
    net = after_two_steps(model, quant, size, channels, **settings)
    content, remarks = written(net, channels, size, model, quant)
    return net, content, torch.randn(16, channels, size, size), remarks


def written(
    net: nn.Module, channels: int, size: int, model: str = "made", quant: str = "none"
) -> tuple[bytes, tuple[str, ...]]:
    """The file of a network, and what is said about it."""
    data = SimpleNamespace(in_channels=channels, classes=tuple("0123456789"), mean=(0.0,), std=(1.0,))
    config = SimpleNamespace(model=SimpleNamespace(name=model), quant=SimpleNamespace(name=quant))
    stored: Any = SimpleNamespace(model=net.eval(), sizes={"input_size": size}, data=data, config=config)
    return onnx_bytes(stored)


@pytest.mark.parametrize(("model", "quant", "settings"), CASES, ids=str)
def test_onnxruntime_computes_what_was_trained(model: str, quant: str, settings: dict[str, Any]) -> None:
    net, content, images, _ = exported(model, quant, settings)
    with torch.no_grad():
        expected = net(images)
    found = session(content)(images)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert {node.domain for node in onnx.load_from_string(content).graph.node} == {""}


def test_weights_are_stored_at_few_bits() -> None:
    _, four, _, _ = exported("lenet5", "lsq", {})
    _, eight, _, _ = exported("lenet5", "8bit-rangebn", {})
    types = [{c.name: c.data_type for c in onnx.load_from_string(f).graph.initializer} for f in (four, eight)]
    kinds = onnx.TensorProto
    assert types[0]["conv2.weight_codes"] == kinds.INT4
    assert types[1]["conv2.weight_codes"] == kinds.INT8
    assert len(four) < 431_080 * 0.55
    assert len(eight) < 431_080 * 1.05


def test_codes_and_zero_points_give_back_the_trained_weight() -> None:
    for quant, settings in (("lsq", {"preset": "v1"}), ("8bit-rangebn", {}), ("ternary", {})):
        net, content, _, _ = exported("lenet5", quant, settings)
        constants = {c.name: onnx.numpy_helper.to_array(c) for c in onnx.load_from_string(content).graph.initializer}
        codes, zero, step = (constants[f"conv2.weight_{part}"].astype(np.float32) for part in ("codes", "zero", "step"))
        value = (codes - zero.reshape(-1, 1, 1, 1)) * step.reshape(-1, 1, 1, 1)
        own: Any = net.get_submodule("conv2")
        if quant == "lsq":
            expected = own.weight_quantizer(own.weight)
        elif quant == "ternary":
            signs, alpha = ternary_codes(own.weight, own.settings.threshold, own.settings.scale)
            expected = alpha * signs
        else:
            expected = fake_quantize(own.weight, own._weight_grid(), 8)
        assert np.allclose(value, expected.detach().numpy(), rtol=1e-6, atol=1e-8)


def test_the_sign_of_zero_is_plus_one() -> None:
    """Zeros stand in front of the sign wherever a ReLU was, if no normalisation moves them."""
    net, content, _, _ = exported("lenet5", "xnor", {"input_norm": "none"})
    images = torch.zeros(4, 1, 28, 28)
    with torch.no_grad():
        assert torch.allclose(session(content)(images), net(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"input_scale": True}], ids=str)
@pytest.mark.parametrize("padding", [0, 2, 3])
def test_a_dilated_window_stays_dilated(settings: dict[str, Any], padding: int) -> None:
    net, images = dilated("xnor", padding, **settings), torch.randn(2, 4, 12, 12)
    with torch.no_grad():
        assert torch.allclose(session(written(net, 4, 12)[0])(images), net(images), rtol=1e-4, atol=1e-5)


def test_grids_without_an_integer_zero_point_are_named() -> None:
    _, _, _, remarks = exported("lenet5", "lsq", {"preset": "plus"})
    assert any(remark.startswith("conv2.input: its grid has no integer zero point") for remark in remarks)


def test_a_value_that_is_read_twice_stays_at_its_places() -> None:
    torch.manual_seed(0)
    net, images = Woven(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(session(written(net, 3, 8)[0])(images), net(images), rtol=1e-4, atol=1e-5)
