"""A convolution and a linear layer built from existing ones: the ground that a method's layers stand on.

    class _Mine(QuantizedLayer, Matrix):                    # what both layers of a method share
        settings: "Mine"
        def forward(self, x: Tensor) -> Tensor:
            return self.product(x, quantize(self.weight), self.bias)

    class MyConv2d(_Mine, Conv2d): ...
    class MyLinear(_Mine, Linear): ...

Parameters are taken over as they are, so float checkpoints load by name and nothing random is drawn.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from quant import matmul


class Matrix(nn.Module):
    """A layer with a weight, perhaps a bias, the settings of its method, and a product of its own kind."""

    weight: Tensor
    bias: Tensor | None
    settings: Any

    def prepare(self) -> None:
        """What a method adds to a layer that stands already: submodules, buffers, its precision."""

    def product(
        self,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        codec: matmul.Codec | None = None,
        unit: Tensor | None = None,
        **maps: matmul.GradientMap,
    ) -> Tensor:
        """x * w + bias in this layer's geometry.

        `codec` says what is kept of x for backward, `unit` what w is whole numbers of; maps `grad_input` and `grad_weight`
        quantize the gradient (`quant.matmul`).
        """
        raise NotImplementedError

    def by_channel(self, x: Tensor) -> Tensor:
        """An input as its batch norm takes it: images as they are, (*, N) of a linear layer as a matrix (M, N)."""
        return x if self.weight.dim() == 4 else matmul.rows(x)

    def by_running_figures(self, x: Tensor, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> Tensor:
        """The input as `norm` would hand it on in evaluation, whatever mode it is in."""
        x = self.by_channel(x)
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


class Conv2d(Matrix, nn.Conv2d):
    """The convolution `old` under new settings.

    Raises ValueError for a padding that is not plain zeros given in pixels.

    >>> old = nn.Conv2d(4, 8, 3, stride=2, bias=False)
    >>> new = Conv2d(old, settings=None)
    >>> new.weight is old.weight, new.bias, new.stride
    (True, None, (2, 2))
    """

    def __init__(self, old: nn.Conv2d, settings: Any) -> None:
        geometry = matmul.Conv.of(old)
        sizes = (old.kernel_size, geometry.stride, geometry.padding, geometry.dilation)
        kernel, stride, padding, dilation = ((size[0], size[1]) for size in sizes)
        channels = old.in_channels, old.out_channels
        super().__init__(*channels, kernel, stride, padding, dilation, old.groups, device="meta")
        self.weight, self.bias, self.geometry, self.settings = old.weight, old.bias, geometry, settings
        self.prepare()

    def product(
        self,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        codec: matmul.Codec | None = None,
        unit: Tensor | None = None,
        **maps: matmul.GradientMap,
    ) -> Tensor:
        return matmul.conv2d(x, w, bias, self.geometry, codec, unit, **maps)


class Linear(Matrix, nn.Linear):
    """The linear layer `old` under new settings."""

    bias: Tensor | None  # type: ignore[assignment]  # torch declares it as never None

    def __init__(self, old: nn.Linear, settings: Any) -> None:
        super().__init__(old.in_features, old.out_features, device="meta")
        self.weight, self.bias, self.geometry, self.settings = old.weight, old.bias, matmul.Linear(), settings
        self.prepare()

    def product(
        self,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        codec: matmul.Codec | None = None,
        unit: Tensor | None = None,
        **maps: matmul.GradientMap,
    ) -> Tensor:
        return matmul.linear(x, w, bias, codec, unit, shape=self.geometry, **maps)


def rewrite(module: nn.Module, settings: Any, conv: type[Conv2d], linear: type[Linear]) -> nn.Module:
    """`module` as one of a method's two layers. Raises ValueError for a module of another kind."""
    if isinstance(module, nn.Conv2d):
        return conv(module, settings)
    if isinstance(module, nn.Linear):
        return linear(module, settings)
    raise ValueError(f"{settings.name} rewrites Conv2d and Linear, not {type(module).__name__}")
