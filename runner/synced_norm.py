"""Batch norm over the whole global batch: its figures are summed over all ranks, so that a config trains alike on any number.

On GPUs this is torch's SyncBatchNorm, which knows no CPU; here it is written out.
"""

from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from quant.recomputed_norm import RecomputedBatchNorm2d

PLAIN: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, RecomputedBatchNorm2d)


def summed(*values: Tensor) -> list[Tensor]:
    """Each summed over all ranks, in one message."""
    flat = torch.cat([value.reshape(-1) for value in values])
    dist.all_reduce(flat)
    ends = list(accumulate(value.numel() for value in values))
    return [flat[start:end] for start, end in zip([0, *ends], ends, strict=False)]


class Normalise(torch.autograd.Function):
    r"""y = (x - m) r w + b, m and 1/r^2 - eps the mean and variance over batch, height and width of all ranks (biased).

    dL/dx = r w (g - mean(g) - x' mean(g x')), x' = (x - m) r, the means over all ranks (arXiv:1502.03167, section 3). What
    torch's own kernels give of one rank, its moments and its two sums, is summed over the ranks; every other pass is torch's.
    x is (N, C, …); returns y, and m, the variance and the number of values of a channel, which have no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        count = x.new_tensor([x.numel() / x.shape[1]])
        _, own_mean, own_r = torch.native_batch_norm(x, None, None, None, None, True, 0.0, eps)
        total, whole = summed(own_mean * count, count)
        mean = total / whole
        (squares,) = summed((own_r.pow(-2) - eps + (own_mean - mean).square()) * count)
        variance = (squares / whole).clamp_(min=0)
        ctx.save_for_backward(x, weight, mean, variance, whole)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance, whole)
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, variance, whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, variance, whole = ctx.saved_tensors
        backward = torch.ops.aten.native_batch_norm_backward  # as in evaluation: mean and variance held fixed
        dx, along, plain = backward(
            g.contiguous(), x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        all_along, all_plain = summed(along, plain)
        r = (variance + ctx.eps).rsqrt()
        by_x = -r.square() * weight * all_along / whole
        constant = -r * weight * all_plain / whole - by_x * mean
        shape = [-1 if axis == 1 else 1 for axis in range(x.dim())]
        return dx.addcmul_(x, by_x.reshape(shape)).add_(constant.reshape(shape)), along, plain, None


class SyncedBatchNorm(_BatchNorm):
    """BatchNorm1d or BatchNorm2d whose training figures are those of all ranks; without a gradient those of its own batch."""

    def _check_input_dim(self, input: Tensor) -> None:
        return

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(input)
        features = input.new_ones(self.num_features)
        weight, bias = (self.weight, self.bias) if self.affine else (features, torch.zeros_like(features))
        y, mean, variance, count = Normalise.apply(input, weight, bias, self.eps)
        self._remember(mean, variance * (count / (count - 1)))
        return y  # type: ignore[no-any-return]

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
