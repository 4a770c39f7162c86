"""Claims about quant/classifier.py (fixed classifiers, arXiv 1801.04540): what `classifier=fixed` makes of the float model."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from quant.classifier import Kind, fix_classifier_, hadamard_rows, orthonormal_rows
from quant.proofs import Claim, Named, Tensors, proves
from quant.proofs.tools import BY_DIFFERENCES, differences, gradients, layer_gradients, numbers

CLASSES, FEATURES = 6, 12
FLOAT32 = 1e-6  # the orthonormal matrix is drawn in float64 and kept in float32
NORMAL = numbers(4, FEATURES)
X = torch.cat(
    [NORMAL, torch.eye(FEATURES, dtype=torch.float64)[:1]]
)  # in the last row one feature is all of the length
BIAS, ALPHA = numbers(CLASSES, seed=2), torch.tensor(1.7, dtype=torch.float64)


@proves("none")
def claims() -> Iterator[Claim]:
    """Layers, the gradient, the matrices."""
    for kind in ("hadamard", "orthonormal"):
        what, ours = f"classifier=fixed, {kind}", partial(layer_gradients, _fixed(nn.Linear(FEATURES, CLASSES), kind))
        formula, closed = partial(_formula, _matrix(kind)), partial(_closed, _matrix(kind))
        theirs = partial(gradients, formula, NORMAL, BIAS, ALPHA)
        yield Claim(what, "autograd of alpha M x / |x| + b", partial(ours, NORMAL), theirs)
        slopes = partial(differences, formula, X, BIAS, ALPHA)
        yield Claim(what, "differences", partial(ours, X), slopes, tolerance=BY_DIFFERENCES)
        yield Claim(what, "alpha (u - (u x^) x^) / |x|", partial(ours, X), closed)
    yield _public_code()
    yield _every_pixel()
    yield from _matrices()


def _public_code() -> Claim:
    ours = partial(layer_gradients, _fixed(nn.Linear(FEATURES, CLASSES)), X)
    theirs = partial(gradients, partial(_formula, -_matrix("hadamard")), X, BIAS, ALPHA)
    named = Named("public code = the paper with -alpha", lambda t: [2 * BIAS - t[0], -t[1], t[2], -t[3]])
    return Claim("classifier=fixed, hadamard", "-alpha M x / |x| + b (code of arXiv 1801.04540)", ours, theirs, named)


def _every_pixel() -> Claim:
    layer, x = _fixed(nn.Conv2d(FEATURES, CLASSES, 1)), numbers(2, FEATURES, 3, 3, seed=5)

    def formula(x: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        return _formula(_matrix("hadamard"), x.movedim(1, -1), bias, scale).movedim(-1, 1)

    ours, theirs = partial(layer_gradients, layer, x), partial(gradients, formula, x, BIAS, ALPHA)
    return Claim("classifier=fixed, 1x1 convolution", "autograd of alpha M x / |x| + b", ours, theirs)


def _matrices() -> Iterator[Claim]:
    few, many = (partial(orthonormal_rows, classes, 16, seed=3) for classes in (10, 40))
    yield Claim("M, orthonormal", "M M^T = 1", partial(_products, few), partial(_one, 10), tolerance=FLOAT32)
    what = "M, orthonormal, more classes than features"
    yield Claim(what, "M^T M = 1", partial(_products, many), partial(_one, 16), tolerance=FLOAT32)
    yield Claim("M, hadamard", "M M^T = 16", partial(_products, partial(hadamard_rows, 15, 16)), partial(_one, 15, 16))
    for classes, features in ((15, 9), (16, 9), (100, 84)):
        what = f"M, hadamard, {classes} classes, {features} features"
        yield Claim(what, "a row equals itself alone", partial(_same_rows, classes, features), partial(_one, classes))


def _products(matrix: Callable[[], Tensor]) -> Tensors:
    """Of all rows with each other; of all columns, where these are fewer."""
    m = matrix().double()
    return [m @ m.T if len(m) < m.shape[1] else m.T @ m]


def _one(size: int, factor: float = 1) -> Tensors:
    return [factor * torch.eye(size, dtype=torch.float64)]


def _same_rows(classes: int, features: int) -> Tensors:
    """1 where row i is row j."""
    rows = hadamard_rows(classes, features)
    return [(rows[:, None] == rows).all(-1).double()]


def _fixed(last: nn.Module, kind: Kind = "hadamard") -> nn.Module:
    model = nn.Sequential(last).double()
    fix_classifier_(model, kind, scale=ALPHA.item())
    layer = model[0]
    layer.bias = nn.Parameter(BIAS.clone())
    return layer


def _matrix(kind: Kind) -> Tensor:
    """(-1)^popcount(i and j), the constant row left out; the orthonormal one is drawn, and is what it is."""
    if kind == "orthonormal":
        return orthonormal_rows(CLASSES, FEATURES, seed=123).double()
    signs = [[(-1) ** (i & j).bit_count() for j in range(FEATURES)] for i in range(1, CLASSES + 1)]
    return torch.tensor(signs, dtype=torch.float64)


def _formula(matrix: Tensor, x: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    return scale * (x / x.square().sum(-1, keepdim=True).sqrt()) @ matrix.T + bias


def _closed(matrix: Tensor) -> Tensors:
    length = X.square().sum(-1, keepdim=True).sqrt()
    y, g = _formula(matrix, X, BIAS, ALPHA), numbers(len(X), CLASSES, seed=9)
    hat, u = X / length, g @ matrix
    return [y, ALPHA / length * (u - (u * hat).sum(-1, keepdim=True) * hat), g.sum(0), (g * (hat @ matrix.T)).sum()]
