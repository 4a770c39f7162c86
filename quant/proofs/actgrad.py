"""Claims about quant/actgrad.py, quant/codecs.py and quant/frugal.py (weight gradients from quantized activations)."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant.actgrad import ActGrad
from quant.frugal import Window, max_pool2d, relu
from quant.proofs import Claim, Named, Tensors, proves
from quant.proofs.tools import BY_DIFFERENCES, conv, differences, gradients, layer_gradients, numbers

X = numbers(4, 4, 7, 7, seed=4).relu()
NORMED = numbers(8, 3, 4, 4, seed=5) * 2 + 1
DRAWS = 600


@proves("actgrad")
def claims() -> Iterator[Claim]:
    """What is exact, what is as good as the codes, and what is exact in the mean."""
    floats = partial(gradients, _float, X, *conv().parameters())
    small, moved = layer_gradients(_layer(bits=2), X[:1]), partial(differences, _float, X[:1], *conv().parameters())
    got = "conv, 2 bit: y, dx", "differences", lambda: small[:2], lambda: moved()[:2]
    yield Claim(*got, tolerance=BY_DIFFERENCES)
    for bits in (8, 2, 1):
        text = f"actgrad nearest {bits} bit: dW relative error {{error}}, dx and db exact"
        named = Named(text, partial(_with_codes, partial(_uniform, bits)))
        coded = partial(layer_gradients, _layer(bits=bits), X)
        yield Claim(f"conv, {bits} bit", "autograd of float", coded, floats, named)
    text = "power of two, 4 bit: dW relative error {error}, dx and db exact"
    coded = partial(layer_gradients, _layer(scheme="power_of_two"), X)
    named = Named(text, partial(_with_codes, _power_of_two))
    yield Claim("conv, power_of_two", "autograd of float", coded, floats, named)
    yield from _without_loss()
    yield from _norm()
    equal = f"equal in the mean of {DRAWS} draws"
    for scheme in ("uniform", "power_of_two"):
        what, mean = f"dW, {scheme}, 2 bit, stochastic", partial(_mean_gradient, scheme)
        yield Claim(what, "autograd of float", mean, lambda: floats()[2:3], tolerance=0.02, equal=equal)


def _without_loss() -> Iterator[Claim]:
    theirs = partial(gradients, _relu, NORMED)
    yield Claim("relu, 1 bit kept", "autograd of max(x, 0)", partial(gradients, relu, NORMED), theirs)
    for kernel, stride in ((2, 2), (3, 2)):
        window = Window.of(nn.MaxPool2d(kernel, stride))
        what = f"max pool {kernel}x{kernel}, {window.bits} bits kept"
        pool = partial(gradients, partial(max_pool2d, window=window), NORMED)
        windows = partial(gradients, partial(_pool, kernel, stride), NORMED)
        yield Claim(what, "autograd of max over windows", pool, windows)


def _float(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.conv2d(x, w, b, padding=1)


def _layer(**settings: Any) -> nn.Module:
    return ActGrad(**{"rounding": "nearest", "group": None} | settings).layer(conv()) or nn.Identity()


def _uniform(bits: int, y: Tensor) -> Tensor:
    low, step = y.min(), (y.max() - y.min()) / float(2**bits - 1)
    return torch.round((y - low) / step) * step + low


def _power_of_two(y: Tensor) -> Tensor:
    """2^round(log2 y) for y >= 0, 15 exponents from the highest down, zero below (arXiv 1510.03009)."""
    exponent = y.log2().round()
    return torch.where(exponent > exponent.max() - 15, torch.exp2(exponent), 0)


def _with_codes(code: Any, exact: Tensors) -> Tensors:
    """dW = delta Q(y)^T in the place of delta y^T."""
    w, b = conv().parameters()
    return [*exact[:2], gradients(lambda w: _float(code(X), w, b), w)[1], exact[3]]


def _mean_gradient(scheme: str) -> Tensors:
    layer = _layer(scheme=scheme, bits=2, rounding="stochastic")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [torch.stack([layer_gradients(layer, X)[2] for _ in range(DRAWS)]).mean(0)]


def _relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0)


def _pool(kernel: int, stride: int, x: Tensor) -> Tensor:
    windows: Tensor = x.unfold(2, kernel, stride).unfold(3, kernel, stride)
    return windows.flatten(4).max(4)[0]


# ---- batch norm


def _batch_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return _normal(x) * gamma.view(-1, 1, 1) + beta.view(-1, 1, 1)


def _normal(x: Tensor) -> Tensor:
    centred = x - x.mean((0, 2, 3), keepdim=True)
    return centred / (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()


def _norm() -> Iterator[Claim]:
    plain = nn.BatchNorm2d(3, dtype=torch.float64)
    plain.weight, plain.bias = nn.Parameter(numbers(3, seed=6)), nn.Parameter(numbers(3, seed=7))
    layer: Any = ActGrad(norm="quantized", bits=4, rounding="nearest", group=None).layer(plain)

    def from_codes(exact: Tensors) -> Tensors:
        g, xh, dims = numbers(*NORMED.shape, seed=9), _normal(NORMED), (0, 2, 3)
        q = _uniform(4, xh)
        sigma = (NORMED.var(dims, correction=0, keepdim=True) + 1e-5).sqrt()
        rest = g - g.mean(dims, keepdim=True) - q * (g * q).mean(dims, keepdim=True)
        return [exact[0], layer.weight.detach().view(-1, 1, 1) / sigma * rest, (g * q).sum(dims), exact[3]]

    text = "norm in 4 bits: y and dbeta exact, dx and dgamma relative error {error}"
    floats = partial(gradients, _batch_norm, NORMED, layer.weight, layer.bias)
    yield Claim(
        "batch norm, norm=quantized",
        "autograd of float",
        partial(layer_gradients, layer, NORMED),
        floats,
        Named(text, from_codes),
    )
