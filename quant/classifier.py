"""Fixed classifiers: the last layer's matrix is chosen, not learned (Hoffer, Hubara, Soudry 2018, arXiv 1801.04540).

    y = alpha M x / |x| + b        alpha (a scalar) and b (one a class) are learned, M (classes, features) never     section 3
    dx = alpha (u - (u . x^) x^) / |x|,   u = M^T g,   x^ = x / |x|        dalpha = g . M x^        db = g

`hadamard`     M has entries +1 and -1: rows of Sylvester's matrix, M[i, j] = (-1)^popcount(i AND j)
`orthonormal`  M has orthonormal rows, drawn by a seed

Nothing of M is stored in a checkpoint: it is computed again. A zero x gives y = b.

The paper's code writes the Hadamard product with a minus, y = -alpha M x^ + b. Here it is a plus, as in the paper: alpha may
become negative, and the sign only matters for the constant first row. That row is worse than useless behind a ReLU: no x >= 0
has a larger product than with all ones, so with a plus class 0 always wins and with a minus it always loses, up to b. So rows
begin with the second one (`skip_constant_row`).

The runner builds a classifier from its config and calls `apply_` on the float model, before pretrained weights and quantizer.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.nn import functional as F

from quant.registry import Registry

Kind = Literal["hadamard", "orthonormal"]


def hadamard_rows(classes: int, features: int, skip_constant_row: bool = True) -> Tensor:
    """`classes` rows of Sylvester's matrix, cut to `features` columns; mutually orthogonal if that is a power of two.

    The matrix has as many rows as the next power of two from `features` up. Columns 1, 2, 4, .. hold the bits of a row's number,
    and none of them is cut: rows are distinct. The constant row is used only where all others are taken (classes = that power).
    Raises ValueError for more classes: rows would repeat, and their classes be told apart by their bias alone.

    >>> hadamard_rows(3, 4)
    tensor([[ 1., -1.,  1., -1.],
            [ 1.,  1., -1., -1.],
            [ 1., -1., -1.,  1.]])
    """
    size = 1 << (features - 1).bit_length()
    if classes > size:
        raise ValueError(
            f"kind hadamard has {size} different rows of {features} features, got {classes} classes; "
            "accepted: kind orthonormal, or a model with a wider last layer"
        )
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    first = int(skip_constant_row and classes < size)
    return matrix[first : first + classes, :features].clone()


def orthonormal_rows(classes: int, features: int, seed: int) -> Tensor:
    """A random (classes, features) matrix with orthonormal rows; with orthonormal columns where classes are more.

    Drawn in float64 by a generator of its own, so it does not touch the run's random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    tall = torch.randn(max(classes, features), min(classes, features), generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(tall)
    q = q * torch.where(r.diagonal() >= 0, 1.0, -1.0)  # makes the factorisation unique, whatever library computes it
    rows: Tensor = q if classes >= features else q.T
    return rows.float()


def unit(x: Tensor, dim: int) -> Tensor:
    """x / |x| along `dim`; zero where x is. The peak is divided out first, so that no square overflows or vanishes.

    >>> unit(torch.tensor([[3e30, 4e30], [0.0, 0.0]]), 1)
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    peak = wide.detach().abs().amax(dim, keepdim=True)
    wide = wide / torch.where(peak > 0, peak, 1)
    length: Tensor = torch.linalg.vector_norm(wide, dim=dim, keepdim=True)
    return (wide / torch.where(length > 0, length, 1)).to(x.dtype)  # a clamp would hold a length of 1 constant


class FixedLinear(nn.Linear):
    """y = scale M unit(x) + bias for x (..., features), in the place of a linear layer. `weight` is M, a buffer.

    A subclass, so that quantizers, which rewrite exact types, see it as the last layer and leave it alone.
    """

    scale: nn.Parameter

    def __init__(self, old: nn.Linear, matrix: Tensor, scale: float) -> None:
        super().__init__(old.in_features, old.out_features, device="meta")
        _fix(self, old.weight, matrix, scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(unit(x, -1), self.weight * self.scale, self.bias)


class FixedConv2d(nn.Conv2d):
    """The same at every pixel of x (B, features, H, W), in the place of a 1x1 convolution (NIN's last layer)."""

    scale: nn.Parameter

    def __init__(self, old: nn.Conv2d, matrix: Tensor, scale: float) -> None:
        super().__init__(old.in_channels, old.out_channels, 1, device="meta")
        _fix(self, old.weight, matrix[:, :, None, None], scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(unit(x, 1), self.weight * self.scale, self.bias)


def _fix(layer: FixedLinear | FixedConv2d, like: Tensor, matrix: Tensor, scale: float) -> None:
    del layer.weight
    layer.register_buffer("weight", matrix.to(like), persistent=False)
    layer.scale = nn.Parameter(like.new_tensor(scale))
    layer.bias = nn.Parameter(like.new_zeros(len(matrix)))


def fix_classifier_(
    model: nn.Module,
    kind: Kind = "hadamard",
    *,
    scale: float | None = None,
    seed: int = 123,
    skip_constant_row: bool = True,
) -> str:
    """Replace the model's last linear layer (or 1x1 convolution) by a fixed one; returns its name.

    scale: alpha at the beginning; None = 1/sqrt(classes) for hadamard, 10 for orthonormal, as the paper's code begins.
    Raises ValueError where the last matrix layer is of another kind, and for hadamard with more classes than the power of two
    from the features up.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> fix_classifier_(model), model[2](torch.zeros(1, 16)).tolist(), sum(p.numel() for p in model[2].parameters())
    ('2', [[0.0, 0.0, 0.0, 0.0]], 5)
    """
    name, old = _last_layer(model)
    classes, features = old.weight.shape[:2]
    hadamard = kind == "hadamard"
    matrix = (
        hadamard_rows(classes, features, skip_constant_row) if hadamard else orthonormal_rows(classes, features, seed)
    )
    start = scale if scale is not None else 1 / math.sqrt(classes) if hadamard else 10.0
    new = FixedLinear(old, matrix, start) if isinstance(old, nn.Linear) else FixedConv2d(old, matrix, start)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new.train(old.training))
    return name


def _last_layer(model: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d]:
    matrices = [(n, m) for n, m in model.named_modules() if n and isinstance(m, nn.Linear | nn.Conv2d)]
    if not matrices:
        raise ValueError("a fixed classifier replaces a model's last linear layer, and this model has none")
    name, last = matrices[-1]
    if type(last) is nn.Linear or (type(last) is nn.Conv2d and _is_pointwise(last)):
        return name, last
    raise ValueError(
        f"the model's last matrix layer is {name!r}, {last}; accepted: a Linear, or a 1x1 Conv2d with stride 1 and no groups"
    )


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((1, 1), (1, 1), (0, 0), 1)


# ---- settings -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Classifier(ABC):
    """What becomes of a model's last layer: its fields are the keys of conf/classifier/NAME.yaml."""

    name: ClassVar[str] = ""

    @abstractmethod
    def apply_(self, model: nn.Module) -> None:
        """Rewrite the float model in place. Raises ValueError, naming what is accepted, where that is impossible."""


CLASSIFIERS: Registry[type[Classifier]] = Registry("classifier")
register, find = CLASSIFIERS.register, CLASSIFIERS.find


@register("learned")
@dataclass(frozen=True, kw_only=True)
class Learned(Classifier):
    """The model's own last layer."""

    def apply_(self, model: nn.Module) -> None:
        return


@register("fixed")
@dataclass(frozen=True, kw_only=True)
class Fixed(Classifier):
    """A fixed matrix with a learned scale and bias: `fix_classifier_` with these arguments."""

    kind: Kind = "hadamard"
    scale: Annotated[float, Gt(0)] | None = None
    seed: Annotated[int, Ge(0)] = 123
    skip_constant_row: bool = True

    def apply_(self, model: nn.Module) -> None:
        fix_classifier_(model, self.kind, scale=self.scale, seed=self.seed, skip_constant_row=self.skip_constant_row)
