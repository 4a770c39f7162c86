"""Weight gradients from quantized activations: forward and error in float, dW from a copy of k bits.

    forward   y_l = h(W_l y_{l-1} + b_l)                                          float
    error     delta_{l-1} = (W_l^T delta_l) . h'                                  exact: W and the masks of h, no y
    update    dW_l = delta_l Q(y_{l-1})^T,   db_l = sum delta_l                   db exact, dW as good as Q

Quantized back propagation of Lin, Courbariaux, Memisevic, Bengio (arXiv 1510.03009, section 4), where Q is a power of two so
that products become shifts. Here Q(y) is also all that is stored: codes of k bits, one bit a value for a ReLU (Jain et al.,
Gist, ISCA 2018), the place in its window for a maximum. With `rounding: stochastic` E[dW] is the exact gradient.

Batch normalisation needs its normalised input for the error itself. `norm: exact` leaves it in float; `norm: quantized`
stores it in k bits too, and the error of the layers below is then approximate (arXiv 1901.07988, arXiv 2104.14129).
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from quant.base import QuantizedLayer, Quantizer, register
from quant.codecs import PowerOfTwo, Uniform
from quant.frugal import MaskedReLU, Window, batch_norm, max_pool2d
from quant.layers import Conv2d, Linear, Matrix, rewrite

# Without gradients every layer computes what the float layer computes: evaluation stores nothing and draws no random numbers.


class _Coded(QuantizedLayer, Matrix):
    """y = W x + b in float; the weight gradient is made from a copy of k bits of x."""

    settings: "ActGrad"

    def forward(self, x: Tensor) -> Tensor:
        codec = self.settings.codec(x) if torch.is_grad_enabled() else None
        return self.product(x, self.weight, self.bias, codec)


class CodedConv2d(_Coded, Conv2d):
    """A convolution that remembers its input in k bits."""


class CodedLinear(_Coded, Linear):
    """A linear layer that remembers its input in k bits."""


class PlacedMaxPool2d(QuantizedLayer, nn.MaxPool2d):
    """Max pool that remembers where in its window each maximum was."""

    def __init__(self, old: nn.MaxPool2d) -> None:
        super().__init__(old.kernel_size, old.stride, old.padding, old.dilation, ceil_mode=old.ceil_mode)
        self.window = Window.of(old)

    def forward(self, x: Tensor) -> Tensor:
        return max_pool2d(x, self.window) if torch.is_grad_enabled() else super().forward(x)


class CodedBatchNorm(QuantizedLayer, nn.modules.batchnorm._BatchNorm):
    """Batch norm that remembers its normalised input in k bits. In eval mode it is plain batch norm."""

    def __init__(self, old: nn.BatchNorm1d | nn.BatchNorm2d, settings: "ActGrad") -> None:
        super().__init__(old.num_features, old.eps, old.momentum, old.affine, device="meta")
        self.weight, self.bias, self.settings = old.weight, old.bias, settings
        for name, buffer in old.named_buffers():
            setattr(self, name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled() and x.numel()):
            return super().forward(x)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        return batch_norm(x, self, self.settings.codec(x))

    def _check_input_dim(self, x: Tensor) -> None:
        """Any number of dimensions: the channels are the second."""


@register("actgrad")
@dataclass(frozen=True, kw_only=True)
class ActGrad(Quantizer):
    """Settings of quantized back propagation: how inputs are stored, and which layers besides conv and linear store less.

    Raises ValueError for power-of-two codes of one bit, which could hold nothing but zeros where values are negative.
    """

    bits: Literal[1, 2, 4, 8] = 4
    scheme: Literal["uniform", "power_of_two"] = "uniform"
    rounding: Literal["nearest", "stochastic"] = "stochastic"
    group: Annotated[int, Ge(1)] | None = 256
    relu_mask: bool = True
    pool_index: bool = True
    norm: Literal["exact", "quantized"] = "exact"

    handles = (nn.Conv2d, nn.Linear, nn.ReLU, nn.MaxPool2d, nn.BatchNorm1d, nn.BatchNorm2d)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scheme == "power_of_two" and self.bits == 1:
            raise ValueError(
                "scheme=power_of_two needs bits of 2, 4 or 8: one for the sign, the others for the exponent"
            )

    def codec(self, x: Tensor) -> Uniform | PowerOfTwo:
        """What a layer with these settings keeps of an input like `x`."""
        scheme = Uniform if self.scheme == "uniform" else PowerOfTwo
        return scheme.of(x, self.bits, stochastic=self.rounding == "stochastic", group=self.group)

    def layer(self, module: nn.Module) -> nn.Module | None:
        match module:
            case nn.Conv2d() | nn.Linear():
                return rewrite(module, self, CodedConv2d, CodedLinear)
            case nn.ReLU() if self.relu_mask:
                return MaskedReLU()
            case nn.MaxPool2d() if self.pool_index and _can_place(module):
                return PlacedMaxPool2d(module)
            case nn.BatchNorm1d() | nn.BatchNorm2d() if self.norm == "quantized" and _is_plain(module):
                return CodedBatchNorm(module, self)
        return None


def _can_place(pool: nn.MaxPool2d) -> bool:
    """Windows of more than 256 values would need more than a byte a maximum; `return_indices` hands the indices out."""
    return Window.of(pool).bits is not None and not pool.return_indices


def _is_plain(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> bool:
    """The usual running statistics; without any, or with their plain average, the layer stays as it is."""
    return norm.track_running_stats and norm.momentum is not None
