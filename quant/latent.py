"""What is done to the latent weights of a binary layer, inside forward, before their sign is taken.

    balance and standardise   V = (W - mean W) / sd W of each filter       Libra-PB of IR-Net, arXiv 1909.10788, sec. 3.2
    rectified clamp           |V| <= Q,  Q = -mean|V| ln(2 - 2 tau)        ReCU, arXiv 2103.12369, sec. 3.2

The clamp changes no sign. What it does is in the gradient: it is the window outside of which a weight gets none through its sign.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

STANDARD_EPS = 1e-10  # beside a variance: far below that of any filter that is not constant


def standardised(w: Tensor) -> Tensor:
    """V = (W - mean W) / sd W over the n weights of each filter, sd = sqrt(var + 1e-10). w (O, ...) -> the same shape.

    Signs are balanced, and no filter is larger than another. With G = dC/dV the gradient is what is left of G when its mean and
    its part along V are taken off, over sd W:

        dC/dW = (G - mean G - V mean(G V)) / sd W

    The size of W does not matter: V of c W is V, its gradient 1/c of that of W. Weight decay changes how fast signs turn.

    >>> w = torch.tensor([[1.0, 3.0], [0.0, 0.5]], requires_grad=True)
    >>> v = standardised(w); [[round(x, 4) for x in row] for row in v.tolist()]
    [[-1.0, 1.0], [-1.0, 1.0]]
    >>> v.backward(torch.tensor([[1.0, 0.0], [0.0, 0.0]])); w.grad.abs().max().item() < 1e-6   # two weights: nothing is left
    True
    """
    return F.layer_norm(w, w.shape[1:], eps=STANDARD_EPS)


@torch.no_grad()
def window(v: Tensor, tau: Tensor) -> Tensor:
    """Q = -mean|V| ln(2 - 2 tau), a number: below it lies the share tau of the weights of a layer, if Laplace's law spreads them.

    tau from 0.5 (Q = 0: none in the window) up to but not including 1. As in the public code, one Q a layer, held constant in
    backward.

    >>> round(window(torch.tensor([[1.0, -3.0]]), torch.tensor(0.85)).item(), 4)          # 2 ln(1 / 0.3)
    2.4079
    """
    return -v.abs().mean() * torch.log(2 - 2 * tau.to(v.dtype))
