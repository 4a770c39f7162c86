"""LSQ: weights and activations at 2 to 8 bits with step sizes that are learned (Esser et al., arXiv 1902.08153).

    w_q = lsq_quantize(w, s_w)      x_q = lsq_quantize(x, s_x)      y = x_q * w_q + b

`quant.learned_step` has `lsq_quantize` with its gradients. The gradient of a step is multiplied by 1 / sqrt(N Qp) (section
2.2), with N the weights of the layer, or the features of one sample. quant/README.md compares the presets.
"""

from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt, Interval
from torch import Tensor, nn

from quant import integer, lsq_product, matmul
from quant.base import FLOAT, Precision, QuantizedLayer, Quantizer, register
from quant.layers import Conv2d, Linear, Matrix, rewrite
from quant.learned_step import GradScale, Init, Param, Range, StepCodes, StepQuantizer, StepSettings, StepSte
from quant.recomputed_norm import RecomputedBatchNorm2d

WeightRange = Literal["full", "symmetric"]
Granularity = Literal["tensor", "channel"]
Placement = Literal["layer_input", "post_act"]
Preset = Literal["v3", "v1", "plain", "plus"]
ACTIVATIONS = (nn.ReLU, nn.ReLU6)


@dataclass(frozen=True)
class Switches:
    """Everything in which the presets differ. The defaults are v3, the paper's last version."""

    weight_range: WeightRange = "full"
    weight_ste: StepSte = "clipped"
    weight_steps: Granularity = "tensor"
    act_range: Range = "auto"
    act_offset: bool = False
    placement: Placement = "layer_input"
    grad_scale: GradScale = "1/sqrt_n_qp"
    grad_scale_batch: bool = False
    step_init: Init = "lsq"
    step_param: Param = "raw"


PRESETS: dict[Preset, Switches] = {
    "v3": Switches(),
    "v1": Switches(weight_range="symmetric"),
    "plain": Switches(
        weight_range="symmetric",
        weight_ste="passthrough",
        act_range="symmetric",
        placement="post_act",
        grad_scale="none",
    ),
    "plus": Switches(act_range="unsigned", act_offset=True, step_init="lsq+", step_param="softplus"),
}


# ---- layers -------------------------------------------------------------------------------------------------------------


class _Learned(QuantizedLayer, Matrix):
    """What the two matrix layers share. `act_quantizer` is None where activations are quantized behind the ReLUs."""

    no_decay = ("weight_quantizer.step", "act_quantizer.step", "act_quantizer.offset")
    settings: "Lsq"
    geometry: Any  # matmul.Conv or matmul.Linear
    weight_quantizer: StepQuantizer
    act_quantizer: StepQuantizer | None

    def prepare(self) -> None:
        settings, w = self.settings, self.weight
        channels = settings.switches.weight_steps == "channel"
        shape = (len(w), *[1] * (w.dim() - 1)) if channels else (1,)
        self.weight_quantizer = StepQuantizer(settings.for_weights(), shape, w)
        self.weight_quantizer.calibrate_(w)
        inside = settings.switches.placement == "layer_input"
        self.act_quantizer = StepQuantizer(settings.for_activations(), (1,), w) if inside else None
        self.precision = Precision(weight=settings.weight_bits, act=settings.act_bits if inside else FLOAT)

    def forward(self, x: Tensor) -> Tensor:
        if self._counts(x):
            return self._product_of_codes(x)
        x, codec = self._quantized_input(x)
        w = self.weight_quantizer
        return self.product(x, w(self.weight), self.bias, codec, w.size().detach())

    def backward_in_bf16_(self) -> bool:
        """Codes lose nothing in bfloat16, of which an input with an offset has none."""
        if self._of_codes():
            self.geometry = replace(self.geometry, bf16=True)
        return self._of_codes()

    def _of_codes(self) -> bool:
        """Whether both operands are whole numbers times their steps."""
        return self.act_quantizer is not None and self.act_quantizer.offset is None

    def _counts(self, x: Tensor) -> bool:
        """Whether this call is a convolution of whole numbers."""
        if not self._of_codes() or self.weight_quantizer.step.numel() > 1 or not isinstance(self.geometry, matmul.Conv):
            return False
        exact = integer.fits(self.weight, 1 << self.settings.act_bits, 1 << self.settings.weight_bits - 1)
        return exact and lsq_product.obstacle(x, self.weight) is None

    def _product_of_codes(self, x: Tensor) -> Tensor:
        a, w = self.act_quantizer, self.weight_quantizer
        assert a is not None
        assert isinstance(self.geometry, matmul.Conv)
        of_x, of_w, kernel = a.learned(x), w.learned(self.weight), self.settings.kernel
        return lsq_product.conv2d(x, a.size(), self.weight, w.size(), self.bias, of_x, of_w, self.geometry, kernel)

    def _quantized_input(self, x: Tensor) -> tuple[Tensor, StepCodes | None]:
        """x_q, and how to remember it."""
        if self.act_quantizer is None:
            return x, None
        x_q = self.act_quantizer(x)
        return x_q, self.act_quantizer.codec(x_q)

    def calibrate_(self, x: Tensor) -> None:
        self.weight_quantizer.calibrate_(self.weight)
        if self.act_quantizer is not None:
            self.act_quantizer.calibrate_(x)

    def project_(self) -> None:
        self.weight_quantizer.bound_()
        if self.act_quantizer is not None:
            self.act_quantizer.bound_()

    def has_fitting_levels(self) -> bool:
        return all(q is None or q.has_fitting_levels() for q in (self.weight_quantizer, self.act_quantizer))

    def weight_codes(self) -> Tensor:
        return self.weight_quantizer.codes(self.weight)

    def health(self, x: Tensor) -> dict[str, float]:
        """Figures of the activations (of the weights, where the activations are quantized elsewhere); dead steps of both."""
        of_weights = self.weight_quantizer.health(self.weight)
        if self.act_quantizer is None:
            return of_weights
        figures = self.act_quantizer.health(x)
        return figures | {
            "weight_step_size": of_weights["step_size"],
            "dead_steps": max(figures["dead_steps"], of_weights["dead_steps"]),
        }


class LsqConv2d(_Learned, Conv2d):
    """y = conv(x_q, w_q) + b.   x (B, C, H, W) -> (B, O, H', W')"""


class LsqLinear(_Learned, Linear):
    """y = x_q w_q^T + b.   x (..., C) -> (..., O)"""


class LsqActivation(QuantizedLayer, nn.Module):
    """A ReLU (or ReLU6) with the quantizer behind it, for `placement: post_act`. Its step is made on the CPU, in float32."""

    no_decay = ("act_quantizer.step", "act_quantizer.offset")

    def __init__(self, old: nn.Module, settings: "Lsq") -> None:
        super().__init__()
        self.activation = old
        self.act_quantizer = StepQuantizer(settings.for_activations(), (1,), torch.empty(0))
        self.precision = Precision(act=settings.act_bits)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(x)
        return self.act_quantizer(x)  # type: ignore[no-any-return]

    def calibrate_(self, x: Tensor) -> None:
        self.act_quantizer.calibrate_(self.activation(x))

    def has_fitting_levels(self) -> bool:
        return self.act_quantizer.has_fitting_levels()

    def project_(self) -> None:
        self.act_quantizer.bound_()

    def health(self, x: Tensor) -> dict[str, float]:
        return self.act_quantizer.health(self.activation(x))


# ---- settings -----------------------------------------------------------------------------------------------------------


@register("lsq")
@dataclass(frozen=True, kw_only=True)
class Lsq(Quantizer):
    """Settings of LSQ; conf/quant/lsq.yaml says what each one means. A switch that is None is as the preset has it.

    Raises ValueError for 1 bit and for numbers of bits outside 2 .. 8.

    >>> Lsq(preset="plain", weight_ste="clipped").switches.grad_scale
    'none'
    >>> layer = Lsq(weight_bits=3).layer(nn.Conv2d(8, 4, 3))
    >>> layer.precision
    Precision(weight=3, act=4, grad=32)
    """

    preset: Preset = "v3"
    weight_bits: Annotated[int, Interval(ge=1, le=8)] = 4
    act_bits: Annotated[int, Interval(ge=1, le=8)] = 4
    weight_range: WeightRange | None = None
    weight_ste: StepSte | None = None
    weight_steps: Granularity | None = None
    act_range: Range | None = None
    act_offset: bool | None = None
    placement: Placement | None = None
    grad_scale: GradScale | None = None
    grad_scale_batch: bool | None = None
    step_init: Init | None = None
    step_constant: Annotated[float, Gt(0)] = 1.0
    step_param: Param | None = None
    step_change: Annotated[float, Interval(gt=0, lt=1)] | None = 0.1
    kernel: Literal["auto", "float"] = "auto"
    norm_input: Literal["recomputed", "kept"] = "recomputed"
    handles = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, *ACTIVATIONS)

    def __post_init__(self) -> None:
        for key, bits in (("weight_bits", self.weight_bits), ("act_bits", self.act_bits)):
            if bits == 1:
                raise ValueError(f"{key}: 1, but lsq needs 2 to 8: one bit has no level left beside 0; use quant=xnor")
            if bits not in range(2, 9):
                raise ValueError(f"lsq: {key} is {bits!r}; accepted: 2 to 8")
        super().__post_init__()

    @property
    def switches(self) -> Switches:
        """The preset with what was set beside it."""
        own = {f.name: getattr(self, f.name) for f in fields(Switches)}
        return replace(PRESETS[self.preset], **{name: value for name, value in own.items() if value is not None})

    def for_weights(self) -> StepSettings:
        switches = self.switches
        return StepSettings(
            bits=self.weight_bits,
            kind="signed" if switches.weight_range == "full" else "symmetric",
            ste=switches.weight_ste,
            grad_scale=switches.grad_scale,
            init="three_sigma" if switches.step_init == "lsq+" else switches.step_init,
            constant=self.step_constant,
            param=switches.step_param,
            change=self.step_change,
        )

    def for_activations(self) -> StepSettings:
        switches = self.switches
        return StepSettings(
            bits=self.act_bits,
            kind=switches.act_range,
            offset=switches.act_offset,
            per_sample=not switches.grad_scale_batch,
            grad_scale=switches.grad_scale,
            init="mse" if switches.step_init == "lsq+" else switches.step_init,
            constant=self.step_constant,
            param=switches.step_param,
            change=self.step_change,
        )

    def layer(self, module: nn.Module) -> nn.Module | None:
        if isinstance(module, ACTIVATIONS):
            return LsqActivation(module, self) if self.switches.placement == "post_act" else None
        if isinstance(module, nn.BatchNorm2d):
            return RecomputedBatchNorm2d(module) if self.norm_input == "recomputed" else None
        return rewrite(module, self, LsqConv2d, LsqLinear)
