"""What each layer is as plain data: torch's own, and those of every quantizer. `LAYERS` names them all.

Everything is computed as the layer does in eval mode, to the last bit: batch normalisation by asking torch for its factors,
quantized weights as their codes with the step (and zero or offset) that turns them into the very numbers used in training.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.resnet_blocks import PadShortcut, Shift
from quant import matmul
from quant.actgrad import CodedBatchNorm, CodedConv2d, CodedLinear, PlacedMaxPool2d
from quant.classifier import FixedConv2d, FixedLinear
from quant.dorefa import DorefaConv2d, DorefaLinear
from quant.frugal import MaskedReLU
from quant.functional import filter_mean
from quant.inference.graph import coded
from quant.learned_step import StepQuantizer
from quant.lsq import LsqActivation, LsqConv2d, LsqLinear
from quant.range_bn import RangeBatchNorm1d, RangeBatchNorm2d
from quant.rangebn8 import EightBitConv2d, EightBitLinear
from quant.recomputed_norm import RecomputedBatchNorm2d
from quant.ternary import TernaryConv2d, TernaryLinear, ternary_codes
from quant.uniform import RunningRange, encode, fake_quantize, grid, row_limits, span
from quant.xnor import BinaryConv2d, BinaryLinear

Attrs = Mapping[str, Any]
Tensors = Mapping[str, Tensor | None]


class NotPlain(Exception):
    """A layer or function without a plain form; the message says why."""


class Emit(Protocol):
    """Adds an operation under the layer's name (and `part`), with those tensors that are not None; the value it makes."""

    def __call__(
        self, op: str, inputs: list[int], attrs: Attrs | None = None, tensors: Tensors | None = None, part: str = ""
    ) -> int: ...


def _pair(size: Any) -> list[int]:
    return [size, size] if isinstance(size, int) else [int(size[0]), int(size[1])]


def _without(attrs: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    """The attributes that say something."""
    return {key: value for key, value in attrs.items() if value != defaults.get(key)}


def _geometry(layer: nn.Module) -> dict[str, Any]:
    """Attributes of a convolution; none for a linear layer."""
    if not isinstance(layer, nn.Conv2d):
        return {}
    try:
        conv = matmul.Conv.of(layer)
    except ValueError as error:
        raise NotPlain(str(error)) from error
    pairs = {"stride": _pair(conv.stride), "padding": _pair(conv.padding), "dilation": _pair(conv.dilation)}
    return _without(pairs | {"groups": conv.groups}, stride=[1, 1], padding=[0, 0], dilation=[1, 1], groups=1)


def _product(emit: Emit, layer: Any, x: int, attrs: Attrs, tensors: Tensors) -> int:
    """A convolution or a linear layer with a weight of its own; its bias, unless `tensors` has another."""
    op = "conv2d" if isinstance(layer, nn.Conv2d) else "linear"
    return emit(op, [x], _geometry(layer) | {**attrs}, {"bias": layer.bias, **tensors})


def _coded_product(emit: Emit, layer: Any, x: int, codes: Tensor, bits: int, numbers: Tensors) -> int:
    """The same with codes of a few bits; numbers: step, zero, offset."""
    attrs, planes = coded(codes, bits)
    flat = {key: None if n is None else n.reshape(-1) for key, n in numbers.items()}
    return _product(emit, layer, x, attrs, planes | flat)


# ---- torch's layers --------------------------------------------------------------------------------------------------


def _float_product(emit: Emit, layer: Any, x: int) -> int:
    return _product(emit, layer, x, {}, {"weight": layer.weight})


def batch_norm_vectors(norm: Any) -> tuple[Tensor, Tensor]:
    """(scale, shift) with which torch computes fma(x, scale, shift) in eval: asked for, so that nothing is rounded twice.

    >>> norm = nn.BatchNorm1d(3).eval()
    >>> norm.running_var.copy_(torch.tensor([1.0, 2.0, 3.0]))
    tensor([1., 2., 3.])
    >>> scale, shift = batch_norm_vectors(norm)
    >>> x = torch.randn(5, 3)
    >>> torch.equal(torch.addcmul(shift, x, scale), norm(x))
    True
    """
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        raise NotPlain("a batch normalisation without running figures")
    zeros, ones = torch.zeros_like(mean), torch.ones_like(mean)
    with torch.no_grad():
        scale = F.batch_norm(ones[None], zeros, var, norm.weight, None, False, 0.0, norm.eps)[0]
        shift = F.batch_norm(zeros[None], mean, var, norm.weight, norm.bias, False, 0.0, norm.eps)[0]
    return scale, shift


def _batch_norm(emit: Emit, norm: Any, x: int, part: str = "") -> int:
    scale, shift = batch_norm_vectors(norm)
    return emit("affine", [x], None, {"scale": scale, "shift": shift}, part)


def _simple(op: str) -> Callable[[Emit, Any, int], int]:
    return lambda emit, layer, x: emit(op, [x])


def _clamp(emit: Emit, layer: nn.Hardtanh, x: int) -> int:
    return emit("clamp", [x], {"low": float(layer.min_val), "high": float(layer.max_val)})


def _gelu(emit: Emit, layer: nn.GELU, x: int) -> int:
    if layer.approximate != "none":
        raise NotPlain(f"GELU approximated by {layer.approximate}")
    return emit("gelu", [x])


def _max_pool(emit: Emit, layer: nn.MaxPool2d, x: int) -> int:
    if layer.return_indices:
        raise NotPlain("a max-pool that returns indices")
    return emit("max_pool2d", [x], _window(layer) | _without({"dilation": _pair(layer.dilation)}, dilation=[1, 1]))


def _avg_pool(emit: Emit, layer: nn.AvgPool2d, x: int) -> int:
    if layer.divisor_override is not None:
        raise NotPlain("a mean with another divisor")
    return emit(
        "avg_pool2d", [x], _window(layer) | _without({"count_padding": layer.count_include_pad}, count_padding=True)
    )


def _window(layer: Any) -> dict[str, Any]:
    kernel = _pair(layer.kernel_size)
    rest = {"stride": _pair(layer.stride or kernel), "padding": _pair(layer.padding), "ceil": layer.ceil_mode}
    return {"kernel": kernel} | _without(rest, stride=kernel, padding=[0, 0], ceil=False)


def _adaptive_pool(emit: Emit, layer: nn.AdaptiveAvgPool2d, x: int) -> int:
    size = layer.output_size if isinstance(layer.output_size, tuple) else (layer.output_size,) * 2
    if None in size:
        raise NotPlain("a pool that keeps one side")
    return emit("adaptive_avg_pool2d", [x], {"size": list(size)})


def _flatten(emit: Emit, layer: nn.Flatten, x: int) -> int:
    if (layer.start_dim, layer.end_dim) != (1, -1):
        raise NotPlain(f"flattens from {layer.start_dim} to {layer.end_dim}; known: from 1 to the last")
    return emit("flatten", [x])


def _pad_shortcut(emit: Emit, layer: PadShortcut, x: int) -> int:
    return emit("pad_shortcut", [x], {"stride": layer.stride, "extra": layer.extra_channels})


def _fixed(emit: Emit, layer: FixedLinear | FixedConv2d, x: int) -> int:
    """A matrix of +1 and -1 takes one bit a number, another one stays float."""
    unit = emit("unit", [x], {"dim": 1}, part="unit")
    if bool((layer.weight.abs() == 1).all()):
        return _coded_product(emit, layer, unit, layer.weight < 0, 1, {"step": layer.scale})
    return _product(emit, layer, unit, {}, {"weight": layer.weight * layer.scale})


# ---- activations on a grid -------------------------------------------------------------------------------------------


def _short(number: Tensor) -> float:
    """A float32 in as few digits as give it back."""
    return float(str(number.detach().cpu().numpy().astype("float32")[()]))


def _learned_codes(emit: Emit, quantizer: StepQuantizer, x: int) -> int:
    attrs = {"step": _short(quantizer.size().squeeze()), "low": -int(quantizer.qn), "high": int(quantizer.qp)}
    if quantizer.offset is not None:
        attrs["offset"] = _short(quantizer.offset.squeeze())
    return emit("quantize", [x], attrs, part="input")


def _range_codes(emit: Emit, measured: RunningRange, x: int) -> int:
    if not int(measured.batches):
        raise NotPlain("its ranges were never measured; train it first")
    if not bool(measured.low.isfinite() & measured.high.isfinite()):
        raise NotPlain("not all numbers of its ranges are finite")
    g = grid(measured.low, measured.high, measured.bits, measured.zero_exact)
    zero, top, step = int(g.offset) if g.zero_exact else 0, 2**measured.bits - 1, _short(g.step)
    attrs: dict[str, Any] = {"step": step, "low": -zero, "high": top - zero}
    return emit("quantize", [x], attrs | ({} if g.zero_exact else {"offset": _short(g.offset)}), part="input")


# ---- layers of the quantizers ----------------------------------------------------------------------------------------


def _binary(emit: Emit, layer: BinaryConv2d | BinaryLinear, x: int) -> int:
    latent, bias = layer._latent_weight(), layer.bias
    if not layer.settings.binary_activations:
        return _coded_product(emit, layer, x, latent < 0, 1, {"step": filter_mean(latent.abs()).flatten()})
    if layer.norm is not None:
        x = _batch_norm(emit, layer.norm, x, part="norm")
    if not layer.settings.input_scale:
        return _sign_product(emit, layer, x, latent, bias)
    y = _sign_product(emit, layer, x, latent, None)
    window = _geometry(layer)
    if isinstance(layer, nn.Conv2d):
        window["kernel"] = _pair(layer.kernel_size)
        if layer.groups > 1:
            window["out_channels"] = layer.out_channels
    k = emit("input_scale", [x], window, part="K")
    y = emit("mul", [y, k], part="scaled")
    return y if bias is None else emit("affine", [y], None, {"shift": bias}, "moved")


def _sign_product(emit: Emit, layer: Any, x: int, latent: Tensor, bias: Tensor | None) -> int:
    """On packed bits; a convolution with groups or dilation, which the packed kernels do not have, in floats; and as long as
    weights are float."""
    if not layer.settings.binary_weights:
        return _product(emit, layer, emit("sign", [x], part="sign"), {}, {"weight": latent, "bias": bias})
    alpha, (attrs, planes) = filter_mean(latent.abs()).flatten(), coded(latent < 0, 1)
    geometry = _geometry(layer)
    if geometry.keys() & {"groups", "dilation"}:
        signs = emit("sign", [x], part="sign")
        sums = emit("conv2d", [signs], geometry | attrs, planes)
        scaled = emit("affine", [sums], None, {"scale": alpha}, "alpha")
        return scaled if bias is None else emit("affine", [scaled], None, {"shift": bias}, "bias")
    op = "sign_conv2d" if isinstance(layer, nn.Conv2d) else "sign_linear"
    return emit(op, [x], geometry | attrs, planes | {"step": alpha, "bias": bias})


def _learned(emit: Emit, layer: LsqConv2d | LsqLinear, x: int) -> int:
    if layer.act_quantizer is not None:
        x = _learned_codes(emit, layer.act_quantizer, x)
    of = layer.weight_quantizer
    codes = of.codes(layer.weight).to(torch.int32) + of.qn
    numbers = {"step": of.size(), "zero": of.qn.to(torch.float32)}
    return _coded_product(emit, layer, x, codes, of.settings.bits, numbers)


def _learned_activation(emit: Emit, layer: LsqActivation, x: int) -> int:
    x = LAYERS[type(layer.activation)](emit, layer.activation, x)
    return _learned_codes(emit, layer.act_quantizer, x)


def _eight_bit(emit: Emit, layer: EightBitConv2d | EightBitLinear, x: int) -> int:
    of, bias = layer.settings, layer.bias
    x = _range_codes(emit, layer.input_range, x)
    g = grid(*row_limits(layer.weight), of.weight_bits, of.zero_exact)
    codes = encode(layer.weight.detach(), g, of.weight_bits).to(torch.int32) + (2**15 if of.weight_bits > 8 else 0)
    if bias is not None:
        bias = fake_quantize(bias, span(bias, of.bias_bits, of.zero_exact), of.bias_bits)
    numbers = {"step": g.step, "zero" if g.zero_exact else "offset": g.offset, "bias": bias}
    return _coded_product(emit, layer, x, codes, of.weight_bits, numbers)


def _range_norm(emit: Emit, norm: RangeBatchNorm1d | RangeBatchNorm2d, x: int) -> int:
    if norm.running_mean is None or norm.running_var is None:
        raise NotPlain("a batch normalisation without running figures")
    if norm.input_range is not None:
        x = _range_codes(emit, norm.input_range, x)
    s = norm.running_var.sqrt() + norm.eps
    scale = 1 / s if norm.weight is None else norm.weight / s
    shift = -norm.running_mean * scale if norm.bias is None else norm.bias - norm.running_mean * scale
    return emit("affine", [x], None, {"scale": scale, "shift": shift})


def _dorefa(emit: Emit, layer: DorefaConv2d | DorefaLinear, x: int) -> int:
    of = layer.settings
    if layer.norm is not None:
        x = _batch_norm(emit, layer.norm, x, part="norm")
    x = emit("clamp", [x], {"low": 0.0, "high": 1.0}, part="clip")
    top = 2**of.act_bits - 1
    step = _short(torch.tensor(1 / top))
    x = emit("quantize", [x], {"step": step, "inverse": top, "low": 0, "high": top}, part="input")
    codes, highest = layer.weight_codes().to(torch.int32), 2**of.weight_bits - 1
    if of.weight_bits == 1:
        return _coded_product(emit, layer, x, codes < 0, 1, {"step": layer.weight.abs().mean()})
    numbers = {"step": torch.tensor(1 / highest) * 2, "offset": torch.tensor(-1.0)}
    return _coded_product(emit, layer, x, (codes + highest) // 2, of.weight_bits, numbers)


def _ternary(emit: Emit, layer: TernaryConv2d | TernaryLinear, x: int) -> int:
    codes, alpha = ternary_codes(layer.weight.detach(), layer.settings.threshold, layer.settings.scale)
    numbers = {"step": alpha, "zero": torch.ones(1)}
    return _coded_product(emit, layer, x, codes.to(torch.int32) + 1, 2, numbers)


LAYERS: dict[type[nn.Module], Callable[[Emit, Any, int], int]] = {
    **dict.fromkeys((nn.Conv2d, nn.Linear, CodedConv2d, CodedLinear), _float_product),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, CodedBatchNorm, RecomputedBatchNorm2d), _batch_norm),
    **dict.fromkeys((nn.ReLU, MaskedReLU), _simple("relu")),
    **dict.fromkeys((nn.ReLU6, nn.Hardtanh), _clamp),
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout2d), lambda emit, layer, x: x),
    **{kind: _simple(kind.__name__.lower()) for kind in (nn.Sigmoid, nn.Tanh, nn.SiLU, nn.Hardswish, nn.Hardsigmoid)},
    nn.GELU: _gelu,
    nn.PReLU: lambda emit, layer, x: emit("prelu", [x], None, {"slope": layer.weight}),
    nn.LeakyReLU: lambda emit, layer, x: emit("leaky_relu", [x], {"slope": layer.negative_slope}),
    **dict.fromkeys((nn.MaxPool2d, PlacedMaxPool2d), _max_pool),
    nn.AvgPool2d: _avg_pool,
    nn.AdaptiveAvgPool2d: _adaptive_pool,
    nn.Flatten: _flatten,
    PadShortcut: _pad_shortcut,
    Shift: lambda emit, layer, x: emit("affine", [x], None, {"shift": layer.bias}),
    **dict.fromkeys((FixedLinear, FixedConv2d), _fixed),
    **dict.fromkeys((BinaryConv2d, BinaryLinear), _binary),
    **dict.fromkeys((LsqConv2d, LsqLinear), _learned),
    LsqActivation: _learned_activation,
    **dict.fromkeys((EightBitConv2d, EightBitLinear), _eight_bit),
    **dict.fromkeys((RangeBatchNorm1d, RangeBatchNorm2d), _range_norm),
    **dict.fromkeys((DorefaConv2d, DorefaLinear), _dorefa),
    **dict.fromkeys((TernaryConv2d, TernaryLinear), _ternary),
}
