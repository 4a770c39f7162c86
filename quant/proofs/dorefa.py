"""Claims about quant/dorefa.py (DoReFa-Net, arXiv 1606.06160)."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quant.dorefa import Dorefa, quantize_gradient, quantize_weight
from quant.proofs import Claim, Named, Tensors, proves
from quant.proofs.tools import (
    BY_DIFFERENCES,
    conv,
    differences,
    gradients,
    layer_gradients,
    numbers,
    passed_through,
    plain_sign,
)

W, X = numbers(6, 4, 3, 3), numbers(3, 4, 6, 6, seed=4)
DRAWS = 4000


@proves("dorefa")
def claims() -> Iterator[Claim]:
    """Weights, a layer, gradients."""
    for bits in (1, 2, 4):
        got = partial(gradients, lambda w, bits=bits: quantize_weight(w, bits), W)
        formula = "eq. 7" if bits == 1 else "eq. 9"
        yield Claim(
            f"weights, {bits} bit", f"autograd of {formula}", got, partial(gradients, partial(_weight, bits), W)
        )
    slope = partial(differences, lambda w: w.tanh() / w.tanh().abs().max(), W)
    got = partial(gradients, lambda w: quantize_weight(w, 4), W)
    yield Claim("weights, 4 bit, gradient", "differences of tanh(W) / max|tanh(W)|", lambda: got()[1:], lambda: slope()[1:],
                tolerance=BY_DIFFERENCES)  # fmt: skip
    for norm in ("batch", "none"):
        layer = Dorefa(weight_bits=2, act_bits=3, input_norm=norm).layer(conv())
        what = "conv" if norm == "none" else "conv, input_norm=batch"
        theirs = partial(gradients, partial(_layer, norm), X, *layer.parameters())
        yield Claim(what, "autograd of eq. 5 to 11", partial(layer_gradients, layer, X), theirs)
    g = numbers(2, 4, 4, seed=9)
    mean = Claim("gradient, 2 bit", "the gradient", _mean_gradient, lambda: [g], tolerance=0.05)
    yield Claim(
        mean.what, mean.against, mean.ours, mean.theirs, tolerance=0.05, equal=f"equal in the mean of {DRAWS} draws"
    )
    named = Named("one draw = eq. 12 with its noise, relative error {error}", lambda t: [_equation_12(t[0], 4)])
    yield Claim("gradient, 4 bit", "the gradient", lambda: [_drawn(g, 4)], lambda: [g], named)


def _levels(v: Tensor, bits: int) -> Tensor:
    """Eq. 5 and 6."""
    top = 2**bits - 1
    return passed_through(v, (v * top).round() / top)


def _weight(bits: int, w: Tensor) -> Tensor:
    if bits == 1:
        return passed_through(w, plain_sign(w) * w.abs().sum() / w.numel())
    t = w.tanh()
    return 2 * _levels(t / (2 * t.abs().max()) + 0.5, bits) - 1


def _layer(norm: str, x: Tensor, w: Tensor, b: Tensor, *affine: Tensor) -> Tensor:
    if norm == "batch":
        centred = x - x.mean((0, 2, 3), keepdim=True)
        x = centred / (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
        x = x * affine[0].view(-1, 1, 1) + affine[1].view(-1, 1, 1)
    return F.conv2d(_levels(x.clamp(0, 1), 3), _weight(2, w), b, padding=1)


def _drawn(g: Tensor, bits: int) -> Tensor:
    x = torch.zeros_like(g).requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.autograd.grad(quantize_gradient(x, bits), x, g)[0]


def _equation_12(g: Tensor, bits: int) -> Tensor:
    """Sample by sample, with N from the same random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        noise = (torch.rand_like(g) - 0.5) / (2**bits - 1)
    rows: list[Any] = []
    for sample, n in zip(g, noise, strict=True):
        m = 2 * sample.abs().max()
        rows.append(m * (_levels((sample / m + 0.5 + n).clamp(0, 1), bits) - 0.5))
    return torch.stack(rows)


def _mean_gradient() -> Tensors:
    g = numbers(2, 4, 4, seed=9)
    copies = g.repeat(DRAWS, 1, 1)  # every copy is a sample with a range of its own
    return [_drawn(copies, 2).view(DRAWS, *g.shape).mean(0)]
