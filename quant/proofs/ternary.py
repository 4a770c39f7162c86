"""Claims about quant/ternary.py (Ternary Weight Networks, arXiv 1605.04711)."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from quant.proofs import Claim, Named, Tensors, proves
from quant.proofs.tools import conv, gradients, layer_gradients, numbers, passed_through, plain_sign
from quant.ternary import ScaleOf, Ternary, ternary_codes

W, X = numbers(6, 4, 3, 3), numbers(3, 4, 6, 6, seed=4)


@proves("ternary")
def claims() -> Iterator[Claim]:
    """Layers, the scale, the threshold."""
    old = conv()
    for scale in ("filter", "layer"):
        layer = Ternary(scale=scale).layer(conv())
        theirs = partial(gradients, partial(_layer, scale), X, *old.parameters())
        yield Claim(
            f"conv, scale={scale}", "autograd of alpha t, straight through", partial(layer_gradients, layer, X), theirs
        )
    best = Claim("alpha of a filter", "least squares, <W, t> / <t, t>", _scales, _least_squares)
    yield best
    several = Named(
        "filter = layer, filter by filter", lambda _: [torch.cat([_ternary(w, "layer") for w in W.unsqueeze(1)])]
    )
    yield Claim(
        "scale=filter", "scale=layer, as published", lambda: [_ours("filter")], lambda: [_ternary(W, "layer")], several
    )


def _ternary(w: Tensor, scale: str) -> Tensor:
    """alpha t for the whole of w, or filter by filter."""
    if scale == "filter":
        return torch.cat([_ternary(one, "layer") for one in w.unsqueeze(1)])
    codes = _codes(w)
    return codes * w.abs()[codes != 0].mean()


def _codes(w: Tensor) -> Tensor:
    """t for the whole of w."""
    return torch.where(w.abs() > 0.7 * w.abs().sum() / w.numel(), plain_sign(w), 0)


def _layer(scale: str, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.conv2d(x, passed_through(w, _ternary(w.detach(), scale)), b, padding=1)


def _ours(scale: ScaleOf) -> Tensor:
    codes, alpha = ternary_codes(W, 0.7, scale)
    return codes * alpha


def _scales() -> Tensors:
    return [ternary_codes(W, 0.7, "filter")[1].flatten()]


def _least_squares() -> Tensors:
    return [torch.stack([torch.linalg.lstsq(_codes(w)[:, None], w[:, None]).solution[0, 0] for w in W.flatten(1)])]
