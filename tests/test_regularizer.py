"""The rounding margin against its formula, and what the contract of a regularizer promises to the training loop."""

import copy

import pytest
import torch
from torch import Tensor, nn

from quant.learned_step import lsq_quantize
from quant.lsq import Lsq
from quant.regularizer import NoRegularizer, Penalty, RoundingMargin, find, rounding_margin
from quant.surgery import calibrate_, quantize_
from quant.xnor import Xnor

QN, QP = 4, 3


def by_definition(v: Tensor, step: float, margin: float) -> Tensor:
    """Hinge on the distance to the nearest of the thresholds that there are, listed one by one."""
    thresholds = torch.arange(-QN, QP, dtype=v.dtype) + 0.5
    distance = (v[..., None] / step - thresholds).abs().amin(-1)
    return (margin - distance).clamp_min(0).square().mean()


@pytest.mark.parametrize("margin", [0.1, 0.25, 0.5])
def test_value_and_gradient_are_those_of_the_formula(margin: float) -> None:
    torch.manual_seed(0)
    v = torch.randn(50, 40, dtype=torch.float64).mul(1.2).requires_grad_()
    loss, share = rounding_margin(v, torch.tensor(0.3, dtype=torch.float64), QN, QP, margin)
    want = by_definition(v, 0.3, margin)
    (got_grad,), (want_grad,) = torch.autograd.grad(loss, v), torch.autograd.grad(want, v)
    u = v.detach() / 0.3
    inside = (u > -QN) & (u < QP)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-10, atol=1e-15)
    beyond = u - u.floor() - 0.5
    closed = -2 * (margin - beyond.abs()).clamp_min(0) * beyond.sign() / v.numel() / 0.3
    torch.testing.assert_close(got_grad, torch.where(inside, closed, 0.0), rtol=1e-10, atol=1e-15)
    assert share.item() == pytest.approx(((beyond.abs() < margin) & inside).double().mean().item(), abs=1e-6)


def test_half_a_step_is_the_dampening_loss() -> None:
    """arXiv 2203.11086: ||s w_int - clip(w, -s Qn, s Qp)||^2 with its target detached, here in steps and as a mean."""
    torch.manual_seed(0)
    w, step = torch.randn(64, 9, dtype=torch.float64).mul(1.5).requires_grad_(), torch.tensor(0.37, dtype=torch.float64)
    target = lsq_quantize(w, step, QN, QP).detach()
    dampening = (target - w.clamp(-QN * step, QP * step)).square().sum() / step**2 / w.numel()
    loss, _ = rounding_margin(w, step, QN, QP, margin=0.5)
    torch.testing.assert_close(loss, dampening, rtol=1e-12, atol=0)
    for got, want in zip(torch.autograd.grad(loss, w), torch.autograd.grad(dampening, w), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-15)


def test_the_sign_has_one_threshold() -> None:
    """For binary layers: mean max(0, m - |y|)^2."""
    y = torch.linspace(-2, 2, 401, dtype=torch.float64, requires_grad=True)
    loss, _ = rounding_margin(y, torch.ones((), dtype=torch.float64), 0, 1, 0.25, offset=-0.5)
    want = (0.25 - y.abs()).clamp_min(0).square().mean()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, y)[0], torch.autograd.grad(want, y)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    v = torch.randn(100_000).to(dtype).requires_grad_()
    loss, _ = rounding_margin(v, torch.tensor(0.3), QN, QP)
    (loss * 2**14).backward()  # as a gradient scaler does
    want = v.detach().float().requires_grad_()
    (rounding_margin(want, torch.tensor(0.3), QN, QP)[0] * 2**14).backward()
    torch.testing.assert_close(v.grad.float(), want.grad, rtol=1e-2, atol=1e-4)


def net(quantizer: Lsq | Xnor) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)
    )
    quantize_(model, quantizer)
    calibrate_(model, IMAGES)
    return model


IMAGES = torch.randn(8, 2, 8, 8, generator=torch.Generator().manual_seed(1))


COARSE = {
    "v3": Lsq(act_bits=2, weight_bits=8),
    "plain": Lsq(preset="plain", act_bits=3, weight_bits=8),
    "plus": Lsq(preset="plus", act_bits=2, weight_bits=8),
    "xnor": Xnor(),
}


@pytest.mark.parametrize("name", COARSE)
def test_partial_sums_move_away_from_the_thresholds(name: str) -> None:
    model = net(COARSE[name])
    penalty = RoundingMargin(weight=10.0, margin=0.2).attach(model)
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if "quantizer" not in n], 1e-2)
    losses, shares = [], []
    for _ in range(50):
        model(IMAGES)
        loss = penalty.value()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        shares.append(sum(penalty.figures().values()))
    assert losses[-1] < 0.7 * losses[0]
    assert shares[-1] < 0.85 * shares[0]


def test_images_are_no_partial_sums() -> None:
    model = net(Lsq())
    penalty = RoundingMargin().attach(model)
    model(IMAGES)
    penalty.value()
    assert set(penalty.figures()) == {"3", "6"}


def test_weights() -> None:
    model = net(Lsq(weight_bits=3))
    penalty = RoundingMargin(weight=2.0, margin=0.5, target="weights").attach(model)
    model(IMAGES)
    got, want = penalty.value(), torch.zeros(())
    for layer in (model[0], model[3], model[6]):
        w, part = layer.weight, layer.weight_quantizer
        u = (w / part.step.detach()).clamp(-4, 3)
        want = want + 2 * (u - u.round().detach()).square().mean()
    torch.testing.assert_close(got, want)


def test_the_penalty_forgets_scales_and_lets_go() -> None:
    model = net(Lsq())
    penalty = RoundingMargin(weight=0.1).attach(model)
    model(IMAGES)
    first = penalty.value().item()
    assert first > 0
    assert penalty.value().item() == 0
    penalty.weight = 0.2
    model(IMAGES)
    assert penalty.value().item() == pytest.approx(2 * first, rel=1e-5)
    figures = penalty.figures()
    assert all(0 < share < 1 for share in figures.values())
    assert penalty.figures() == {}
    with torch.no_grad():
        model(IMAGES)
    model.eval()(IMAGES)
    copy.deepcopy(model)(IMAGES)
    assert penalty.value().item() == 0
    penalty.remove()
    model.train()(IMAGES)
    assert penalty.value().item() == 0


def test_steps_get_nothing_from_the_penalty() -> None:
    model = net(Lsq())
    penalty = RoundingMargin(weight=1.0).attach(model)
    model(IMAGES)
    penalty.value().backward()
    assert model[6].act_quantizer.step.grad is None
    assert model[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("quantizer", [Lsq(), Xnor()], ids=["lsq", "xnor"])
def test_compiled_models_are_watched_too(quantizer: Lsq | Xnor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3))
    quantize_(model, quantizer)
    calibrate_(model, IMAGES)
    penalty = RoundingMargin(weight=1.0).attach(model)
    model(IMAGES)
    want = penalty.value()
    torch.compile(model, backend="aot_eager", fullgraph=True)(IMAGES)
    got = penalty.value()
    torch.testing.assert_close(got, want)
    got.backward()
    assert model[0].weight.grad.abs().sum() > 0


def test_refusals() -> None:
    with pytest.raises(ValueError, match="accepted: quant=lsq"):
        RoundingMargin().attach(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no weights that are rounded"):
        RoundingMargin(target="weights").attach(net(Xnor()))
    with pytest.raises(ValueError, match="Did you mean 'rounding_margin'"):
        find("rounding_margins")


def test_none_asks_nothing() -> None:
    penalty = NoRegularizer().attach(nn.Linear(2, 2))
    assert type(penalty) is Penalty
    assert (penalty.value().item(), penalty.figures()) == (0.0, {})
    penalty.remove()
