"""Claims about quant/xnor.py and the gradients in quant/functional.py (XNOR-Net, arXiv 1603.05279)."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant.functional import WeightGradient, scaled_sign, ste_sign
from quant.latent import standardised
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
from quant.xnor import Xnor

WIDE = numbers(6, 5, 3, 3)  # a third of the weights lies outside the window
SMALL = numbers(8, 16, 3, 3, spread=0.05)  # n = 144, c = 16, as large as trained weights are
BINOP = "updateBinaryGradWeight (XNOR-Net-PyTorch), line by line"


@proves("xnor")
def claims() -> Iterator[Claim]:
    """Weights, activations, layers."""
    yield from _weights()
    for ste, t in (("clip", 1.0), ("bireal", 1.0), ("ede", 0.3), ("ede", 4.0), ("reste", 2.5)):
        what = f"d sign(x), ste={ste}" + (f", t = {t:g}" if ste in ("ede", "reste") else "")
        ours = partial(_ste_gradient, ste, t)
        yield Claim(
            what, "differences of the curve it stands for", ours, partial(_slopes, ste, t), tolerance=BY_DIFFERENCES
        )
    yield from _layers()
    yield from _latent()


# ---- weights: W~ = alpha sign(W)


def ours(form: WeightGradient, w: Tensor) -> Tensors:
    return gradients(lambda v: scaled_sign(v, form), w)


def defined(w: Tensor, alpha_constant: bool = False, bound: float = 1.0) -> Tensor:
    alpha = w.abs().flatten(1).mean(1).view(-1, *[1] * (w.dim() - 1))
    inside = w * (w.abs() <= bound)
    return (alpha.detach() if alpha_constant else alpha) * passed_through(inside, plain_sign(w))


def _given(w: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """G, sign(W), alpha [|W| <= 1], and n."""
    mean = w.abs().flatten(1).mean(1).view(-1, 1, 1, 1)
    return numbers(*w.shape, seed=9), plain_sign(w), mean * (w.abs() <= 1), w[0].numel()


def _by_jacobian(w: Tensor) -> Tensors:
    g, s, window, n = _given(w)
    rows = [
        (torch.outer(a, a) / n + torch.diag(m)).T @ b
        for a, m, b in zip(s.flatten(1), window.flatten(1), g.flatten(1), strict=True)
    ]
    return [defined(w), torch.stack(rows).view_as(w)]


def _with_window(of_alpha: Tensors) -> Tensors:
    g, _, window, _ = _given(WIDE)
    return [of_alpha[0], of_alpha[1] + window * g]


def _without_cross_terms(exact: Tensors) -> Tensors:
    g, s, _, n = _given(SMALL)
    every_j = (g * s).flatten(1).sum(1).view(-1, 1, 1, 1)
    return [exact[0], exact[1] - s / n * (every_j - g * s)]


def _as_printed(w: Tensor) -> Tensors:
    g, _, window, n = _given(w)
    return [defined(w), g * (1 / n + window)]


def _public_code(w: Tensor) -> Tensors:
    g, (n, s) = numbers(*w.shape, seed=9), (w[0].numel(), w.shape)
    m = w.norm(1, 3, keepdim=True).sum(2, keepdim=True).sum(1, keepdim=True).div(n).expand(s).clone()
    m[w.lt(-1.0)] = 0
    m[w.gt(1.0)] = 0
    m = m.mul(g)
    add = w.sign().mul(g).sum(3, keepdim=True).sum(2, keepdim=True).sum(1, keepdim=True).div(n).expand(s)
    return [defined(w), m.add(add.mul(w.sign())).mul(1.0 - 1.0 / s[1]).mul(n)]


def _weights() -> Iterator[Claim]:
    autograd = partial(gradients, defined)
    exact, constant = partial(ours, "exact", SMALL), partial(gradients, partial(defined, alpha_constant=True), SMALL)
    n, c = SMALL[0].numel(), SMALL.shape[1]
    factor = Named("binop = exact x n (1 - 1/c)", lambda t: [t[0], t[1] * n * (1 - 1 / c)])
    what = "alpha sign(W), gradient="
    yield Claim(what + "exact", "autograd of mean|W| sign(W)", partial(ours, "exact", WIDE), partial(autograd, WIDE))
    yield Claim(
        what + "exact", "J = s s^T / n + alpha diag(m)", partial(ours, "exact", WIDE), partial(_by_jacobian, WIDE)
    )
    slope = Named("exact = the slope of alpha + alpha m G, the window of sign(W)", _with_window)
    moved = partial(differences, lambda w: scaled_sign(w), WIDE)
    yield Claim(what + "exact", "differences", partial(ours, "exact", WIDE), moved, slope, BY_DIFFERENCES)
    yield Claim(what + "binop", "exact", partial(ours, "binop", SMALL), exact, factor)
    yield Claim(what + "binop", BINOP, partial(ours, "binop", WIDE), partial(_public_code, WIDE))
    cross = Named("paper = exact without the cross terms, cosine {cosine}", _without_cross_terms)
    yield Claim(what + "paper", "exact", partial(ours, "paper", SMALL), exact, cross)
    yield Claim(
        what + "paper", "G (1/n + alpha m), as printed", partial(ours, "paper", WIDE), partial(_as_printed, WIDE)
    )
    held = Named("ste = exact with alpha constant, cosine {cosine}", lambda _: constant())
    yield Claim(what + "ste", "exact", partial(ours, "ste", SMALL), exact, held)
    a, b = partial(_behind_batch_norm, "exact"), partial(_behind_batch_norm, "ste")
    yield Claim(what + "exact, batch norm behind", "ste: dC/dalpha = 0 there", a, b, tolerance=1e-9)


def _behind_batch_norm(form: WeightGradient) -> Tensors:
    def forward(w: Tensor) -> Tensor:
        y = F.conv2d(plain_sign(numbers(4, 5, 8, 8, seed=3)), scaled_sign(w, form))
        return F.batch_norm(y, None, None, training=True, eps=1e-12)

    return gradients(forward, WIDE)


# ---- activations

KINKS = (-1.5, -1.0, -0.1, 0.0, 0.1, 1.0, 1.5)
X = torch.linspace(-2.013, 2.017, 200, dtype=torch.float64)
X = X[torch.stack([(X - kink).abs() > 1e-3 for kink in KINKS]).all(0)]


def _ste_gradient(ste: Any, t: float) -> Tensors:
    return gradients(lambda x: ste_sign(x, ste, torch.tensor(t, dtype=torch.float64)), X)[1:]


def _slopes(ste: str, t: float) -> Tensors:
    return differences(lambda x: _curve(x, ste, t), X)[1:]


def _curve(x: Tensor, ste: str, t: float) -> Tensor:
    """What each paper puts in the place of the sign."""
    s, a = plain_sign(x), x.abs()
    match ste:
        case "clip":
            return x.clamp(-1, 1)
        case "bireal":
            return torch.where(a < 1, 2 * x - s * x**2, s)
        case "ede":
            return max(1 / t, 1) * torch.tanh(t * x)
    power = torch.where(a < 0.1, x * 0.1 ** (1 / t) / 0.1, s * a ** (1 / t))
    return torch.where(a > 1.5, s * 1.5 ** (1 / t), power)


# ---- layers


def _layers() -> Iterator[Claim]:
    image, rows = numbers(3, 4, 7, 7, seed=4), numbers(16, 10, seed=4)
    dense = nn.Linear(10, 4, dtype=torch.float64)
    dense.weight, dense.bias = nn.Parameter(numbers(4, 10, seed=1)), nn.Parameter(numbers(4, seed=2))
    for name, old, x in (
        ("conv", conv(), image),
        ("conv, groups, stride 2", conv(groups=2, stride=2), image),
        ("linear", dense, rows),
    ):
        for scaled in (False, True):
            layer = Xnor(input_scale=scaled).layer(old)
            what = f"{name}: BN, sign, product" + (", K" if scaled else "")
            formula = partial(_layer, old, scaled, layer)
            yield Claim(what, "autograd of eq. 11", partial(layer_gradients, layer, x), partial(formula, x))
    weights_only = Xnor(binary_activations=False).layer(conv())
    floats = partial(gradients, lambda x, w, b: F.conv2d(x, defined(w), b, padding=1), image, *conv().parameters())
    yield Claim(
        "conv, weights only (quant=bwn)",
        "autograd of x * alpha sign(W)",
        partial(layer_gradients, weights_only, image),
        floats,
    )
    centred = Xnor(binary_activations=False, centre="graph").layer(conv())
    yield Claim("centre=graph", "G - mean over the input channels", partial(layer_gradients, centred, image), _centred)
    yield Claim(
        "project_",
        "clamp(W - mean over the input channels, -1, 1)",
        _projected,
        lambda: [_without_mean(2 * WIDE).clamp(-1, 1)],
    )


# ---- what is done to latent weights


def _latent() -> Iterator[Claim]:
    standard = partial(gradients, standardised, WIDE)
    yield Claim("standardise", "autograd of (W - mean W) / sd W", standard, partial(gradients, _standard, WIDE))
    yield Claim("standardise", "(G - mean G - V mean(G V)) / sd W", standard, _standard_gradient)
    yield Claim("standardise", "differences", standard, partial(differences, _standard, WIDE), tolerance=BY_DIFFERENCES)
    image, old = numbers(3, 4, 7, 7, seed=4), conv()
    for tau in (None, 0.5, 0.85, 0.99):
        settings = Xnor(binary_activations=False, standardise=True, tau=tau)
        formula = partial(gradients, partial(_rectified, tau), image, *old.parameters())
        ours = partial(layer_gradients, settings.layer(old), image)
        what = "standardise" if tau is None else f"standardise, tau = {tau:g}"
        yield Claim(f"conv, {what}", "autograd of x * alpha sign(V), window Q", ours, formula)
    early = Xnor(binary_weights=False, input_norm="none").layer(conv())
    floats = partial(
        gradients, lambda x, w, b: F.conv2d(passed_through(x.clamp(-1, 1), plain_sign(x)), w, b, padding=1),
        image, *conv().parameters(),
    )  # fmt: skip
    yield Claim("conv, activations only", "autograd of sign(x) * W", partial(layer_gradients, early, image), floats)


def _mean(w: Tensor) -> Tensor:
    return w.flatten(1).mean(1).view(-1, 1, 1, 1)


def _deviation(w: Tensor) -> Tensor:
    return (_mean((w - _mean(w)).square()) + 1e-10).sqrt()


def _standard(w: Tensor) -> Tensor:
    return (w - _mean(w)) / _deviation(w)


def _standard_gradient() -> Tensors:
    g, v = numbers(*WIDE.shape, seed=9), _standard(WIDE)
    return [v, (g - _mean(g) - v * _mean(g * v)) / _deviation(WIDE)]


def _rectified(tau: float | None, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    v = _standard(w)
    bound = 1.0 if tau is None else -v.detach().abs().mean().item() * math.log(2 - 2 * tau)
    return F.conv2d(x, defined(v, bound=bound), b, padding=1)


def _layer(old: Any, scaled: bool, layer: nn.Module, x: Tensor) -> Tensors:
    """BN -> sign -> product with alpha sign(W) [K] + b, by plain autograd, for x and every parameter of `layer`."""
    wide = (1, -1, *[1] * (x.dim() - 2))

    def forward(x: Tensor, w: Tensor, b: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        dims = [d for d in range(x.dim()) if d != 1]
        centred = x - x.mean(dims, keepdim=True)
        x = centred / (centred.square().mean(dims, keepdim=True) + 1e-4).sqrt() * gamma.view(wide) + beta.view(wide)
        y = _product(old, passed_through(x.clamp(-1, 1), plain_sign(x)), defined(w))
        return (y * _mean_size(old, x) if scaled else y) + b.view(wide)

    return gradients(forward, x, *layer.parameters())


def _product(old: Any, x: Tensor, w: Tensor) -> Tensor:
    if isinstance(old, nn.Linear):
        return x @ w.T
    return F.conv2d(x, w, None, old.stride, old.padding, old.dilation, old.groups)


def _mean_size(old: Any, x: Tensor) -> Tensor:
    """K: the mean of |x| that a filter of ones sees, group by group."""
    ones = torch.ones_like(old.weight)
    return _product(old, x.abs(), ones / ones[0].numel())


def _without_mean(w: Tensor) -> Tensor:
    return w - w.mean(1, keepdim=True)


def _centred() -> Tensors:
    w, b = conv().parameters()
    image = numbers(3, 4, 7, 7, seed=4)
    y, dx, dw, db = gradients(lambda x, w, b: F.conv2d(x, defined(w), b, padding=1), image, _without_mean(w), b)
    return [y, dx, _without_mean(dw), db]


def _projected() -> Tensors:
    layer: Any = Xnor().layer(conv(5, 6))
    layer.weight = nn.Parameter(2 * WIDE)
    layer.project_()
    return [layer.weight.detach()]
