"""First steps of `quant.lsq`: how far apart the levels stand before they are learned.

Every function takes rows (R, n), a row for each step (R = 1: one step for the tensor), and gives steps (R). With codes from
-Qn to Qp:

    lsq     s = 2 mean |v| / sqrt(Qp)                                  LSQ, arXiv 1902.08153, section 2.1
    lsq+    s = max(|mu - 3 sigma|, |mu + 3 sigma|) / 2^(bits - 1)     LSQ+, arXiv 2004.09576: weights; activations as mse
    mse     (s, beta) with the least ||v_q - v||^2                     LSQ+: activations (there by gradient descent)
"""

import math

import torch
from torch import Tensor

SAMPLES = 1 << 16  # values that `least_squares` looks at, spread evenly over the tensor
STARTS = 16  # shares of the observed range from which `least_squares` sets out
ROUNDS = 10  # of codes, then steps


def mean_absolute(rows: Tensor, qp: int) -> Tensor:
    """2 mean |v| / sqrt(Qp).

    >>> mean_absolute(torch.tensor([[-1.0, 3.0, 2.0, 2.0]]), qp=4)
    tensor([2.])
    """
    return 2 * rows.abs().mean(1) / math.sqrt(qp)


def three_sigma(rows: Tensor, bits: int) -> Tensor:
    """max(|mu - 3 sigma|, |mu + 3 sigma|) / 2^(bits - 1): the levels cover what a normal distribution would fill.

    >>> three_sigma(torch.tensor([[-1.0, 1.0]]), bits=2)
    tensor([1.5000])
    """
    mean, reach = rows.mean(1), 3 * rows.std(1, correction=0)
    return torch.maximum((mean - reach).abs(), (mean + reach).abs()) / (1 << bits - 1)


def least_squares(rows: Tensor, qn: int, qp: int, offset: bool) -> tuple[Tensor, Tensor]:
    """Steps and offsets (0 without `offset`) with the smallest squared quantization error that a search finds.

    From each of 16 shares of the observed range: codes for the steps, then the best steps for these codes (a regression of v
    on its codes), ten times over. Either half lowers the error; the best of the 16 ends is kept.

    >>> step, beta = least_squares(torch.tensor([[0.5, 1.0, 1.5, 2.0]]), qn=0, qp=3, offset=True)
    >>> (round(step.item(), 3), round(beta.item(), 3))
    (0.5, 0.5)
    """
    rows = rows[:, :: -(-rows.shape[1] // SAMPLES)]
    scale = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    rows = rows / scale  # squares of very large or small values are no numbers
    zero = rows.new_zeros(len(rows), 1)
    best_step, best_beta, best_error = zero, zero, zero + torch.inf
    for start in range(1, STARTS + 1):
        step, beta = _span(rows, qn, qp, offset, start / STARTS)
        for _ in range(ROUNDS):
            step, beta = _regress(rows, _codes(rows, step, beta, qn, qp), step, beta, offset)
        error = (_codes(rows, step, beta, qn, qp) * step + beta - rows).square().mean(1, keepdim=True)
        better = error < best_error
        best_step, best_beta = torch.where(better, step, best_step), torch.where(better, beta, best_beta)
        best_error = torch.where(better, error, best_error)
    return (best_step * scale)[:, 0], (best_beta * scale)[:, 0]


def _span(rows: Tensor, qn: int, qp: int, offset: bool, share: float) -> tuple[Tensor, Tensor]:
    """Steps and offsets whose levels cover a share of the observed range."""
    low, high = rows.amin(1, keepdim=True) * share, rows.amax(1, keepdim=True) * share
    if not offset:
        return torch.maximum(high / qp, -low / max(qn, 1)), torch.zeros_like(low)
    step = (high - low) / (qn + qp)
    return step, low + qn * step


def _codes(rows: Tensor, step: Tensor, beta: Tensor, qn: int, qp: int) -> Tensor:
    codes = ((rows - beta) / step).round_().clamp_(-qn, qp)
    return torch.where(step > 0, codes, 0)


def _regress(rows: Tensor, codes: Tensor, step: Tensor, beta: Tensor, offset: bool) -> tuple[Tensor, Tensor]:
    """The steps and offsets that fit v = step code + beta best; the old steps where all codes are alike."""
    if not offset:
        spread = codes.square().sum(1, keepdim=True)
        return torch.where(spread > 0, (codes * rows).sum(1, keepdim=True) / spread, step), beta
    code_mean, row_mean = codes.mean(1, keepdim=True), rows.mean(1, keepdim=True)
    centred = codes - code_mean
    spread = centred.square().sum(1, keepdim=True)
    step = torch.where(spread > 0, (centred * (rows - row_mean)).sum(1, keepdim=True) / spread, step)
    return step, row_mean - step * code_mean
