"""Batch norm over the whole global batch: its figures are summed over all ranks, so that a config trains alike on any number.

On GPUs this is torch's SyncBatchNorm, which knows no CPU; here it is written out.
"""

from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
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
    r"""y = (x - m) r, m and 1/r^2 - eps the mean and variance over batch, height and width of all ranks (biased).

    dL/dx = r (g - mean(g) - y mean(g y)), the means over all ranks: arXiv:1502.03167, section 3, in two sums.
    x is (N, C, …); returns y, and m and the variance of shape (C,), without a gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        others = [axis for axis in range(x.dim()) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(x.dim())]
        here = x.new_tensor([x.numel() / x.shape[1]])
        total, count = summed(x.sum(others), here)
        mean = total / count
        centred = x - mean.reshape(shape)
        (squares,) = summed(centred.square().sum(others))
        variance = squares / count
        r = (variance + eps).rsqrt()
        y = centred.mul_(r.reshape(shape))
        ctx.save_for_backward(y, r, count)
        ctx.others, ctx.shape = others, shape
        ctx.mark_non_differentiable(mean, variance, count)
        return y, mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        y, r, count = ctx.saved_tensors
        plain, along = summed(g.sum(ctx.others), (g * y).sum(ctx.others))
        dx = g - (plain / count).reshape(ctx.shape) - y * (along / count).reshape(ctx.shape)
        return dx.mul_(r.reshape(ctx.shape)), None


class SyncedBatchNorm(_BatchNorm):
    """BatchNorm1d or BatchNorm2d whose training figures are those of all ranks; without a gradient those of its own batch."""

    def _check_input_dim(self, input: Tensor) -> None:
        return

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(input)
        y, mean, variance, count = Normalise.apply(input, self.eps)
        self._remember(mean, variance * (count / (count - 1)))
        if not self.affine:
            return y  # type: ignore[no-any-return]
        shape = [-1 if axis == 1 else 1 for axis in range(input.dim())]
        return y * self.weight.reshape(shape) + self.bias.reshape(shape)  # type: ignore[no-any-return]

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
