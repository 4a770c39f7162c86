"""The two gradients of a product of signs, y = (sign(x) * sign(W)) alpha, by the fastest way that is exact, or in bfloat16.

    dx = (g alpha) * sign(W)^T        dW~ = g * sign(x)^T          one operand of each product has one bit a value

Whatever computed the product forward, on packed bits or in floats, its gradients come from here and are the same to the bit:

    table lookups    float32 on a CPU with AVX-512: nothing is multiplied (`quant.kernels.gradients`)
    floats           everything else
    bfloat16         where the layer's geometry says `bf16`: `matmul.rounded_products`
"""

from typing import Protocol

import torch
from torch import Tensor

from quant import kernels, matmul
from quant.functional import sign
from quant.matmul import Scaled, rounded_products

Shape = matmul.Conv | matmul.Linear


class Signs(Protocol):
    """sign(x), as it was kept."""

    def bits(self) -> Tensor:
        """Packed, of the inputs of a convolution."""

    def floats(self, dtype: torch.dtype) -> Tensor:
        """-1 and +1."""


def obstacle_of_lookup(g: Tensor, shape: Shape) -> str | None:
    """Why the products need floats multiplied; None if they can be looked up. Says nothing of the forward kernel."""
    if not isinstance(shape, matmul.Conv):
        return "a linear layer"
    if obstacle := obstacle_of_geometry(shape):
        return obstacle
    if torch.compiler.is_compiling() or type(g) is not Tensor:
        return "a graph is being traced"
    if g.dtype != torch.float32 or g.device.type != "cpu" or g.dim() != 4 or g.numel() == 0:
        return f"a gradient of {g.dtype} on {g.device.type}, shape {tuple(g.shape)}"
    return kernels.why_no_lookup()


def obstacle_of_geometry(shape: Shape) -> str | None:
    """What in the geometry of a convolution no kernel on bits can do."""
    if isinstance(shape, matmul.Conv) and shape.groups != 1:
        return f"groups {shape.groups}"
    if isinstance(shape, matmul.Conv) and set(shape.dilation) != {1}:
        return f"dilation {' x '.join(map(str, shape.dilation))}"
    return None


def gradients(
    g: Tensor, w: Tensor, alpha: Tensor, signs: Signs | None, size: torch.Size, shape: Shape, need_x: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dx (`size`) and dW~ from g, the weight w (its sign counts), alpha (O values), and sign(x) (None: no dW~ is wanted)."""
    if shape.bf16:
        return _rounded(g, w, alpha, signs, size, shape, need_x)
    if isinstance(shape, matmul.Conv) and obstacle_of_lookup(g, shape) is None:
        return _looked_up(g, w, alpha, signs, size, shape, need_x)
    x = g.new_empty(()).expand(size) if signs is None else signs.floats(g.dtype)
    weight = sign(w).to(g.dtype) * alpha.to(g.dtype).view(-1, *[1] * (w.dim() - 1))
    return shape.backward(g, x, weight, need_x, signs is not None)


def _looked_up(
    g: Tensor, w: Tensor, alpha: Tensor, signs: Signs | None, size: torch.Size, shape: matmul.Conv, need_x: bool
) -> tuple[Tensor | None, Tensor | None]:
    stride, padding, kernel = ((pair[0], pair[1]) for pair in (shape.stride, shape.padding, w.shape[2:]))
    dx = kernels.input_gradient(g, w, alpha, size, stride, padding) if need_x else None
    dw = None if signs is None else kernels.weight_gradient(g, signs.bits(), size, kernel, stride, padding)
    return dx, dw


def _rounded(
    g: Tensor, w: Tensor, alpha: Tensor, signs: Signs | None, size: torch.Size, shape: Shape, need_x: bool
) -> tuple[Tensor | None, Tensor | None]:
    low = torch.bfloat16
    x = None if signs is None else Scaled(signs.floats(low), g.new_ones(()))
    return rounded_products(g, g, x, Scaled(sign(w).to(low), alpha), size, shape, need_x)
