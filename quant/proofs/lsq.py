"""Claims about quant/lsq.py and quant/learned_step.py (LSQ, arXiv 1902.08153; LSQ+, arXiv 2004.09576)."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quant.learned_step import StepQuantizer, lsq_quantize
from quant.lsq import Lsq
from quant.lsq_init import mean_absolute, three_sigma
from quant.proofs import Claim, Named, Tensors, proves
from quant.proofs.tools import (
    BY_DIFFERENCES,
    conv,
    differences,
    gradients,
    layer_gradients,
    numbers,
    passed_through,
)

V = numbers(6, 4, 5, 5)  # beyond the levels on both sides at the steps below
STEP, CHANNELS, BETA = numbers(1) * 0 + 0.45, 0.2 + 0.3 * numbers(6, 1, 1, 1).abs(), numbers(1, seed=3) * 0.2
QN, QP = 4, 3
KINDS = {"tensor": (STEP,), "channel": (CHANNELS,), "tensor, offset (LSQ+)": (STEP, BETA)}


def ours(v: Tensor, step: Tensor, beta: Tensor | None = None, **settings: Any) -> Tensor:
    return lsq_quantize(v, step, QN, QP, offset=beta, **settings)


def defined(v: Tensor, step: Tensor, beta: Tensor | float = 0.0) -> Tensor:
    """s round(clip(u)) + beta, with the derivative of the identity for the rounding; u strictly inside counts."""
    u = (v - beta) / step
    clipped = torch.where((u > -QN) & (u < QP), u, u.detach().clamp(-QN, QP))
    return step * passed_through(clipped, clipped.round()) + beta


@proves("lsq")
def claims() -> Iterator[Claim]:
    """The function, the presets, the parameters, a layer."""
    for kind, leaves in KINDS.items():
        what, got = f"quantizer, step a {kind}", partial(gradients, ours, V, *leaves)
        yield Claim(what, "autograd of s round(clip(v/s))", got, partial(gradients, defined, V, *leaves))
        moved = partial(differences, _rounding_held(*leaves), V, *leaves)
        yield Claim(what, "differences, the rounding error held", got, moved, tolerance=BY_DIFFERENCES)
    yield Claim("quantizer", "eq. 3 and 5, branch by branch", partial(gradients, ours, V, STEP), _branches)
    scale = (V.numel() * QP) ** -0.5
    scaled = partial(gradients, partial(ours, grad_scale=scale), V, STEP)
    yield Claim("quantizer, g = 1/sqrt(N Qp)", "lsq-net: grad_scale, round_pass", scaled, partial(_lsq_net, scale))
    plain = Named("scaled = unscaled x g, for the step alone", lambda t: [t[0], t[1], t[2] * scale])
    yield Claim("quantizer, g = 1/sqrt(N Qp)", "quantizer", scaled, partial(gradients, ours, V, STEP), plain)
    yield from _presets()
    yield from _parameters()
    yield Claim("conv, preset=v3", "autograd of the formula", *_layer("v3"))
    yield Claim("conv, preset=plus", "autograd of the formula", *_layer("plus"))


def _rounding_held(step: Tensor, beta: Tensor | float = 0.0) -> Callable[..., Tensor]:
    """The function whose derivative straight-through rounding is: what rounding adds to u is a constant."""
    u = ((V - beta) / step).clamp(-QN, QP)
    added = u.round() - u

    def held(v: Tensor, step: Tensor, beta: Tensor | float = 0.0) -> Tensor:
        return step * (((v - beta) / step).clamp(-QN, QP) + added) + beta

    return held


def _branches() -> Tensors:
    """Eq. 3 and 5 as they are printed."""
    g, u = numbers(*V.shape, seed=9), V / STEP
    step = torch.where(u <= -QN, -QN, torch.where(u >= QP, QP, u.round() - u))
    inside = (u > -QN) & (u < QP)
    return [STEP * u.round().clamp(-QN, QP), torch.where(inside, g, 0), (step * g).sum().view(1)]


def _lsq_net(scale: float) -> Tensors:
    """The quantizer of github.com/zhutmost/lsq-net, as its forward is written."""

    def forward(v: Tensor, step: Tensor) -> Tensor:
        s = passed_through(step * scale, step)
        x = torch.clamp(v / s, -QN, QP)
        return passed_through(x, x.round()) * s

    return gradients(forward, V, STEP)


# ---- presets

W = numbers(8, 6, 3, 3, spread=0.7)


def _weights(preset: Any, bits: int = 2, **switches: Any) -> tuple[StepQuantizer, Tensors]:
    """The quantizer of a preset's weights, after its first step; its value, dW and ds."""
    quantizer = StepQuantizer(
        Lsq(preset=preset, weight_bits=bits, **{"step_param": "raw"} | switches).for_weights(), (1,), W
    )
    quantizer.calibrate_(W)

    def forward(w: Tensor, step: Tensor) -> Tensor:
        return torch.func.functional_call(quantizer, {"step": step}, (w,))  # type: ignore[no-any-return]

    return quantizer, gradients(forward, W, quantizer.step)


def _presets() -> Iterator[Claim]:
    same_step = {"step_init": "const", "step_constant": 0.3}
    v1, v3 = (lambda: _weights("v1", 3, **same_step)[1][:1]), (lambda: _weights("v3", 3, **same_step)[1][:1])
    lowest = Named("v1 = v3 without the lowest level", lambda t: [t[0].clamp(min=-3 * 0.3)])
    yield Claim("weights at 3 bits, v1", "v3", v1, v3, lowest)

    def without_scale_and_mask(v1: Tensors) -> Tensors:
        size, step, qp = W.numel(), 2 * W.abs().mean(), 1  # 2 bits: Qp = 1
        outside = (W / step).abs() >= qp
        return [v1[0], v1[1] + outside * numbers(*W.shape, seed=9), v1[2] * (size * qp) ** 0.5]

    named = Named("plain = v1 without gradient scale and weight mask", without_scale_and_mask)
    yield Claim("weights at 2 bits, plain", "v1", lambda: _weights("plain")[1], lambda: _weights("v1")[1], named)
    signed, unsigned = Lsq(preset="plain").for_activations(), Lsq().for_activations()
    levels = Named("plain = v3 without the upper half of its levels", lambda t: [t[0].clamp(max=7 * 0.25)])
    a, b = (partial(_behind_relu, settings) for settings in (signed, unsigned))
    yield Claim("activations at 4 bits, plain", "v3", a, b, levels)


def _behind_relu(settings: Any) -> Tensors:
    quantizer = StepQuantizer(settings, (1,), V)
    with torch.no_grad():
        quantizer.step.fill_(0.25)
        return [quantizer(2 * V.clamp_min(0))]


# ---- first steps and how steps are kept


def _parameters() -> Iterator[Claim]:
    rows = W.flatten(1)
    first = rows.abs().sum(1) / rows.shape[1] * 2 / 7**0.5
    yield Claim("first step, lsq", "2 mean|v| / sqrt(Qp)", lambda: [mean_absolute(rows, 7)], lambda: [first])
    mean = rows.mean(1)
    reach = 3 * ((rows - mean.view(-1, 1)) ** 2).mean(1).sqrt()
    lsq_plus = torch.stack([(mean - reach).abs(), (mean + reach).abs()]).amax(0) / 4
    yield Claim("first step, lsq+", "max|mu +- 3 sigma| / 2^(b-1)", lambda: [three_sigma(rows, 3)], lambda: [lsq_plus])
    quantizer, found = _weights("v3", 3, step_param="softplus")
    g = (W.numel() * QP) ** -0.5

    def forward(w: Tensor, raw: Tensor) -> Tensor:
        size = F.softplus(raw)
        return defined(w, passed_through(size * g, size))

    theirs = partial(gradients, forward, W, quantizer.step)
    yield Claim("step_param=softplus", "autograd through log(1 + e^p)", lambda: found, theirs)


# ---- a layer


def _layer(preset: Any) -> tuple[Callable[[], Tensors], Callable[[], Tensors]]:
    old, x = conv(), numbers(5, 4, 6, 6, seed=4)
    x = x if preset == "plus" else x.relu()
    layer: Any = Lsq(preset=preset, step_param="raw").layer(old)
    layer.calibrate_(x)

    def forward(x: Tensor, w: Tensor, b: Tensor, w_step: Tensor, x_step: Tensor, *offset: Tensor) -> Tensor:
        x_q = _quantized(x, x_step, 0, 15, (x[0].numel() * 15) ** -0.5, *offset)
        return F.conv2d(x_q, _quantized(w, w_step, 8, 7, (w.numel() * 7) ** -0.5), b, padding=1)

    return partial(layer_gradients, layer, x), partial(gradients, forward, x, *layer.parameters())


def _quantized(v: Tensor, step: Tensor, qn: int, qp: int, scale: float, offset: Tensor | None = None) -> Tensor:
    s = passed_through(step * scale, step)
    beta = 0.0 if offset is None else passed_through(offset * scale, offset)
    u = (v - beta) / s
    clipped = torch.where((u > -qn) & (u < qp), u, u.detach().clamp(-qn, qp))
    return s * passed_through(clipped, clipped.round()) + beta
