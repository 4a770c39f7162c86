"""Claims about quant/rangebn8.py, quant/range_bn.py and quant/uniform.py (Banner et al., arXiv 1805.11046)."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant.proofs import Claim, Named, Tensors, proves
from quant.proofs.tools import BY_DIFFERENCES, conv, differences, gradients, layer_gradients, numbers, passed_through
from quant.range_bn import Scale, range_factor, range_norm
from quant.rangebn8 import EightBit
from quant.uniform import GradientRounding, RunningRange

X, IMAGES = numbers(5, 4, 6, 6, seed=4), 3 * numbers(16, 3, 4, 5, seed=4) + 5
GAMMA, BETA = numbers(3, seed=5), numbers(3, seed=6)
DRAWS, N = 4000, 512


@proves("8bit-rangebn")
def claims() -> Iterator[Claim]:
    """Bifurcated products, the rounding of gradients, Range BN, running figures."""
    yield from _products()
    yield from _rounding()
    yield from _range_bn()
    yield from _running()


# ---- products with two gradients


def on_grid(x: Tensor, low: Tensor, high: Tensor, bits: int, zero_exact: bool) -> Tensor:
    """The nearest of 2^bits equally spaced values; with an exact zero, one step fewer covers the range where 0 lies inside."""
    top = 2**bits - 1
    if not zero_exact:
        step = (high - low) / top
        moved: Tensor = ((x - low) / step).round().clamp(0, top) * step + low
        return moved
    low, high = torch.minimum(low, 0 * low), torch.maximum(high, 0 * high)
    step = (high - low) / torch.where((low < 0) & (high > 0), top - 1, top)
    zero = torch.ceil(-low / step)
    centred: Tensor = ((x / step).round() + zero).clamp(0, top) - zero
    return centred * step


class _RoundedBackward(torch.autograd.Function):
    """quantize_grad of convNet.pytorch, rounding to the nearest."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bits: int, zero_exact: bool) -> Tensor:
        ctx.bits, ctx.zero_exact = bits, zero_exact
        return y.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return on_grid(g, g.min(), g.max(), ctx.bits, ctx.zero_exact), None, None


def _rounded(x: Tensor, low: Tensor, high: Tensor, bits: int, zero_exact: bool) -> Tensor:
    return passed_through(x, on_grid(x.detach(), low.detach(), high.detach(), bits, zero_exact))


def two_products(zero_exact: bool, weight_bits: int, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """conv2d_biprec of convNet.pytorch: one convolution for each gradient."""
    rows = x.flatten(1)
    x = _rounded(x, rows.min(1)[0].mean(), rows.max(1)[0].mean(), 8, zero_exact)
    filters = w.flatten(1)
    low, high = filters.min(1)[0].view(-1, 1, 1, 1), filters.max(1)[0].view(-1, 1, 1, 1)
    w, b = _rounded(w, low, high, 8, zero_exact), _rounded(b, b.min(), b.max(), 16, zero_exact)
    for_w = F.conv2d(x.detach(), w, b, padding=1)
    if weight_bits != 32:  # the bias keeps the float gradient
        for_w = _RoundedBackward.apply(F.conv2d(x.detach(), w, None, padding=1), weight_bits, zero_exact)
        for_w = for_w + b.view(-1, 1, 1)
    for_x = _RoundedBackward.apply(F.conv2d(x, w.detach(), b.detach(), padding=1), 8, zero_exact)
    y: Tensor = for_w + for_x - for_w.detach()
    return y


def _products() -> Iterator[Claim]:
    for zero_exact in (False, True):
        layer = _nearest(zero_exact=zero_exact)
        theirs = partial(gradients, partial(two_products, zero_exact, 32), X, *layer.parameters())
        what = "conv, one product" + (", zero_exact" if zero_exact else "")
        yield Claim(what, "conv2d_biprec (convNet.pytorch), two products", partial(layer_gradients, layer, X), theirs)
    at16, at32 = _nearest(grad_weight_bits=16), _nearest()
    paper = Named(
        "16 bits (paper) = 32 (code) but for dw, relative error {error}",
        lambda _: gradients(partial(two_products, True, 16), X, *at32.parameters()),
    )
    a, b = (partial(layer_gradients, layer, X) for layer in (at16, at32))
    yield Claim("conv, grad_weight_bits=16", "grad_weight_bits=32", a, b, paper)


def _nearest(**settings: Any) -> nn.Module:
    return EightBit(grad_rounding="nearest", **settings).layer(conv()) or nn.Identity()


def _rounding() -> Iterator[Claim]:
    g = numbers(40, seed=9)

    def mean() -> Tensors:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return [torch.stack([GradientRounding(3)(g) for _ in range(DRAWS)]).mean(0)]

    def with_noise(t: Tensors) -> Tensors:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            step = (g.max() - g.min()) / 15
            return [torch.floor((t[0] - g.min()) / step + torch.rand_like(g)).clamp(0, 15) * step + g.min()]

    def draw() -> Tensors:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return [GradientRounding(4, zero_exact=False)(g)]

    equal = f"equal in the mean of {DRAWS} draws"
    yield Claim("gradient, 3 bit", "the gradient", mean, lambda: [g], tolerance=0.02, equal=equal)
    named = Named("one draw = floor(g/step + U), relative error {error}", with_noise)
    yield Claim("gradient, 4 bit", "the gradient", draw, lambda: [g], named)


# ---- Range BN


def mean_range(n: int) -> float:
    """E[max - min] of n normal numbers: the integral of 1 - Phi^n - (1 - Phi)^n."""
    x = torch.linspace(-12, 12, 48_001, dtype=torch.float64)
    phi = torch.special.ndtr(x)
    return float(torch.trapezoid(1 - phi**n - torch.special.ndtr(-x) ** n, x))


def factor(n: int, scale: str) -> float:
    if scale == "d2":
        return 1 / mean_range(n)
    fix = 0.5 * 0.35 * (1 + math.sqrt(math.pi * math.log(4))) if scale == "reference" else 1.0
    return fix / math.sqrt(2 * math.log(n))


def normed(scale: str, chunks: int, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """RangeBN of convNet.pytorch as its forward is written, with C(n) of choice; eps = 0."""
    y = x.transpose(0, 1).contiguous()
    y = y.view(y.shape[0], chunks, -1)
    sigma = (y.max(-1)[0].mean(-1) - y.min(-1)[0].mean(-1)) * factor(y.shape[-1], scale)
    mean = y.view(y.shape[0], -1).mean(-1)
    return (x - mean.view(-1, 1, 1)) / sigma.view(-1, 1, 1) * gamma.view(-1, 1, 1) + beta.view(-1, 1, 1)


def _range_bn() -> Iterator[Claim]:
    scales: tuple[Scale, ...] = ("d2", "reference", "paper")
    for scale in scales:
        got = partial(gradients, partial(_ours, scale, 8), IMAGES, GAMMA, BETA)
        theirs = partial(gradients, partial(normed, scale, 8), IMAGES, GAMMA, BETA)
        yield Claim(f"Range BN, scale={scale}", "autograd of RangeBN (convNet.pytorch)", got, theirs, tolerance=1e-11)
    few = IMAGES[:6, :2, :3, :3].contiguous(), GAMMA[:2], BETA[:2]
    uneven = partial(_ours, "d2", 4)  # 6 samples in 4 chunks
    got, moved = partial(gradients, uneven, *few), partial(differences, uneven, *few)
    yield Claim("Range BN, 6 samples in 4 chunks", "differences", got, moved, tolerance=BY_DIFFERENCES)
    for scale in scales:
        ratio = factor(N, scale) * mean_range(N)
        named = Named(f"{scale} scale = {ratio:.3f} sigma (d2: 1.000)", partial(_times, ratio))
        yield Claim(
            f"sigma_hat of {N} normal values, scale={scale}",
            "sigma",
            partial(_expected_sigma, scale),
            lambda: [torch.ones(1, dtype=torch.float64)],
            None if scale == "d2" else named,
            tolerance=1e-9,
        )
    layer: Any = EightBit(grad_rounding="nearest").layer(nn.BatchNorm2d(3, eps=0.0, dtype=torch.float64))
    theirs = partial(gradients, _normed_in_8_bits, IMAGES, *layer.parameters())
    yield Claim(
        "Range BN, 8 bit in and back",
        "autograd on codes",
        partial(layer_gradients, layer, IMAGES),
        theirs,
        tolerance=1e-11,
    )


def _times(ratio: float, t: Tensors) -> Tensors:
    return [ratio * t[0]]


def _ours(scale: Scale, chunks: int, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return range_norm(x, gamma, beta, chunks=chunks, scale=scale)[0]


def _expected_sigma(scale: Scale) -> Tensors:
    return [torch.full((1,), range_factor(N, scale) * mean_range(N), dtype=torch.float64)]


def _normed_in_8_bits(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    rows = x.flatten(1)
    x = _rounded(x, rows.min(1)[0].mean(), rows.max(1)[0].mean(), 8, True)
    return _RoundedBackward.apply(normed("d2", 16, x, gamma, beta), 8, True)  # type: ignore[no-any-return]


# ---- running figures


def _running() -> Iterator[Claim]:
    batches = [numbers(16, 3, 2, 2, seed=seed) + seed for seed in range(3)]

    def running_mean() -> Tensors:
        layer: Any = EightBit(quantize_bn=False).layer(nn.BatchNorm2d(3, dtype=torch.float64))
        for batch in batches:
            layer(batch)
        return [layer.running_mean.clone()]

    def public(momentum: float) -> Tensors:
        run = torch.zeros(3, dtype=torch.float64)
        for batch in batches:
            run = momentum * run + (1 - momentum) * batch.mean((0, 2, 3))
        return [run]

    reversed_ = Named("code of convNet.pytorch: momentum reversed (its 0.1 is torch's 0.9)", lambda _: public(0.9))
    yield Claim("running statistics", "convNet.pytorch", running_mean, lambda: public(0.1), reversed_)

    def ranges() -> Tensors:
        found = RunningRange(8, 0.1, True, batches[0])
        for batch in batches:
            found(batch)
        return [torch.stack([found.low, found.high])]

    def plain_mean() -> Tensors:
        rows = torch.stack(batches).flatten(2)
        return [torch.stack([rows.min(2)[0].mean(), rows.max(2)[0].mean()])]

    yield Claim("running ranges, first batches", "mean over samples and batches", ranges, plain_mean)
