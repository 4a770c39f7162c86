"""What the second opinions are made of: random numbers, plain straight-through rounding, gradients, finite differences.

Nothing here uses the code that is to be proved.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

STEP = 1e-6  # of central differences in float64: their error is about 1e-10
BY_DIFFERENCES = 1e-7


def numbers(*shape: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    """Normal float64 numbers that depend on nothing but `seed` and the shape."""
    return spread * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain_sign(x: Tensor) -> Tensor:
    """+1 where x >= 0, else -1."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def passed_through(x: Tensor, value: Tensor) -> Tensor:
    """`value`, with the gradient of x."""
    return x + (value - x).detach()


def gradients(function: Callable[..., Tensor], *leaves: Tensor, seed: int = 9) -> list[Tensor]:
    """The value of a function of `leaves`, and its gradients for a random G = dC/dy."""
    copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    y = function(*copies)
    return [y.detach(), *torch.autograd.grad(y, copies, numbers(*y.shape, seed=seed))]


def differences(function: Callable[..., Tensor], *leaves: Tensor, seed: int = 9) -> list[Tensor]:
    """The same by central differences, an element at a time."""
    values = [leaf.detach().clone() for leaf in leaves]
    y = function(*values).detach()
    g, slopes = numbers(*y.shape, seed=seed), []
    for value in values:
        slope, flat = torch.zeros_like(value), value.view(-1)
        for i, old in enumerate(flat.tolist()):
            ends = []
            for sign in (1, -1):
                flat[i] = old + sign * STEP
                ends.append((function(*values).detach() * g).sum())
            flat[i] = old
            slope.view(-1)[i] = (ends[0] - ends[1]) / (2 * STEP)
        slopes.append(slope)
    return [y, *slopes]


def layer_gradients(layer: nn.Module, x: Tensor, seed: int = 9) -> list[Tensor]:
    """Output of a layer, gradient of its input, gradients of its parameters in their order; its buffers are left as they were."""
    names = [name for name, _ in layer.named_parameters()]

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        state: dict[str, Any] = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        y: Tensor = torch.func.functional_call(layer, state | dict(zip(names, values, strict=True)), (x,))
        return y

    return gradients(forward, x, *layer.parameters(), seed=seed)


def conv(channels: int = 4, filters: int = 6, bias: bool = True, **geometry: Any) -> nn.Conv2d:
    """A float64 convolution, 3x3, padded by one, with weights from `numbers`."""
    layer = nn.Conv2d(channels, filters, 3, **{"padding": 1} | geometry, bias=bias, dtype=torch.float64)
    layer.weight = nn.Parameter(numbers(*layer.weight.shape, seed=1, spread=0.7))
    if layer.bias is not None:
        layer.bias = nn.Parameter(numbers(filters, seed=2))
    return layer
