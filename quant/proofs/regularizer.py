"""Claims about quant/regularizer.py (the rounding margin): under `lsq` for steps, under `xnor` for signs."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quant.base import Quantizer
from quant.lsq import Lsq
from quant.proofs import Claim, Tensors, proves
from quant.proofs.tools import BY_DIFFERENCES, conv, differences, gradients, numbers
from quant.regularizer import RoundingMargin, rounding_margin
from quant.xnor import Xnor

V, X = numbers(6, 4, 5, 5), numbers(3, 4, 6, 6, seed=4)  # beyond the levels on both sides
STEP, BETA = torch.tensor(0.45, dtype=torch.float64), numbers(1, seed=4) * 0.2
QN, QP = 4, 3


@proves("lsq")
def of_steps() -> Iterator[Claim]:
    """The function, with and without an offset; the dampening loss; a layer."""
    for margin, offset in ((0.1, 0.0), (0.25, BETA), (0.5, 0.0)):
        what = f"rounding margin {margin}" + (", offset" if isinstance(offset, Tensor) else "")
        ours = partial(gradients, partial(_ours, margin, offset), V)
        hinge = partial(_hinge, margin, offset)
        yield Claim(what, "autograd of the hinge on listed thresholds", ours, partial(gradients, hinge, V))
        yield Claim(what, "differences", ours, partial(differences, hinge, V), tolerance=BY_DIFFERENCES)
        yield Claim(what, "-2 max(0, m - d) sign(u - floor(u) - 1/2) / numel", ours, partial(_closed, margin, offset))
    half = partial(gradients, partial(_ours, 0.5, 0.0), V)
    yield Claim("rounding margin 0.5", "the dampening loss (arXiv 2203.11086), in steps", half, _dampening)
    yield Claim("conv, regularizer=rounding_margin", "autograd of the hinge on listed thresholds", *_layer())


@proves("xnor")
def of_signs() -> Iterator[Claim]:
    """A layer, whose sign has one threshold."""

    def hinge(x: Tensor) -> Tensor:
        return (0.25 - x.abs()).clamp_min(0).square().mean()

    ours = partial(gradients, partial(_penalty, Xnor(input_norm="none")), X)
    yield Claim(
        "conv, regularizer=rounding_margin", "autograd of max(0, m - |y|)^2", ours, partial(gradients, hinge, X)
    )


def _ours(margin: float, offset: Any, v: Tensor) -> Tensor:
    return rounding_margin(v, STEP, QN, QP, margin, offset)[0]


def _hinge(margin: float, offset: Any, v: Tensor, step: Tensor = STEP, qn: int = QN, qp: int = QP) -> Tensor:
    """Every threshold that there is, one by one, in the units of v."""
    thresholds: Tensor = offset + step * (torch.arange(-qn, qp, dtype=torch.float64) + 0.5)
    distance = (v[..., None] - thresholds).abs().amin(-1) / step
    return (margin - distance).clamp_min(0).square().mean()


def _closed(margin: float, offset: Any) -> Tensors:
    u = (V - offset) / STEP
    beside = u - u.floor() - 0.5
    inside = (u > -QN) & (u < QP)
    slope = -2 * (margin - beside.abs()).clamp_min(0) * beside.sign() / V.numel() / STEP
    return [_hinge(margin, offset, V), torch.where(inside, slope, 0) * numbers(seed=9)]


def _dampening() -> Tensors:
    """||s w_int - clip(w, -s Qn, s Qp)||^2, its target detached; as a mean, in steps."""

    def loss(w: Tensor) -> Tensor:
        target = STEP * (w / STEP).round().clamp(-QN, QP).detach()
        return (target - w.clamp(-QN * STEP, QP * STEP)).square().mean() / STEP**2

    return gradients(loss, V)


def _penalty(settings: Quantizer, x: Tensor, scale: float = 1.0) -> Tensor:
    layer: Any = settings.layer(conv())
    layer.calibrate_(X)
    penalty = RoundingMargin(margin=0.25, weight=scale).attach(layer)
    layer(x)
    return penalty.value()


def _layer() -> tuple[partial[list[Tensor]], partial[list[Tensor]]]:
    """At 3 bits, signed, since X has negative values. The first step is 2 mean|v| / sqrt(Qp)."""
    step = 2 * X.abs().mean() / 3**0.5
    theirs = partial(gradients, lambda x: 0.7 * _hinge(0.25, 0.0, x, step, 4, 3), X)
    return partial(gradients, partial(_penalty, Lsq(act_bits=3), scale=0.7), X), theirs
