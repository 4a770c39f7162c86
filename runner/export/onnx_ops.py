"""How each operation is written in ONNX's standard operators. `WRITERS` names them all.

activations               QuantizeLinear / DequantizeLinear in uint8, clipped to the levels of fewer bits
other grids               Sub, Div, Round, Clip, Mul, Add: what the grid means (an offset that is no whole number of steps)
weights                   DequantizeLinear of their codes, int4 up to 4 bits, else int8
binary layers             signs with sign(0) = +1 (GreaterOrEqual, Cast, Mul, Sub), Conv with the signs, Mul, Add
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from quant.inference.graph import Node, unpack_planes, weight_of
from runner.faults import BadData

TO_ROWS = {"flatten", "spatial_mean"}
LEVELS = 255  # from the first to the last code of 8 bits


class Writer:
    """The nodes and constants so far."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.remarks: list[str] = []
        self.rows: set[str] = set()  # values that are rows (N, C), not images

    def add(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, value: Tensor | float) -> str:
        array = torch.as_tensor(value, dtype=torch.float32).detach().numpy()
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def whole(self, name: str, value: Tensor, kind: int) -> str:
        """A constant of a small integer type, as raw bytes; int4 lie two in a byte, the first in the low half."""
        codes = value.flatten().to(torch.int32) & (15 if kind == TensorProto.INT4 else 255)
        if kind == TensorProto.INT4:
            pairs = torch.nn.functional.pad(codes, (0, len(codes) % 2)).view(-1, 2)
            codes = pairs[:, 0] | pairs[:, 1] << 4
        raw = codes.to(torch.uint8).numpy().tobytes()
        self.constants.append(helper.make_tensor(name, kind, list(value.shape), raw, raw=True))
        return name


# ---- weights ---------------------------------------------------------------------------------------------------------


def _weight(writer: Writer, node: Node) -> str:
    """The weight as an initializer: float, or DequantizeLinear of its codes."""
    if "weight" in node.tensors:
        return writer.constant(f"{node.name}.weight", node.tensors["weight"])
    codes, zero = _signed_codes(node)
    if codes is None or zero is None:
        writer.remarks.append(f"{node.name}: weights are stored as float32, their grid has no integer zero point")
        return writer.constant(f"{node.name}.weight", weight_of(node))
    step = node.tensors.get("step", torch.ones(1)).reshape(-1)
    kind = TensorProto.INT4 if len(node.tensors["codes"]) <= 4 else TensorProto.INT8
    count = max(len(step), len(zero))
    size = () if count == 1 else (count,)
    parts = [
        writer.whole(f"{node.name}.weight_codes", codes, kind),
        writer.constant(f"{node.name}.weight_step", step.expand(count).reshape(size)),
        writer.whole(f"{node.name}.weight_zero", zero.expand(count).reshape(size), kind),
    ]
    return writer.add("DequantizeLinear", parts, f"{node.name}.weight", **({"axis": 0} if size else {}))


def _signed_codes(node: Node) -> tuple[Tensor | None, Tensor | None]:
    """Codes and zero points moved into the range of a signed type; None where the grid is not of that kind."""
    bits = len(node.tensors["codes"])
    codes = unpack_planes(node.tensors["codes"], node.attrs["shape"]).to(torch.int32)
    if bits == 1:
        return 1 - 2 * codes, torch.zeros(1, dtype=torch.int32)
    if bits > 8 or "offset" in node.tensors:
        return None, None
    middle = 1 << (bits - 1)
    zero = (
        node.tensors["zero"].reshape(-1).to(torch.int32)
        if "zero" in node.tensors
        else torch.zeros(1, dtype=torch.int32)
    )
    return codes - middle, zero - middle


def _conv_attributes(attrs: Mapping[str, Any]) -> dict[str, Any]:
    padding = attrs.get("padding", [0, 0])
    return {
        "strides": attrs.get("stride", [1, 1]),
        "pads": [*padding, *padding],
        "dilations": attrs.get("dilation", [1, 1]),
        "group": attrs.get("groups", 1),
    }


def _conv(writer: Writer, node: Node, x: list[str]) -> str:
    return _biased(writer, node, x, "Conv", **_conv_attributes(node.attrs))


def _linear(writer: Writer, node: Node, x: list[str]) -> str:
    return _biased(writer, node, x, "Gemm", transB=1)


def _biased(writer: Writer, node: Node, x: list[str], kind: str, **attributes: Any) -> str:
    """A product and its bias. Behind codes the bias is added apart: onnxruntime would round it to the steps of the product."""
    inputs = [*x, _weight(writer, node)]
    if "bias" not in node.tensors:
        return writer.add(kind, inputs, node.name, **attributes)
    if "weight" in node.tensors:
        bias = writer.constant(f"{node.name}.bias", node.tensors["bias"])
        return writer.add(kind, [*inputs, bias], node.name, **attributes)
    product = writer.add(kind, inputs, f"{node.name}.product", **attributes)
    return writer.add("Add", [product, _channels(writer, node, "bias", x[0])], node.name)


# ---- signs -----------------------------------------------------------------------------------------------------------


def _sign(writer: Writer, name: str, x: str) -> str:
    """+1 where x >= 0, else -1. ONNX's own Sign has a third value, for 0."""
    zero, one, two = (
        writer.constant(f"{name}.{word}", number) for word, number in (("0", 0.0), ("1", 1.0), ("2", 2.0))
    )
    above = writer.add("GreaterOrEqual", [x, zero], f"{name}.above")
    flags = writer.add("Cast", [above], f"{name}.flags", to=TensorProto.FLOAT)
    return writer.add("Sub", [writer.add("Mul", [flags, two], f"{name}.doubled"), one], f"{name}.signs")


def _signed_product(writer: Writer, node: Node, x: list[str]) -> str:
    """Sums of signs first, which are whole numbers, then scale and bias: as in training."""
    signs = _sign(writer, node.name, x[0])
    bare = Node(node.op, node.name, (), node.attrs, {"codes": node.tensors["codes"]})
    weight, last = _weight(writer, bare), f"{node.name}.sums"
    if node.op == "sign_conv2d":
        last = writer.add("Conv", [signs, weight], last, **_conv_attributes(node.attrs))
    else:
        last = writer.add("Gemm", [signs, weight], last, transB=1)
    for key, kind in (("step", "Mul"), ("bias", "Add")):
        if key in node.tensors:
            last = writer.add(kind, [last, _channels(writer, node, key, x[0])], f"{node.name}.with_{key}")
    return last


def _channels(writer: Writer, node: Node, key: str, x: str) -> str:
    """One number a channel of x, to be broadcast."""
    flat = node.tensors[key].reshape(-1)
    return writer.constant(f"{node.name}.{key}", flat if x in writer.rows else flat.view(-1, 1, 1))


# ---- activations on a grid -------------------------------------------------------------------------------------------


def _quantize(writer: Writer, node: Node, x: list[str]) -> str:
    """Codes low .. high as 0 .. high - low in uint8; of fewer levels than that has, the others are clipped away first.

    Always uint8: onnxruntime (1.31) moves grids through a MaxPool, which takes no 4-bit types, and then mistakes int8 for it.
    """
    at, name = node.attrs, node.name
    low, high = int(at["low"]), int(at["high"])
    step = writer.constant(f"{name}.step", at["step"])
    if "offset" in at or "inverse" in at or high - low > LEVELS or low > 0:
        return _on_grid(writer, node, x[0], step)
    clipped = x[0]
    if high - low < LEVELS:
        limits = [writer.constant(f"{name}.{word}", at[word] * at["step"]) for word in ("low", "high")]
        clipped = writer.add("Clip", [clipped, *limits], f"{name}.clipped")
    zero = writer.whole(f"{name}.zero", torch.tensor(-low), TensorProto.UINT8)
    codes = writer.add("QuantizeLinear", [clipped, step, zero], f"{name}.codes")
    return writer.add("DequantizeLinear", [codes, step, zero], name)


def _on_grid(writer: Writer, node: Node, x: str, step: str) -> str:
    """step round(clip((x - offset) / step)) + offset, in floats."""
    at, name = node.attrs, node.name
    offset = writer.constant(f"{name}.offset", at["offset"]) if "offset" in at else None
    if offset is not None:
        x = writer.add("Sub", [x, offset], f"{name}.moved")
    if "inverse" in at:
        x = writer.add("Mul", [x, writer.constant(f"{name}.inverse", at["inverse"])], f"{name}.in_steps")
    else:
        x = writer.add("Div", [x, step], f"{name}.in_steps")
    rounded = writer.add("Round", [x], f"{name}.rounded")
    limits = [writer.constant(f"{name}.{word}", at[word]) for word in ("low", "high")]
    value = writer.add("Mul", [writer.add("Clip", [rounded, *limits], f"{name}.clipped"), step], f"{name}.value")
    writer.remarks.append(f"{name}: its grid has no integer zero point, or too many levels: written as float operators")
    return value if offset is None else writer.add("Add", [value, offset], name)


# ---- number by number, windows ---------------------------------------------------------------------------------------


def _affine(writer: Writer, node: Node, x: list[str]) -> str:
    last = x[0]
    for key, kind in (("scale", "Mul"), ("shift", "Add")):
        if key in node.tensors:
            last = writer.add(kind, [last, _channels(writer, node, key, x[0])], f"{node.name}.{key}d")
    return last


def _clip(writer: Writer, node: Node, x: list[str]) -> str:
    limits = [writer.constant(f"{node.name}.{key}", node.attrs[key]) for key in ("low", "high")]
    return writer.add("Clip", [*x, *limits], node.name)


def _prelu(writer: Writer, node: Node, x: list[str]) -> str:
    return writer.add("PRelu", [*x, _channels(writer, node, "slope", x[0])], node.name)


def _named(kind: str, **attributes: Any) -> Callable[[Writer, Node, list[str]], str]:
    return lambda writer, node, x: writer.add(kind, x, node.name, **attributes)


def _window(attrs: Mapping[str, Any]) -> dict[str, Any]:
    padding = attrs.get("padding", [0, 0])
    sizes = {"kernel_shape": attrs["kernel"], "strides": attrs.get("stride", attrs["kernel"])}
    return sizes | {"pads": [*padding, *padding], "ceil_mode": int(attrs.get("ceil", False))}


def _max_pool(writer: Writer, node: Node, x: list[str]) -> str:
    return writer.add("MaxPool", x, node.name, **_window(node.attrs), dilations=node.attrs.get("dilation", [1, 1]))


def _avg_pool(writer: Writer, node: Node, x: list[str]) -> str:
    counted = int(node.attrs.get("count_padding", True))
    return writer.add("AveragePool", x, node.name, **_window(node.attrs), count_include_pad=counted)


def _global_pool(writer: Writer, node: Node, x: list[str]) -> str:
    if node.attrs["size"] != [1, 1]:
        raise BadData(f"{node.name}: a mean to {node.attrs['size']} pixels has no ONNX form; known: to one pixel")
    return writer.add("GlobalAveragePool", x, node.name)


def _spatial_mean(writer: Writer, node: Node, x: list[str]) -> str:
    return writer.add("Flatten", [writer.add("GlobalAveragePool", x, f"{node.name}.pool")], node.name)


def _pad_shortcut(writer: Writer, node: Node, x: list[str]) -> str:
    """Every stride-th pixel is a max-pool over one; then zeros behind the channels."""
    stride, extra = node.attrs["stride"], node.attrs["extra"]
    taken = writer.add("MaxPool", x, f"{node.name}.pixels", kernel_shape=[1, 1], strides=[stride, stride])
    pads = numpy_helper.from_array(np.array([0, 0, 0, 0, 0, extra, 0, 0], np.int64), f"{node.name}.pads")
    writer.constants.append(pads)
    return writer.add("Pad", [taken, pads.name], node.name)


def _input_scale(writer: Writer, node: Node, x: list[str]) -> str:
    """The mean of a window is a Conv, as in training: onnxruntime's AveragePool takes no padding as wide as its kernel."""
    size = writer.add("Abs", x, f"{node.name}.size")
    if "kernel" not in node.attrs:
        return writer.add("ReduceMean", [size, _axes(writer, node, [1])], node.name, keepdims=1)
    if node.attrs.get("groups", 1) != 1:
        raise BadData(f"{node.name}: the input scale of a convolution with groups has no ONNX form here")
    means = writer.add("ReduceMean", [size, _axes(writer, node, [1])], f"{node.name}.means", keepdims=1)
    height, width = node.attrs["kernel"]
    box = writer.constant(f"{node.name}.box", torch.full((1, 1, height, width), 1 / (height * width)))
    return writer.add("Conv", [means, box], node.name, **_conv_attributes(node.attrs))


def _axes(writer: Writer, node: Node, axes: list[int]) -> str:
    constant = numpy_helper.from_array(np.array(axes, np.int64), f"{node.name}.axes")
    writer.constants.append(constant)
    return str(constant.name)


def _unit(writer: Writer, node: Node, x: list[str]) -> str:
    """x / |x|; a tiny number in place of |x| = 0 leaves a zero vector zero."""
    length = writer.add("ReduceL2", [*x, _axes(writer, node, [node.attrs["dim"]])], f"{node.name}.length", keepdims=1)
    tiny = writer.constant(f"{node.name}.tiny", math.ldexp(1.0, -100))
    return writer.add("Div", [*x, writer.add("Max", [length, tiny], f"{node.name}.above")], node.name)


WRITERS: dict[str, Callable[[Writer, Node, list[str]], str]] = {
    "conv2d": _conv, "linear": _linear, "sign_conv2d": _signed_product, "sign_linear": _signed_product,
    "sign": lambda writer, node, x: _sign(writer, node.name, x[0]), "quantize": _quantize, "clamp": _clip,
    "affine": _affine, "prelu": _prelu, "leaky_relu": lambda w, n, x: w.add("LeakyRelu", x, n.name, alpha=n.attrs["slope"]),
    "relu": _named("Relu"), "sigmoid": _named("Sigmoid"), "tanh": _named("Tanh"), "gelu": _named("Gelu"),
    "hardswish": _named("HardSwish"), "hardsigmoid": _named("HardSigmoid", alpha=1 / 6),
    "silu": lambda w, n, x: w.add("Mul", [*x, w.add("Sigmoid", x, f"{n.name}.gate")], n.name),
    "add": _named("Add"), "mul": _named("Mul"), "concat": _named("Concat", axis=1), "flatten": _named("Flatten"),
    "max_pool2d": _max_pool, "avg_pool2d": _avg_pool, "adaptive_avg_pool2d": _global_pool,
    "spatial_mean": _spatial_mean, "pad_shortcut": _pad_shortcut, "input_scale": _input_scale, "unit": _unit,
}  # fmt: skip
