"""XNOR-Net: binary weights with a scale, binary activations (Rastegari et al. 2016, arXiv 1603.05279).

    weights      W ~ alpha sign(W),   alpha = mean |W| of each output filter                              eq. 4, 6
    input        I ~ sign(BN(I)),     sign(0) = +1
    layer        y = (sign(BN(I)) * sign(W)) alpha [K] + b,   K = box filter of mean_c |BN(I)|            eq. 11

A layer is self-contained: it carries the batch normalisation before its sign (the paper's block order B-A-C-P), so that
any network can be rewritten. The gradients are in `quant.functional`: `scaled_sign` for weights, `ste_sign` for activations;
quant/README.md derives them. What later binary networks do to the latent weights before the sign is in `quant.latent`.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn
from torch.nn import functional as F

from quant import kernels, matmul, packed
from quant.base import FLOAT, Precision, QuantizedLayer, Quantizer, register
from quant.functional import SignBits, Ste, WeightGradient, scaled_sign, sign, ste_sign
from quant.latent import standardised, window
from quant.layers import Conv2d, Linear, Matrix, rewrite
from quant.sign_gradients import gradients

BATCH_NORM_EPS = 1e-4  # of both public implementations
SCHEDULED_STE = ("ede", "reste")


@dataclass(frozen=True)
class SignConv(matmul.Conv):
    """A convolution with weights alpha s that sums signs and scales the sum: a whole number first, alpha once behind it.

    The same as convolving with alpha s, and to the last bit what a packed kernel computes from popcounts.
    Zero padding adds nothing to the sum, as in conv2d.
    """

    def forward(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return _scaled(super().forward(x, sign(w), None), w, bias, (-1, 1, 1))

    def backward(
        self, g: Tensor, x: Tensor, w: Tensor, need_x: bool, need_w: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        return gradients(g, w, _alpha(w), _Floats(x) if need_w else None, x.shape, matmul.Conv(**vars(self)), need_x)


@dataclass(frozen=True)
class SignLinear(matmul.Linear):
    """The same for a linear layer."""

    def forward(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return _scaled(super().forward(x, sign(w), None), w, bias, (-1,))

    def backward(
        self, g: Tensor, x: Tensor, w: Tensor, need_x: bool, need_w: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        return gradients(g, w, _alpha(w), _Floats(x) if need_w else None, x.shape, matmul.Linear(**vars(self)), need_x)


@dataclass(frozen=True)
class _Floats:
    """Signs that are floats."""

    x: Tensor

    def bits(self) -> Tensor:
        return kernels.pack_activations(self.x)

    def floats(self, dtype: torch.dtype) -> Tensor:
        return self.x.to(dtype)


def _scaled(sums: Tensor, w: Tensor, bias: Tensor | None, channel: tuple[int, ...]) -> Tensor:
    alpha = _alpha(w).to(sums.dtype).view(channel)
    return sums * alpha if bias is None else sums * alpha + bias.to(sums.dtype).view(channel)


def _alpha(w: Tensor) -> Tensor:
    """The scale of every filter of alpha sign(W)."""
    return w.flatten(1)[:, 0].abs()


def window_mean(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """K of eq. 11: the mean of |x| over the channels of a group, then over the filter's window, with the layer's geometry.

    x (B, C, H, W) -> (B, 1, H', W'), or (B, O, H', W') where the layer has groups.
    """
    groups = layer.groups
    channel_mean = x.abs().view(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]).mean(2)
    height, width = layer.kernel_size
    box = x.new_full((groups, 1, height, width), 1 / (height * width))
    means = F.conv2d(channel_mean, box, None, layer.stride, layer.padding, layer.dilation, groups)
    return means if groups == 1 else means.repeat_interleave(layer.out_channels // groups, 1)


class _Binary(QuantizedLayer, Matrix):
    """What the two layers share. `norm` is the batch normalisation before the sign, None where the settings want none."""

    settings: "Xnor"
    norm: nn.BatchNorm1d | nn.BatchNorm2d | None
    sharpness: Tensor | None
    tau: Tensor | None
    geometry: Any  # matmul.Conv or matmul.Linear
    obstacle: str | None  # to computing on packed bits

    def prepare(self) -> None:
        settings = self.settings
        if not (settings.binary_weights or settings.binary_activations):
            raise ValueError(
                "nothing is left to make binary; accepted: binary_weights or binary_activations true, or both"
            )
        self.precision = Precision(
            weight=1 if settings.binary_weights else FLOAT, act=1 if settings.binary_activations else FLOAT
        )
        place: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype}
        with_norm = settings.binary_activations and settings.input_norm == "batch"
        self.norm = self._batch_norm(eps=BATCH_NORM_EPS, **place) if with_norm else None
        curved = settings.binary_activations and settings.ste in SCHEDULED_STE
        self.register_buffer("sharpness", torch.tensor(settings.sharpness, **place) if curved else None, False)
        self.register_buffer("tau", None if settings.tau is None else torch.tensor(settings.tau, **place), False)
        self._decide_kernel()

    def _decide_kernel(self) -> None:
        """Whether this layer may compute on packed bits; what each call must have besides, `packed.obstacle_of_input` says."""
        settings = self.settings
        if not settings.binary_activations:
            self.obstacle = "activations are float"
        elif not settings.binary_weights:
            self.obstacle = "weights are float"
        elif settings.kernel == "float":
            self.obstacle = "as set"
        else:
            self.obstacle = packed.obstacle_of_layer(self.geometry, settings.ste)
        if settings.kernel == "packed" and self.obstacle is not None:
            raise ValueError(f"kernel=packed is impossible ({self.obstacle}); accepted: auto, float")
        if settings.binary_activations:
            self.remark = (
                "packed bits (float32 on a CPU)" if self.obstacle is None else f"float kernel: {self.obstacle}"
            )

    def backward_in_bf16_(self) -> bool:
        """Products of two signs lose nothing: only the gradient that they are multiplied by is rounded."""
        if self.settings.both:
            self.geometry = replace(self.geometry, bf16=True)
        return self.settings.both

    def forward(self, x: Tensor) -> Tensor:
        if not self.settings.binary_activations:
            return self.product(x, self._filters(self._latent_weight()), self.bias)
        x = self._normalised(x)
        if not self.settings.input_scale:
            return self._product_of_signs(x, self.bias)
        y = self._product_of_signs(x, None) * self._input_scale(x)
        return y if self.bias is None else y + self.bias.view(-1, *[1] * (self.weight.dim() - 2))

    def _product_of_signs(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(sign(x) * sign(W)) alpha + b on packed bits where that is possible, else in floats: the same to the last bit."""
        w, settings = self._latent_weight(), self.settings
        obstacle = self.obstacle or packed.obstacle_of_input(x, w, bias)
        if obstacle is None:
            return packed.product_of_signs(x, w, bias, self.geometry, settings.gradient, self._window(w))
        if settings.kernel == "packed":
            raise ValueError(f"kernel=packed is impossible for this input ({obstacle}); accepted: auto, float")
        signs = ste_sign(x, settings.ste, self.sharpness)
        return self.product(signs, self._filters(w), bias, SignBits.of(signs))

    def _filters(self, latent: Tensor) -> Tensor:
        """What the input is multiplied by: alpha sign(V), or V as long as weights are float."""
        if not self.settings.binary_weights:
            return latent
        return scaled_sign(latent, self.settings.gradient, self._window(latent))

    def _window(self, latent: Tensor) -> Tensor | None:
        """The bound within which a weight's sign passes its gradient on; None for 1."""
        return None if self.tau is None else window(latent, self.tau)

    def _batch_norm(self, **settings: Any) -> nn.BatchNorm1d | nn.BatchNorm2d:
        raise NotImplementedError

    def _normalised(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _input_scale(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def _may_centre(self) -> bool:
        return self.weight.shape[1] > 1  # the mean over a single channel is the weight itself: nothing would be left

    def _latent_weight(self) -> Tensor:
        """The weight whose sign is taken. Where it is centred in the graph its gradient is g - mean_c g."""
        w = self.weight
        if self.settings.centre == "graph" and self._may_centre:
            w = w - w.mean(1, keepdim=True)
        if self.settings.standardise and w[0].numel() > 1:  # a filter of one weight would be left with nothing
            w = standardised(w)
        return w

    @torch.no_grad()
    def project_(self) -> None:
        """W <- clamp(W - mean over input channels, -1, 1), as far as the settings ask for it."""
        if self.settings.centre == "project" and self._may_centre:
            self.weight.sub_(self.weight.mean(1, keepdim=True))
        if self.settings.clamp:
            self.weight.clamp_(-1, 1)

    @torch.no_grad()
    def weight_codes(self) -> Tensor | None:
        return sign(self._latent_weight()).to(torch.int8) if self.settings.binary_weights else None

    @torch.no_grad()
    def health(self, x: Tensor) -> dict[str, float]:
        """`step_size`: the mean alpha. `clip_ratio`: the share of inputs outside [-1, 1], normalised by the running figures."""
        figures = {"step_size": self._latent_weight().abs().mean().item()}
        if self.settings.binary_activations:
            if self.norm is not None:
                x = self.by_running_figures(x, self.norm)
            figures["clip_ratio"] = (x.abs() > 1).float().mean().item()
        return figures


class BinaryConv2d(_Binary, Conv2d):
    """y = conv(sign(BN(x)), sign(W)) alpha [K] + b.   x (B, C, H, W) -> (B, O, H', W')"""

    def prepare(self) -> None:
        super().prepare()
        if self.settings.both:
            self.geometry = SignConv.of(self)

    def _batch_norm(self, **settings: Any) -> nn.BatchNorm2d:
        return nn.BatchNorm2d(self.in_channels, **settings)

    def _normalised(self, x: Tensor) -> Tensor:
        return x if self.norm is None else self.norm(x)

    def _input_scale(self, x: Tensor) -> Tensor:
        return window_mean(x, self)


class BinaryLinear(_Binary, Linear):
    """y = (sign(BN(x)) sign(W)^T) alpha [mean |BN(x)| of the row] + b.   x (..., C) -> (..., O)"""

    def prepare(self) -> None:
        super().prepare()
        if self.settings.both:
            self.geometry = SignLinear()

    def _batch_norm(self, **settings: Any) -> nn.BatchNorm1d:
        return nn.BatchNorm1d(self.in_features, **settings)

    def _normalised(self, x: Tensor) -> Tensor:
        return x if self.norm is None else self.norm(matmul.rows(x)).view(x.shape)

    def _input_scale(self, x: Tensor) -> Tensor:
        return x.abs().mean(-1, keepdim=True)


@register("xnor")
@dataclass(frozen=True, kw_only=True)
class Xnor(Quantizer):
    """Settings of XNOR-Net; conf/quant/xnor.yaml says what each one means.

    >>> layer = Xnor().layer(nn.Conv2d(8, 4, 3))
    >>> y = layer(torch.randn(2, 8, 5, 5))
    >>> (tuple(y.shape), layer.precision.weight, layer.precision.act, layer.weight_codes().unique().tolist())
    ((2, 4, 3, 3), 1, 1, [-1, 1])
    """

    gradient: WeightGradient = "exact"
    centre: Literal["none", "project", "graph"] = "project"
    clamp: bool = True
    standardise: bool = False
    tau: Annotated[float, Ge(0.5), Lt(1)] | None = None
    binary_weights: bool = True
    binary_activations: bool = True
    ste: Ste = "clip"
    sharpness: Annotated[float, Gt(0)] = 1.0
    input_norm: Literal["batch", "none"] = "batch"
    input_scale: bool = False
    kernel: Literal["auto", "packed", "float"] = "auto"
    scheduled = ("sharpness", "tau")

    @property
    def both(self) -> bool:
        """Whether a product is one of two signs."""
        return self.binary_weights and self.binary_activations

    def layer(self, module: nn.Module) -> nn.Module:
        return rewrite(module, self, BinaryConv2d, BinaryLinear)
