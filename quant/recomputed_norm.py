"""Batch norm that does not keep its input where that is the result of a convolution of codes: it is convolved once more.

Autograd keeps the input of a batch norm in float, half of all that a training step of a residual network keeps. The codes that
made it are kept anyway, at 2 to 8 bits a value, and their convolution gives the same sums to the last bit (`quant.integer`), at
a fraction of the price of a float one. What comes in from anywhere else is kept as ever.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quant.base import QuantizedLayer

aten = torch.ops.aten


def source_of(x: Tensor) -> Any:
    """The node of the graph that computed x and can do so again until its own backward has run; None where it cannot.

    Such a node belongs to an autograd function with the static methods `can_again(ctx, x)` and `again(ctx)`: a method bound to
    the node itself would be a circle, which Python frees late.
    """
    node: Any = None if torch.compiler.is_compiling() else x.grad_fn
    function: Any = getattr(node, "_forward_cls", None)
    return node if hasattr(function, "again") and function.can_again(node, x) else None


class _Norm(torch.autograd.Function):
    """y = gamma (x - mean) / sigma + beta over the batch, by torch's own functions; x comes from its source in backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor | None, b: Tensor | None, mean: Tensor | None, var: Tensor | None,
        momentum: float, eps: float, source: Any,
    ) -> Tensor:  # fmt: skip
        y, batch_mean, inverse = torch.native_batch_norm(x, w, b, mean, var, True, momentum, eps)
        ctx.save_for_backward(w, batch_mean, inverse)
        ctx.eps, ctx.source = eps, source
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        w, mean, inverse = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        dx, dw, db = aten.native_batch_norm_backward(
            g, ctx.source._forward_cls.again(ctx.source), w, None, None, mean, inverse, True, ctx.eps, wanted
        )
        return dx, dw, db, None, None, None, None, None


class RecomputedBatchNorm2d(QuantizedLayer, nn.BatchNorm2d):
    """The batch norm `old`, to the last bit; in training it keeps no input that its source can compute again."""

    def __init__(self, old: nn.BatchNorm2d) -> None:
        super().__init__(old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats, device="meta")
        self.weight, self.bias = old.weight, old.bias
        self.running_mean, self.running_var = old.running_mean, old.running_var
        self.num_batches_tracked = old.num_batches_tracked

    def forward(self, x: Tensor) -> Tensor:
        source = source_of(x) if self.training and torch.is_grad_enabled() else None
        usual = self.momentum is None or x.numel() == x.shape[1] or x.shape[1] != self.num_features
        if source is None or usual:
            return super().forward(x)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        y: Tensor = _Norm.apply(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps, source
        )
        return y
