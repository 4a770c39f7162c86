"""The few functions that every method shares, each with its formula. Gradients live here, settings live in the methods."""

import torch
from torch import Tensor


def sign(x: Tensor) -> Tensor:
    """The sign that can be stored in one bit: +1 where x >= 0 (also for 0 and -0), else -1 (XNOR-Net, arXiv 1603.05279, eq. 4).

    torch.sign(0) is 0, a third value that no packed kernel can hold; zeros do occur (padding, dropout, dead channels).

    >>> sign(torch.tensor([-2.0, -0.0, 0.0, 3.0]))
    tensor([-1.,  1.,  1.,  1.])
    """
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def stochastic_round(x: Tensor) -> Tensor:
    """floor(x + U[0, 1)): an integer whose expectation is x. Draws from torch's default generator, which the run seeds.

    >>> _ = torch.manual_seed(0)
    >>> stochastic_round(torch.full((10_000,), 0.25)).mean().round(decimals=1).item()
    0.2
    """
    return torch.floor(x + torch.rand_like(x))
