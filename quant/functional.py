"""The few functions that every method shares, each with its formula. Gradients live here, settings live in the methods."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quant.pack import Layout

Ste = Literal["clip", "bireal", "ede", "reste", "identity"]
WeightGradient = Literal["exact", "binop", "paper", "ste"]

RESTE_REACH, RESTE_CORE = 1.5, 0.1  # ReSTE's two guards: no gradient beyond the first, a constant one inside the second


def sign(x: Tensor) -> Tensor:
    """The sign that can be stored in one bit: +1 where x >= 0 (also for 0 and -0), else -1 (XNOR-Net, arXiv 1603.05279, eq. 4).

    torch.sign(0) is 0, a third value that no packed kernel can hold; zeros do occur (padding, dropout, dead channels).

    >>> sign(torch.tensor([-2.0, -0.0, 0.0, 3.0]))
    tensor([-1.,  1.,  1.,  1.])
    """
    return _plus_minus(x >= 0).to(x.dtype)


def _plus_minus(flags: Tensor) -> Tensor:
    """True -> +1, False -> -1, in int8: by whole bytes eight times as fast as torch.where on floats."""
    return flags.view(torch.int8).mul(2).sub_(1)


def stochastic_round(x: Tensor) -> Tensor:
    """floor(x + U[0, 1)): an integer whose expectation is x. Draws from torch's default generator, which the run seeds.

    >>> _ = torch.manual_seed(0)
    >>> round(stochastic_round(torch.full((10_000,), 0.25)).mean().item(), 1)
    0.2
    """
    return torch.floor(x + torch.rand_like(x))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """`value` forward, to the bit; backward the identity to x (arXiv 1308.3432), and nothing to `value`. Both of one shape.

    >>> x = torch.tensor([0.4, 1.6], requires_grad=True)
    >>> y = straight_through(x, x.round()); y.sum().backward(); (y.tolist(), x.grad.tolist())
    ([0.0, 2.0], [1.0, 1.0])
    """
    y: Tensor = _StraightThrough.apply(x, value)
    return y


def filter_mean(w: Tensor) -> Tensor:
    """The mean over everything but the first dimension, kept broadcastable: one number a filter. (O, ...) -> (O, 1, ...)"""
    return w.mean(list(range(1, w.dim())), keepdim=True)


# ---- one bit a value --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SignBits(Layout):
    """A codec for `quant.matmul`: an input of -1 and +1 is remembered at 1 bit a value, and comes back as int8."""

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.pack_flags(x > 0),)

    def decode(self, *saved: Tensor) -> Tensor:
        return _plus_minus(self.unpack_flags(saved[0]))


# ---- the sign of activations ------------------------------------------------------------------------------------------


def ste_slope(x: Tensor, ste: Ste, sharpness: Tensor | None = None) -> Tensor:
    """What stands in for d sign(x)/dx, with t = `sharpness` where a method has one:

        clip      1 where |x| <= 1                           BNN, XNOR-Net (arXiv 1603.05279; its `r 1_{|r|<=1}` is a slip)
        bireal    max(0, 2 - 2|x|)                           Bi-Real Net, arXiv 1808.00278, eq. 6
        ede       max(1/t, 1) t (1 - tanh(t x)^2)            IR-Net, arXiv 1909.10788, eq. 11; t goes from 0.1 to 10
        reste     |x|^((1-t)/t) / t where |x| <= 1.5         ReSTE, arXiv 2308.06689; t goes from 1 to 3;
                  0.1^(1/t) / 0.1 where |x| < 0.1            inside 0.1 the secant, because the power has a pole at 0
        identity  1

    >>> ste_slope(torch.tensor([-1.5, -1.0, 0.25]), "bireal")
    tensor([0.0000, 0.0000, 1.5000])
    """
    a = x.abs()
    if ste == "clip":
        return (a <= 1).to(x.dtype)
    if ste == "bireal":
        return (2 - 2 * a).clamp_min(0)
    if ste == "identity":
        return torch.ones_like(x)
    if sharpness is None:
        raise ValueError(f"ste={ste} needs a sharpness")
    t = sharpness.to(x.dtype)
    if ste == "ede":
        return t.reciprocal().clamp_min(1) * t * (1 - torch.tanh(t * x).square())
    curve = a.clamp_min(RESTE_CORE).pow((1 - t) / t) / t
    core = RESTE_CORE ** (1 / t) / RESTE_CORE
    return torch.where(a < RESTE_CORE, core, curve) * (a <= RESTE_REACH)


class _SteSign(torch.autograd.Function):
    """y = sign(x);  dx = slope(x) g.  Kept for backward: 1 bit a value for clip, nothing for identity, x for the curves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ste: Ste, sharpness: Tensor | None) -> Tensor:
        ctx.ste, ctx.layout = ste, Layout.of(x)
        if ste == "clip":
            ctx.save_for_backward(ctx.layout.pack_flags(x.abs() <= 1))
        elif ste != "identity":
            ctx.save_for_backward(x, sharpness)
        return sign(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        if ctx.ste == "identity":
            return g, None, None
        if ctx.ste == "clip":
            inside = ctx.layout.unpack_flags(ctx.saved_tensors[0])
            return inside.view(torch.int8).to(g.dtype).mul_(g), None, None
        x, sharpness = ctx.saved_tensors
        return g * ste_slope(x, ctx.ste, sharpness), None, None


def ste_sign(x: Tensor, ste: Ste = "clip", sharpness: Tensor | None = None) -> Tensor:
    """sign(x) whose gradient is `ste_slope(x) g`. x of any shape -> -1 and +1 in the same shape and dtype.

    >>> x = torch.tensor([-1.5, -1.0, 0.0, 0.5], requires_grad=True)
    >>> ste_sign(x).sum().backward(); x.grad
    tensor([0., 1., 1., 1.])
    """
    y: Tensor = _SteSign.apply(x, ste, sharpness)
    return y


# ---- the scaled sign of weights ---------------------------------------------------------------------------------------


class _ScaledSign(torch.autograd.Function):
    """W~ = alpha s with s = sign(W), alpha = mean|W| of the filter, n = its size, m = 1_{|W| <= 1}, G = dC/dW~.

    Both alpha and s depend on W, and alpha depends on every weight of the filter (arXiv 1603.05279, sec. 3.1):

        dW~_j/dW_i = s_j s_i / n + alpha m_i [i = j]     =>     dC/dW_i = (s_i / n) sum_j G_j s_j + alpha m_i G_i

    The window m may have another bound than 1.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, form: WeightGradient, bound: Tensor | None) -> Tensor:
        ctx.save_for_backward(w, bound)
        ctx.form = form
        return sign(w) * filter_mean(w.abs())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        w, bound = ctx.saved_tensors
        return scaled_sign_gradient(w, sign(w), filter_mean(w.abs()), g, ctx.form, bound), None, None


def scaled_sign_gradient(
    w: Tensor, s: Tensor, alpha: Tensor, g: Tensor, form: WeightGradient, bound: Tensor | None = None
) -> Tensor:
    """dC/dW from g = dC/dW~, in one of the forms of `scaled_sign`; s = sign(w) is used up.

    In place where it can be, and without flags: on a CPU, torch multiplies floats by bools forty times as slowly as by floats.
    """
    n, c = w[0].numel(), w.shape[1]
    through_sign = w.abs().le_(1 if bound is None else bound).mul_(alpha).mul_(g)
    if form == "ste":
        return through_sign
    if form == "paper":
        return through_sign.add_(g / n)
    exact = through_sign.add_(s.mul_(filter_mean(g * s)))
    return exact.mul_(binop_factor(n, c)) if form == "binop" else exact


def binop_factor(n: int, c: int) -> float:
    """The constant of XNOR-Net-PyTorch's updateBinaryGradWeight, n (1 - 1/c); without the second part where c = 1, since a
    layer with one input channel is not centred (and would stand still).

    >>> binop_factor(27, 3)
    18.0
    """
    return n * (c - 1) / c if c > 1 else float(n)


def scaled_sign(w: Tensor, form: WeightGradient = "exact", bound: Tensor | None = None) -> Tensor:
    """alpha(W) sign(W), the nearest binary filter to W, one alpha a filter (XNOR-Net, arXiv 1603.05279, eq. 4 and 6).

    `form` chooses the gradient, with s, n, alpha, m, G as in `_ScaledSign`:

        exact   (s/n) sum_j G_j s_j + alpha m G    the derivative
        binop   n (1 - 1/c) times that             what XNOR-Net-PyTorch computes (c = size of dimension 1)
        paper   G (1/n + alpha m)                  as printed, which drops the terms j != i: right only for n = 1
        ste     alpha m G                          alpha held constant

    `bound`: of the window, m = 1_{|W| <= bound}; None for 1.

    w (O, C, ...) -> the same shape.

    >>> w = torch.tensor([[0.5, -0.25], [0.0, 2.0]], requires_grad=True)
    >>> y = scaled_sign(w); y.tolist()
    [[0.375, -0.375], [1.0, 1.0]]
    >>> y.backward(torch.tensor([[1.0, 0.0], [1.0, 1.0]])); w.grad.tolist()
    [[0.875, -0.5], [2.0, 1.0]]
    """
    y: Tensor = _ScaledSign.apply(w, form, bound)
    return y
