"""LSQ against its golden numbers, against float64 autograd of its formula, and in everything a layer of ours must stand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant.base import find
from quant.learned_step import SMALLEST_STEP, StepQuantizer, StepSettings, levels, lsq_quantize
from quant.lsq import PRESETS, Lsq, LsqActivation, LsqConv2d
from quant.lsq_init import least_squares, mean_absolute
from quant.surgery import Rule, calibrate_, health, quantize_

GOLDEN = Path(__file__).parent / "golden"
BITS = (2, 3, 4, 8)


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.tensor(file[key]) for key in file}


def equal(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def by_definition(
    v: Tensor,
    step: Tensor,
    qn: int,
    qp: int,
    offset: Tensor | float = 0.0,
    scale: float = 1.0,
    passthrough: bool = False,
) -> Tensor:
    """The formula with detached straight-through parts, for autograd; the mask is written out, strictly inside."""
    step = (step - step * scale).detach() + step * scale
    if isinstance(offset, Tensor):
        offset = (offset - offset * scale).detach() + offset * scale
    u = (v - offset) / step
    inside = ((u > -qn) & (u < qp)).detach()
    clipped = torch.where(inside, u, u.clamp(-qn, qp).detach())
    code = clipped + (clipped.round() - clipped).detach()
    v_q = code * step + offset
    return v_q + torch.where(inside, 0.0, v - v.detach()) if passthrough else v_q


def gradients(function: Any, g: Tensor, *leaves: Tensor) -> list[Tensor]:
    leaves = tuple(t.detach().clone().requires_grad_() for t in leaves)
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, g)]


# ---- golden numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["unsigned", "signed"])
def test_paper(bits: int, kind: str) -> None:
    """Eq. 1 to 5, the first step, and the gradient scale, which touches nothing but the step's gradient."""
    numbers = golden("lsq_paper")
    v, g, step, want_y, want_v, want_plain, want_scaled = (
        numbers[f"{key}_{bits}_{kind}"]
        for key in ("v", "grad_output", "step_init", "y", "grad_v", "grad_step_unscaled", "grad_step")
    )
    qn, qp = levels(kind, bits)
    assert equal(mean_absolute(v.view(1, -1), qp)[0], step)
    for scale, want in ((1.0, want_plain), ((v.numel() * qp) ** -0.5, want_scaled)):
        y, dv, ds = gradients(lambda v, s, c=scale: lsq_quantize(v, s, qn, qp, grad_scale=c), g, v, step.view(1))
        assert equal(y, want_y)
        assert equal(dv, want_v)
        assert equal(ds[0], want)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("name", "passthrough"), [("lsq_seed_activation", False), ("lsq_seed_weight", True)])
def test_plain_port(bits: int, name: str, passthrough: bool) -> None:
    numbers = golden(name)
    x, s, g, want_y, want_x, want_s = (
        numbers[f"{key}_{bits}"] for key in ("x", "s", "grad_output", "y", "grad_x", "grad_s")
    )
    qn, qp = levels("symmetric", bits)
    y, dx, ds = gradients(lambda x, s: lsq_quantize(x, s, qn, qp, passthrough=passthrough), g, x, s)
    assert equal(y, want_y)
    assert equal(dx, want_x)
    assert equal(ds, want_s)
    assert equal(lsq_quantize(x, -s, qn, qp), y)  # symmetric levels do not see the sign of the step


# ---- the gradient -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unsigned", "signed", "symmetric"])
@pytest.mark.parametrize("passthrough", [False, True])
@pytest.mark.parametrize("shape", [(1,), (6, 1, 1)])
def test_gradient_is_that_of_the_formula(kind: str, passthrough: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    v, g = torch.randn(2, 6, 5, 4, dtype=torch.float64), torch.randn(2, 6, 5, 4, dtype=torch.float64)
    step, offset = torch.rand(shape, dtype=torch.float64) + 0.2, torch.randn(shape, dtype=torch.float64)
    qn, qp = levels(kind, 3)
    arguments: dict[str, Any] = {"passthrough": passthrough}
    got = gradients(lambda v, s: lsq_quantize(v, s, qn, qp, grad_scale=0.3, **arguments), g, v, step)
    want = gradients(lambda v, s: by_definition(v, s, qn, qp, scale=0.3, **arguments), g, v, step)
    assert all(map(equal, got, want))
    got = gradients(lambda v, s, b: lsq_quantize(v, s, qn, qp, offset=b, grad_scale=0.3), g, v, step, offset)
    want = gradients(lambda v, s, b: by_definition(v, s, qn, qp, offset=b, scale=0.3), g, v, step, offset)
    assert all(map(equal, got, want))


def test_branches_at_their_edges() -> None:
    """On the edge itself v counts as clipped: no gradient for v, the whole code for the step."""
    qn, qp, eps = 2, 3, 1e-9
    u = torch.tensor([qp, qp - eps, qp + eps, qp - 0.3, -qn, -qn + eps, -qn - eps, 0.5, 1.5], dtype=torch.float64)
    want_v = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 1], dtype=torch.float64)
    want_s = torch.tensor([3, eps, 3, 0.3, -2, -eps, -2, -0.5, 0.5], dtype=torch.float64)
    v = u.clone().requires_grad_()
    step = torch.ones(9, dtype=torch.float64, requires_grad=True)  # a step for each value shows each branch
    lsq_quantize(v, step, qn, qp).sum().backward()
    assert equal(v.grad, want_v)
    assert torch.allclose(step.grad, want_s, atol=1e-12)


def test_offset_learns_from_clipped_values_only() -> None:
    v = torch.tensor([-1.0, 0.6, 1.1, 9.0])
    offset = torch.tensor([0.5], requires_grad=True)
    y = lsq_quantize(v, torch.tensor([0.5]), 0, 3, offset=offset)
    assert torch.autograd.grad(y, offset, torch.tensor([1.0, 10.0, 100.0, 1000.0]))[0].item() == 1001.0
    assert y.tolist() == [0.5, 0.5, 1.0, 2.0]


def test_unsigned_zero_is_on_the_edge() -> None:
    """Half of all values behind a ReLU are 0 = -Qn: they take the clipped branch, whose step gradient is 0."""
    v, step = torch.zeros(4, requires_grad=True), torch.tensor([0.5], requires_grad=True)
    lsq_quantize(v, step, 0, 3).sum().backward()
    assert v.grad.tolist() == [0.0] * 4
    assert step.grad.item() == 0.0


# ---- first steps --------------------------------------------------------------------------------------------------------


def test_least_squares_beats_every_step_of_a_fine_grid() -> None:
    torch.manual_seed(0)
    for rows, qn, qp in ((torch.randn(3, 4000).abs(), 0, 3), (torch.randn(3, 4000), 4, 3), (torch.rand(3, 500), 1, 1)):
        rows = rows.double()

        def error(step: Tensor, rows: Tensor = rows, qn: int = qn, qp: int = qp) -> Tensor:
            return (lsq_quantize(rows, step[:, None], qn, qp) - rows).square().mean(1)

        grid = torch.stack(
            [error(torch.full((3,), s, dtype=torch.float64)) for s in torch.linspace(0.02, 3, 600).tolist()]
        )
        assert (error(least_squares(rows, qn, qp, False)[0]) <= grid.amin(0) * 1.001).all()


def test_an_offset_lowers_the_error() -> None:
    rows = F.silu(torch.linspace(-4, 4, 3000, dtype=torch.float64)).view(1, -1)
    step, _ = least_squares(rows, 4, 3, False)
    shifted, beta = least_squares(rows, 0, 7, True)
    plain = (lsq_quantize(rows, step, 4, 3) - rows).square().mean()
    better = (lsq_quantize(rows, shifted, 0, 7, offset=beta) - rows).square().mean()
    assert better < 0.6 * plain


def least_error(v: Tensor, kind: Any, bits: int) -> float:
    qn, qp = levels(kind, bits)
    step = least_squares(v, qn, qp, False)[0]
    return (lsq_quantize(v, step, qn, qp) - v).square().mean().item()


@pytest.mark.parametrize(
    ("bits", "symmetric", "unsigned"), [(2, 0.0951, 0.0234), (3, 0.0234, 0.0064), (4, 0.0064, 0.0018)]
)
def test_symmetric_levels_lose_one_bit_behind_a_relu(bits: int, symmetric: float, unsigned: float) -> None:
    """The least squared error on ReLU(N(0, 1)): `plain` at b bits is `v3` at b - 1."""
    quantiles = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    v = torch.relu(torch.erfinv(2 * quantiles - 1) * 2**0.5).view(1, -1)
    assert least_error(v, "symmetric", bits) == pytest.approx(symmetric, abs=1e-4)
    assert least_error(v, "unsigned", bits) == pytest.approx(unsigned, abs=1e-4)
    assert least_error(v, "symmetric", bits + 1) == pytest.approx(least_error(v, "unsigned", bits))


def test_first_steps_of_weights() -> None:
    torch.manual_seed(0)
    old = nn.Conv2d(4, 6, 3)
    w = old.weight.detach().clone()
    step = {
        init: Lsq(step_init=init, weight_bits=3).layer(old).weight_quantizer.step.item()
        for init in ("lsq", "lsq+", "const")
    }
    assert step["lsq"] == pytest.approx(2 * w.abs().mean().item() / 3**0.5)
    three = 3 * w.std(correction=0)
    assert step["lsq+"] == pytest.approx(max((w.mean() - three).abs(), (w.mean() + three).abs()).item() / 4)
    assert step["const"] == 1.0
    rows = Lsq(weight_steps="channel").layer(old).weight_quantizer.step
    assert rows.shape == (6, 1, 1, 1)
    assert torch.allclose(rows.flatten(), 2 * w.abs().flatten(1).mean(1) / 7**0.5)


# ---- calibration --------------------------------------------------------------------------------------------------------


def activations(**settings: Any) -> StepQuantizer:
    return StepQuantizer(Lsq(**settings).for_activations(), (1,), torch.empty(0))


def test_sign_is_found_and_kept() -> None:
    part = activations(act_bits=3)
    part.calibrate_(torch.tensor([0.0, 1.0]))
    assert (int(part.qn), int(part.qp)) == (0, 7)
    part.calibrate_(torch.tensor([-0.1, 1.0]))
    assert (int(part.qn), int(part.qp)) == (4, 3)
    other = activations(act_bits=3)
    other.load_state_dict(part.state_dict())
    assert (int(other.qn), int(other.qp)) == (4, 3)


def test_unsigned_refuses_negative_input_and_then_counts_it() -> None:
    part = activations(act_range="unsigned")
    with pytest.raises(ValueError, match="act_range: auto, signed"):
        part.calibrate_(torch.tensor([-0.5, 1.0]))
    part.calibrate_(torch.tensor([0.5, 1.0]))
    assert part.health(torch.tensor([-0.5, 1.0]))["negative_ratio"] == 0.5
    activations(preset="plus").calibrate_(torch.tensor([-0.5, 1.0]))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("param", ["raw", "softplus"])
@pytest.mark.parametrize("init", ["lsq", "lsq+", "mse", "const"])
def test_odd_first_batches(preset: str, param: str, init: str) -> None:
    for x in (
        torch.zeros(4, 3),
        torch.full((4, 3), 2.5),
        torch.rand(4, 3) * 1e30,
        torch.rand(4, 3) * 1e-30,
        torch.empty(0, 3),
    ):
        part = activations(preset=preset, step_param=param, step_init=init)
        part.calibrate_(x)
        assert part.size().item() > SMALLEST_STEP
        assert part(x).isfinite().all()


def test_a_batch_of_zeros_gives_levels_up_to_one() -> None:
    part = activations(act_bits=2)
    part.calibrate_(torch.zeros(4, 3))
    assert part.size().item() == pytest.approx(1 / 3)


def test_softplus_holds_the_same_first_step() -> None:
    x = torch.rand(64, 8)
    raw, soft = activations(), activations(step_param="softplus")
    raw.calibrate_(x)
    soft.calibrate_(x)
    assert soft.size().item() == pytest.approx(raw.size().item(), rel=1e-5)
    soft(x).sum().backward()
    raw(x).sum().backward()
    assert soft.step.grad.item() == pytest.approx(raw.step.grad.item() * torch.sigmoid(soft.step).item(), rel=1e-4)


@pytest.mark.parametrize("x", [torch.tensor([[float("nan"), 1.0]]), torch.full((2, 2), 6e4, dtype=torch.float16)])
def test_a_first_batch_without_a_step_is_refused(x: Tensor) -> None:
    part = activations(act_bits=2).to(x.dtype)
    with pytest.raises(ValueError, match="not finite, or too large"):
        part.calibrate_(x)


@pytest.mark.parametrize("bad", [0.0, -0.3])
def test_a_dead_step_is_held_counted_and_may_come_back(bad: float) -> None:
    part, x = activations(), torch.rand(16, 4, requires_grad=True)
    part.calibrate_(x)
    with torch.no_grad():
        part.step.fill_(bad)
    y = part(x)
    y.backward(-torch.ones_like(y))
    assert y.isfinite().all()
    assert y.abs().max() < 1e-6
    assert part.step.grad.item() < 0  # descent makes the step larger again
    figures = part.health(x.detach())
    assert figures["dead_steps"] == 1.0
    assert figures["step_size"] == pytest.approx(bad)


# ---- settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["weight_bits", "act_bits"])
def test_bits(key: str) -> None:
    with pytest.raises(ValueError, match="quant=xnor"):
        Lsq(**{key: 1})
    with pytest.raises(ValueError, match="2 to 8"):
        Lsq(**{key: 9})


def test_presets_are_sets_of_switches() -> None:
    plain = Lsq(preset="plain").switches
    assert (plain.act_range, plain.weight_ste, plain.grad_scale, plain.placement) == (
        "symmetric", "passthrough", "none", "post_act",
    )  # fmt: skip
    assert Lsq(preset="plain", weight_range="full").switches.weight_range == "full"
    assert Lsq(preset="plain", grad_scale_batch=True).switches.grad_scale_batch
    with pytest.raises(ValueError, match="accepted: v3, v1, plain, plus"):
        Lsq(preset="v2")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "count"), [({}, 12 * 15), ({"grad_scale_batch": True}, 4 * 12 * 15), ({"grad_scale": "1/sqrt_n"}, 12)]
)
def test_gradient_scale_counts_features(settings: dict[str, Any], count: int) -> None:
    x = torch.rand(4, 12)
    scaled, plain = activations(**settings), activations(grad_scale="none")
    for part in (scaled, plain):
        part.calibrate_(x)
        part(x).sum().backward()
    assert scaled.step.grad.item() == pytest.approx(plain.step.grad.item() / count**0.5, rel=1e-5)


# ---- layers -------------------------------------------------------------------------------------------------------------


def net(**settings: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, stride=2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 5),
    )  # fmt: skip
    ends = Rule(match=["first", "last"], settings={"weight_bits": 8, "act_bits": 8})
    quantize_(model, find("lsq")(**settings), [ends])
    return model


IMAGES, LABELS = torch.randn(8, 2, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 5


def test_placement_decides_who_quantizes() -> None:
    inside, behind = net(), net(preset="plain", act_bits=3)
    expected = [LsqConv2d, nn.BatchNorm2d, nn.ReLU, LsqConv2d, nn.ReLU]
    assert all(isinstance(m, kind) for m, kind in zip(inside[:5], expected, strict=True))
    expected[2] = expected[4] = LsqActivation
    assert all(isinstance(m, kind) for m, kind in zip(behind[:5], expected, strict=True))
    assert (inside[0].precision.act, behind[0].precision.act, behind[2].precision.act) == (8, 32, 3)


def test_both_placements_compute_the_same() -> None:
    """ReLU - conv: behind the ReLU and before the convolution are one place, in forward and backward."""
    results = []
    for placement in ("layer_input", "post_act"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.ReLU(), nn.Conv2d(2, 3, 3))
        quantize_(model, Lsq(placement=placement, act_bits=3))
        calibrate_(model, IMAGES)
        x = IMAGES.clone().requires_grad_()
        y = model(x)
        y.square().sum().backward()
        part = model[0].act_quantizer if placement == "post_act" else model[1].act_quantizer
        results.append([y, x.grad, model[1].weight.grad, part.step.grad])
    assert all(
        torch.allclose(*pair, rtol=1e-4, atol=1e-4) for pair in zip(*results, strict=True)
    )  # whole numbers round less


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_layers_are_the_formula(preset: str, bits: int) -> None:
    """y, dx, dw, db, ds of a layer, in float64, against plain autograd through the defining formula."""
    torch.manual_seed(0)
    settings = Lsq(preset=preset, weight_bits=bits, act_bits=bits, placement="layer_input")
    layer = settings.layer(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2).double())
    x = torch.relu(torch.randn(3, 4, 7, 7, dtype=torch.float64)).requires_grad_()
    layer.calibrate_(x)
    y = layer(x)
    g = torch.randn_like(y)
    a, w = layer.act_quantizer, layer.weight_quantizer
    leaves = [x, layer.weight, layer.bias, a.step, w.step, *([a.offset] if a.offset is not None else [])]
    got = torch.autograd.grad(y, leaves, g)

    (an, ap), (wn, wp) = [(int(part.qn), int(part.qp)) for part in (a, w)]
    scales = [1.0, 1.0] if preset == "plain" else [(x[0].numel() * ap) ** -0.5, (layer.weight.numel() * wp) ** -0.5]
    x_q = by_definition(x, a.size(), an, ap, 0.0 if a.offset is None else a.offset, scales[0])
    w_q = by_definition(layer.weight, w.size(), wn, wp, scale=scales[1], passthrough=preset == "plain")
    want_y = F.conv2d(x_q, w_q, layer.bias, 2, 1, 1, 2)
    assert equal(y, want_y)
    assert all(map(equal, got, torch.autograd.grad(want_y, leaves, g)))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("preset", ["v3", "plus"])
def test_remembered_codes_are_the_input(bits: int, preset: str) -> None:
    torch.manual_seed(0)
    for x in (torch.randn(3, 5, 4, 7), torch.randn(3, 5, 4, 7).to(memory_format=torch.channels_last), torch.rand(7, 9)):
        part = activations(act_bits=bits, preset=preset)
        part.calibrate_(x)
        x_q = part(x).detach()
        codec = part.codec(x_q)
        saved = codec.encode(x_q)
        assert torch.equal(codec.decode(*saved), x_q)
        assert saved[0].numel() == -(-x.numel() // {2: 4, 3: 2, 4: 2}.get(bits, 1))


@pytest.mark.parametrize("preset", PRESETS)
def test_training_lowers_the_loss_and_weights_keep_their_names(preset: str) -> None:
    float_names = {"0.weight", "0.bias", "3.weight", "3.bias", "6.weight", "6.bias"}
    model = net(preset=preset, weight_bits=2, act_bits=2)
    assert float_names <= set(model.state_dict())
    calibrate_(model, IMAGES)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(IMAGES), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("preset", PRESETS)
def test_compiles_to_one_graph(preset: str) -> None:
    model = net(preset=preset)
    calibrate_(model, IMAGES)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    F.cross_entropy(model(IMAGES), LABELS).backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    F.cross_entropy(compiled(IMAGES), LABELS).backward()
    for got, wanted in zip(model.parameters(), want, strict=True):
        assert torch.allclose(got.grad, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("preset", PRESETS)
def test_other_precisions(dtype: torch.dtype, preset: str) -> None:
    model, x = net(preset=preset).to(dtype), IMAGES.to(dtype)
    calibrate_(model, x)
    y = model(x)
    y.float().square().mean().backward()
    assert y.dtype == dtype
    assert all(p.grad.isfinite().all() and p.grad.dtype == dtype for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_codes_of_half_tensors_are_those_of_float(dtype: torch.dtype) -> None:
    v = torch.rand(1000).to(dtype)
    step = torch.tensor([1 / 255])
    assert torch.equal(lsq_quantize(v, step, 0, 255), lsq_quantize(v.float(), step, 0, 255).to(dtype))


def test_autocast() -> None:
    model = net()
    calibrate_(model, IMAGES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(IMAGES)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


def test_saturated_codes_do_not_wrap_under_autocast() -> None:
    """The layers in front give bfloat16, where 255 steps are 255.5: code 256 would be 0 in a byte, and dW with it."""
    layer: Any = Lsq(weight_bits=8, act_bits=8).layer(nn.Linear(4, 2))
    x, step = torch.tensor([[0.5, 1.0, 2.0, 3.0]], dtype=torch.bfloat16), 0.01015
    layer.calibrate_(x)
    with torch.no_grad():
        layer.act_quantizer.step.fill_(step)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    want = (x.float() / step).round().clamp(0, 255) * step
    torch.testing.assert_close(layer.weight.grad, want.expand(2, 4), rtol=1e-2, atol=0)


def test_memory_formats_and_views() -> None:
    model = net().eval()
    calibrate_(model, IMAGES)
    want = model(IMAGES)
    wide = torch.randn(8, 2, 8, 16)
    wide[..., ::2] = IMAGES
    for x in (IMAGES.to(memory_format=torch.channels_last), wide[..., ::2]):
        assert torch.allclose(model(x), want, atol=1e-6)
    assert torch.equal(model(IMAGES), want)
    assert model(IMAGES[:0]).shape == (0, 5)


def test_memory() -> None:
    """Kept for backward: the ReLU's output (shared) and its codes, not a second float copy of it."""
    layer = Lsq(act_bits=2).layer(nn.Conv2d(8, 8, 3, padding=1))
    layer.calibrate_(torch.rand(4, 8, 16, 16))
    x = torch.relu(torch.randn(4, 8, 16, 16, requires_grad=True))
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    own = {x.untyped_storage().data_ptr(), layer.weight.untyped_storage().data_ptr()}
    extra = sum(size for pointer, size in kept.items() if pointer not in own)
    assert y.requires_grad
    assert extra < x.numel() // 4 + 4 * layer.weight.numel() + 200


def test_weight_codes_and_state() -> None:
    model = net(weight_bits=3)
    calibrate_(model, IMAGES)
    codes = model[3].weight_codes()
    assert codes.dtype == torch.int8
    assert -4 <= codes.min() < codes.max() <= 3
    step = model[3].weight_quantizer.step
    assert torch.allclose(codes * step, model[3].weight_quantizer(model[3].weight))
    other = net(weight_bits=3)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(IMAGES), model.eval()(IMAGES))


def test_health_names_every_layer() -> None:
    for preset in PRESETS:
        model = net(preset=preset)
        calibrate_(model, IMAGES)
        figures = {name: f for name, f in health(model, IMAGES).items() if f}  # a norm or ReLU has none
        assert {"0", "3"} <= figures.keys()
        assert all(0 <= f["clip_ratio"] < 0.5 and f["step_size"] > 0 and f["dead_steps"] == 0 for f in figures.values())


def test_weights_loaded_after_the_rewrite_set_the_steps() -> None:
    model = net()
    with torch.no_grad():
        model[3].weight.mul_(10)
    before = model[3].weight_quantizer.step.item()
    calibrate_(model, IMAGES)
    assert model[3].weight_quantizer.step.item() == pytest.approx(10 * before, rel=1e-5)


def test_steps_are_kept_from_weight_decay() -> None:
    names = {name for name, _ in net(preset="plus")[3].named_parameters()} - {"weight", "bias"}
    assert names == set(LsqConv2d.no_decay)
    assert StepSettings(bits=2, kind="signed").grad_scale == "1/sqrt_n_qp"


@pytest.mark.parametrize(("param", "dead"), [("raw", 1.0), ("softplus", 0.0)])
def test_small_steps_survive_adam_as_softplus(param: Any, dead: float) -> None:
    """An update of Adam is as large as its learning rate: more than an 8-bit LSQ+ step of weights, unless it is relative."""
    torch.manual_seed(0)
    part = Lsq(preset="plus", weight_bits=8, step_param=param).layer(nn.Conv2d(2, 6, 3)).weight_quantizer
    first = part.size().item()
    assert first < 5e-3
    optimizer = torch.optim.Adam(part.parameters(), 3e-3)
    for _ in range(3):
        optimizer.zero_grad()
        part.size().sum().backward()
        optimizer.step()
    assert part.health(torch.randn(9))["dead_steps"] == dead
    assert (part.size().item() > 0.98 * first) == (not dead)


def test_a_step_that_rounds_everything_to_zero_counts_as_dead() -> None:
    layer = Lsq(weight_bits=8, weight_steps="channel").layer(nn.Linear(4, 4))
    v = torch.rand(3, 4) + 0.1
    layer.calibrate_(v)
    assert layer.health(v)["dead_steps"] == 0
    with torch.no_grad():
        layer.weight_quantizer.step[1] = 9.0
    assert layer.health(v)["dead_steps"] == 0.25
    assert int(layer.weight_codes()[1].count_nonzero()) == 0


@pytest.mark.parametrize("param", ["raw", "softplus"])
def test_no_update_changes_a_step_by_more_than_its_share(param: Any) -> None:
    torch.manual_seed(0)
    layer = Lsq(weight_bits=8, step_param=param, step_change=0.25, weight_steps="channel").layer(nn.Conv2d(2, 3, 3))
    layer.calibrate_(torch.rand(2, 2, 5, 5))
    part = layer.weight_quantizer
    first = part.size().detach().flatten()
    wild = first * torch.tensor([-3.0, 9.0, 1.1])
    with torch.no_grad():
        part.step.copy_(
            (wild if param == "raw" else wild.abs().expm1().log() * torch.tensor([9.0, -9.0, 1.0])).view_as(part.step)
        )
    wanted = part.raw_size().detach().flatten().clamp(0.75 * first, 1.25 * first)
    untouched = part.step.flatten()[2].item()
    layer.project_()
    torch.testing.assert_close(part.size().flatten(), wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(wanted, first * torch.tensor([0.75, 1.25, 1.1]), rtol=1e-5, atol=0)
    assert part.step.flatten()[2].item() == untouched
    layer.project_()  # measured from where the last one left it
    torch.testing.assert_close(part.size().flatten(), wanted, rtol=1e-5, atol=0)


def test_as_published_steps_are_not_bounded() -> None:
    part = Lsq(step_change=None).layer(nn.Linear(4, 3)).weight_quantizer
    with torch.no_grad():
        part.step.fill_(7)
    part.bound_()
    assert part.step.item() == 7
