"""Fixed classifiers: their matrices, the formula and its gradient, and that everything else treats them as the last layer."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant.base import find as find_quantizer
from quant.classifier import (
    Fixed,
    FixedConv2d,
    FixedLinear,
    Kind,
    Learned,
    find,
    fix_classifier_,
    hadamard_rows,
    orthonormal_rows,
    unit,
)
from quant.surgery import Rule, quantize_


def net(features: int = 16, classes: int = 4, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, features), nn.ReLU(), nn.Linear(features, classes)).to(dtype)


def pointwise_net() -> nn.Sequential:
    torch.manual_seed(0)
    head = [nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *head)


# ---- matrices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "features"), [(10, 512), (10, 64), (63, 64), (64, 64), (1, 1)])
def test_hadamard_rows_are_orthogonal_at_powers_of_two(classes: int, features: int) -> None:
    h = hadamard_rows(classes, features)
    assert set(h.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(h @ h.T, features * torch.eye(classes))


WIDTHS = [
    (10, 84),
    (10, 500),
    (1000, 2048),
    (7, 7),
    (100, 100),
    (33, 40),
    (100, 84),
    (127, 84),
    (128, 84),
    (8, 5),
    (64, 33),
]


@pytest.mark.parametrize(("classes", "features"), WIDTHS)
def test_hadamard_rows_are_distinct_at_any_width(classes: int, features: int) -> None:
    h = hadamard_rows(classes, features)
    assert h.shape == (classes, features)
    assert len(h.unique(dim=0)) == len(hadamard_rows(classes, features, False).unique(dim=0)) == classes
    assert h.eq(1).all(1).any() == (classes == 1 << (features - 1).bit_length())
    assert (h @ h.T - features * torch.eye(classes)).max() < features
    i, j = torch.meshgrid(torch.arange(1, classes + 1), torch.arange(features), indexing="ij")
    if classes < 1 << (features - 1).bit_length():
        popcount = sum((i & j) >> bit & 1 for bit in range(12))
        assert torch.equal(h, (-1.0) ** popcount)


def test_the_constant_row_would_win_behind_a_relu() -> None:
    features = torch.rand(1000, 64, generator=torch.Generator().manual_seed(0))
    assert (features @ hadamard_rows(10, 64, skip_constant_row=False).T).argmax(1).eq(0).all()
    winners = (features @ hadamard_rows(10, 64).T).argmax(1)
    assert len(winners.unique()) == 10


def test_more_classes_than_different_rows() -> None:
    for features, classes in ((16, 17), (16, 20), (84, 129), (1, 2)):
        with pytest.raises(ValueError, match=rf"rows of {features} features, got {classes} classes.*orthonormal"):
            fix_classifier_(net(features, classes), "hadamard")
    frame = orthonormal_rows(20, 16, seed=0)
    torch.testing.assert_close(frame.T @ frame, torch.eye(16), rtol=1e-5, atol=1e-6)


def test_orthonormal_rows_come_from_their_seed_alone() -> None:
    rows = orthonormal_rows(10, 84, seed=123)
    torch.testing.assert_close(rows @ rows.T, torch.eye(10), rtol=1e-5, atol=1e-6)
    state = torch.get_rng_state()
    assert torch.equal(rows, orthonormal_rows(10, 84, seed=123))
    assert not torch.equal(rows, orthonormal_rows(10, 84, seed=124))
    assert torch.equal(state, torch.get_rng_state())


# ---- formula ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hadamard", "orthonormal"])
def test_forward_and_gradient_are_the_formula(kind: Kind) -> None:
    model = net(dtype=torch.float64)
    fix_classifier_(model, kind)
    layer: Any = model[2]
    nn.init.uniform_(layer.bias)
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 4, dtype=torch.float64)
    y = layer(x)
    y.backward(g)
    matrix, alpha, length = layer.weight, layer.scale, x.norm(dim=1, keepdim=True)
    hat = x / length
    u = g @ matrix
    close: Any = torch.testing.assert_close
    close(y, alpha * hat @ matrix.T + layer.bias, rtol=1e-12, atol=1e-12)
    close(x.grad, alpha * (u - (u * hat).sum(1, keepdim=True) * hat) / length, rtol=1e-12, atol=1e-12)
    close(layer.scale.grad, (g * (hat @ matrix.T)).sum(), rtol=1e-12, atol=1e-12)
    close(layer.bias.grad, g.sum(0), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(layer, (x,))


def test_first_logits_are_those_of_the_papers_code() -> None:
    model = net(features=512, classes=10)
    fix_classifier_(model)
    assert model[2].scale.item() == pytest.approx(1 / math.sqrt(10))
    assert model[2](model[2].weight).diagonal().tolist() == pytest.approx([math.sqrt(512 / 10)] * 10, rel=1e-5)
    orthonormal = net(features=512, classes=10)
    fix_classifier_(orthonormal, "orthonormal")
    assert orthonormal[2].scale.item() == 10


def test_a_convolution_classifies_every_pixel() -> None:
    model = pointwise_net()
    assert fix_classifier_(model) == "2"
    x = torch.randn(2, 8, 3, 3)
    layer = model[2]
    assert isinstance(layer, FixedConv2d)
    expected = torch.einsum("bchw,oc->bohw", F.normalize(x, dim=1), layer.weight.flatten(1)) * layer.scale
    torch.testing.assert_close(layer(x), expected)
    assert model(torch.randn(2, 3, 6, 6)).shape == (2, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e4, 1e30])
def test_unit_length_of_anything(size: float, dtype: torch.dtype) -> None:
    x = (size * torch.randn(4, 16).clamp(-3, 3)).to(dtype).requires_grad_()
    if not x.isfinite().all():
        pytest.skip("half has no such number")
    y = unit(x, 1)
    y.backward(torch.ones_like(y))
    length = torch.ones(4) if x.any() else torch.zeros(4)
    torch.testing.assert_close(y.float().norm(dim=1), length, rtol=1e-2, atol=0)
    assert x.grad is not None
    assert not x.grad.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "x", [(1, 0, 0), (-3, 0, 0), (1, 1e-9, 0), (1e30, 0, 0), (1e30, 1, 2), (0.6, 0, 0.8), (1, 2, 3)]
)
def test_the_gradient_has_nothing_along_the_input(x: tuple[float, ...], dtype: torch.dtype) -> None:
    """Also where one feature is all of the length, so that the rest does not show in it."""
    v, g = torch.tensor([x], dtype=dtype, requires_grad=True), torch.tensor([[0.3, -0.7, 0.2]], dtype=dtype)
    unit(v, 1).backward(g)
    assert v.grad is not None
    length = v.detach().double().norm()
    hat = v.detach().double() / length
    want = g.double() - (g.double() * hat).sum() * hat
    torch.testing.assert_close(v.grad.double() * length, want, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_a_zero_sample_gives_the_bias() -> None:
    model = net()
    fix_classifier_(model)
    x = torch.zeros(1, 16, requires_grad=True)
    y = model[2](x)
    y.sum().backward()
    assert torch.equal(y[0], model[2].bias)
    assert x.grad is not None
    assert x.grad.isfinite().all()


# ---- place --------------------------------------------------------------------------------------------------------------


def test_only_scale_and_bias_are_learned_and_stored() -> None:
    model = net()
    before = set(model.state_dict())
    fix_classifier_(model)
    assert {n for n, _ in model[2].named_parameters()} == {"scale", "bias"}
    assert set(model.state_dict()) == before - {"2.weight"} | {"2.scale"}
    twin = net()
    fix_classifier_(twin)
    twin.load_state_dict(model.state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(twin(x), model(x))
    assert model.double()(x.double()).dtype == torch.float64


def test_quantizers_see_it_as_the_last_layer_and_leave_it() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
    )
    Fixed().apply_(model)
    rows = quantize_(model, find_quantizer("8bit-rangebn")(), [Rule(match=["last"], settings={"weight_bits": 4})])
    assert [(row.kind, row.becomes) for row in rows] == [
        ("Conv2d", "EightBitConv2d"),
        ("Conv2d", "EightBitConv2d"),
        ("FixedLinear", "kept"),
    ]
    model(torch.randn(2, 3, 8, 8)).sum().backward()


def test_the_config_names() -> None:
    model, x = net(), torch.randn(2, 8)
    expected = model(x)
    find("learned")().apply_(model)
    assert torch.equal(model(x), expected)
    find("fixed")(kind="orthonormal", scale=3.0, seed=5).apply_(model)
    assert isinstance(model[2], FixedLinear)
    assert model[2].scale.item() == 3
    assert find("learned") is Learned
    with pytest.raises(ValueError, match="fixed, learned"):
        find("fixd")


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(4, 4), nn.Conv2d(3, 8, 3)),
        nn.Sequential(nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)),
    ],
)
def test_what_cannot_be_fixed_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"last (matrix|linear) layer"):
        fix_classifier_(model)


def test_it_learns_and_compiles() -> None:
    model = net(features=32)
    fix_classifier_(model)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    labels = x[:, :4].argmax(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for _ in range(200):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    y: Tensor = compiled(x)
    torch.testing.assert_close(y, model(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).isfinite().all()
