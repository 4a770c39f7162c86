"""Batch norm over the whole global batch: its figures are summed over all ranks, so that a config trains alike on any number.

On GPUs this is torch's SyncBatchNorm, which knows no CPU; here it is written out.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from quant.recomputed_norm import RecomputedBatchNorm2d

PLAIN: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, RecomputedBatchNorm2d)


class Moments(NamedTuple):
    """What a rank knows of the values of every channel: their mean, the sum of squares about it (both float64), their number."""

    mean: Tensor
    squares: Tensor
    number: Tensor


def gathered(row: Tensor) -> Tensor:
    """The rows of all ranks. Of few numbers it is twice as fast as a sum over the ranks, which gloo takes in two messages."""
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, row)
    return torch.stack(rows)


def moments(x: Tensor) -> Moments:
    """Those of x (N, C, L) on this rank.

    The L values of a row are summed in x's own type, the N rows in float64; torch's kernel adds value after value in float64
    and takes three times as long.
    """
    number = x.new_tensor([x.numel() / x.shape[1]], dtype=torch.float64)
    mean = x.sum(2).sum(0, dtype=torch.float64) / number
    about = x - mean.to(x.dtype)[:, None]
    squares = torch.linalg.vector_norm(about, dim=2).double().square().sum(0)
    return Moments(mean, squares, number)


def of_all_ranks(own: Moments) -> Moments:
    """The moments of the values of all ranks together (Chan, Golub, LeVeque, 1983), in one message."""
    means, squares, numbers = torch.split(gathered(torch.cat(own)), [len(part) for part in own], dim=1)
    number = numbers.sum(0)
    mean = (means * numbers).sum(0) / number
    return Moments(mean, (squares + numbers * (means - mean).square()).sum(0), number)


class Normalise(torch.autograd.Function):
    r"""y = (x - m) r w + b, m and 1/r^2 - eps the mean and variance of x (N, C, L) over N and L of all ranks (biased).

    dL/dx = r w (g - mean(g) - x' mean(g x')), x' = (x - m) r, the means over all ranks (arXiv:1502.03167, section 3).
    Returns y, and m, the variance and the number of values of a channel, which have no gradient. One message a pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        whole = of_all_ranks(moments(x))
        mean, variance = whole.mean.to(x.dtype), (whole.squares / whole.number).to(x.dtype)
        ctx.save_for_backward(x, weight, mean, variance, whole.number)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance, whole.number)
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, variance, whole.number

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, variance, number = ctx.saved_tensors
        backward = torch.ops.aten.native_batch_norm_backward  # as in evaluation: mean and variance held fixed
        _, along, plain = backward(
            g.contiguous(), x, weight, mean, variance, None, None, False, ctx.eps, [False, True, True]
        )
        sums = gathered(torch.cat([along, plain])).sum(0).view(2, -1)
        scale = weight * (variance + ctx.eps).rsqrt()
        by_x, constant = -scale * sums / number.to(x.dtype)
        dx = F.batch_norm(x, mean, variance, by_x, constant, eps=ctx.eps)
        return dx.addcmul_(g, scale[:, None]), along, plain, None


class SyncedBatchNorm(_BatchNorm):
    """BatchNorm1d or BatchNorm2d whose training figures are those of all ranks; without a gradient those of its own batch."""

    def _check_input_dim(self, input: Tensor) -> None:
        return

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(input)
        features = input.new_ones(self.num_features)
        weight, bias = (self.weight, self.bias) if self.affine else (features, torch.zeros_like(features))
        x = input.reshape(*input.shape[:2], -1).to(torch.promote_types(input.dtype, torch.float32))
        y, mean, variance, count = Normalise.apply(x, weight, bias, self.eps)
        self._remember(mean, variance * (count / (count - 1)))
        return y.reshape(input.shape).to(input.dtype)  # type: ignore[no-any-return]

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


def synced_(model: nn.Module, device: torch.device) -> nn.Module:
    """Every plain batch norm of a model becomes one over all ranks; names, parameters and buffers stay what they are."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call, no-any-return]
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) in PLAIN:
                setattr(module, name, _taking_over(child))
    return model


def _taking_over(norm: nn.Module) -> SyncedBatchNorm:
    assert isinstance(norm, _BatchNorm)
    new = SyncedBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    for name, parameter in norm.named_parameters(recurse=False):
        setattr(new, name, parameter)
    for name, buffer in norm.named_buffers(recurse=False):
        setattr(new, name, buffer)
    return new.train(norm.training)
