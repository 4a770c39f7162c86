"""What the operations of a packed network mean, and how each is computed. `OPS` names them all.

An operation is made from its node once, when the network is loaded, and is then a function of tensors: images
(N, C, H, W), or rows (N, C), of float32. In a network on packed kernels images are channels_last from the first convolution
on, else in the format in which they come, so that all is computed as in training. Only `sign_conv2d` and `sign_linear` may
hand each other packed bits (int32, as `quant.kernels.pack_activations` makes them), or +1 and -1 without these kernels:

    sign_conv2d   y = conv2d(s, sign(w)) step + bias,  s = -1 where x < threshold, else +1 (threshold: 0, or one a channel)
                  with next_threshold: y = the signs (-1 below it, else +1) of the sums, one for each output channel
    affine        y = fma(x, scale, shift)                    a batch normalisation, to the bit what torch computes
    quantize      y = step clamp(round((x - offset) / step), low, high) + offset      (x inverse instead of / step, if given)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from quant import kernels
from quant.inference import attributes as a
from quant.inference.graph import Node, weight_of

Run = Callable[..., Tensor]
Make = Callable[[Node, bool], Run]
WEIGHT = {"weight", "codes", "step", "zero", "offset", "bias"}
CODED = {"bits": a.whole(1, 16), "shape": a.shape}
GEOMETRY = {"stride": a.pair(1), "padding": a.pair(0)}
CHANNELS_LAST = torch.channels_last


@dataclass(frozen=True)
class Operation:
    """How to make it (from a node, and whether packed kernels may be used), and what its node may hold."""

    make: Make
    inputs: int
    attrs: Mapping[str, a.Check]
    tensors: frozenset[str]
    required: frozenset[str]
    in_place: Make | None = None
    """For where the input is read by nobody else: the result may take its memory."""


OPS: dict[str, Operation] = {}


def operation(
    name: str,
    *,
    inputs: int = 1,
    attrs: Mapping[str, a.Check] | None = None,
    tensors: set[str] | None = None,
    required: set[str] | None = None,
    in_place: Make | None = None,
) -> Callable[[Make], Make]:
    """Register the decorated function as the maker of operation `name`. `inputs` -1: one or more."""

    def add(make: Make) -> Make:
        allowed = (tensors or set()) | (required or set())
        OPS[name] = Operation(make, inputs, attrs or {}, frozenset(allowed), frozenset(required or set()), in_place)
        return make

    return add


def _plain(name: str, function: Run, in_place: Run | None = None, inputs: int = 1) -> None:
    """Register a function of tensors alone."""
    operation(name, inputs=inputs, in_place=None if in_place is None else lambda *_: in_place)(lambda *_: function)


def _per_channel(vector: Tensor, dims: int) -> Tensor:
    return vector.view(-1, *[1] * (dims - 2))


# ---- products of floats ----------------------------------------------------------------------------------------------


@operation("conv2d", attrs=CODED | GEOMETRY | {"dilation": a.pair(1), "groups": a.whole(1)}, tensors=WEIGHT)
def conv2d(node: Node, packed: bool) -> Run:
    weight, bias, at = weight_of(node), node.tensors.get("bias"), node.attrs
    stride, padding, dilation = (
        [*at.get(k, d)] for k, d in (("stride", (1, 1)), ("padding", (0, 0)), ("dilation", (1, 1)))
    )
    groups = at.get("groups", 1)

    def run(x: Tensor) -> Tensor:
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return y.contiguous(memory_format=CHANNELS_LAST) if packed else y

    return run


@operation("linear", attrs=CODED, tensors=WEIGHT)
def linear(node: Node, _: bool) -> Run:
    weight, bias = weight_of(node), node.tensors.get("bias")
    return lambda x: F.linear(x, weight, bias)


# ---- products of signs -----------------------------------------------------------------------------------------------

SIGN_TENSORS = {"step", "bias", "threshold", "next_threshold"}


@operation("sign_conv2d", attrs=CODED | GEOMETRY, tensors=SIGN_TENSORS, required={"codes"})
def sign_conv2d(node: Node, packed: bool) -> Run:
    stride, padding = (
        tuple(node.attrs.get(key, default)) for key, default in (("stride", (1, 1)), ("padding", (0, 0)))
    )
    threshold = node.tensors.get("threshold")
    limits = None if threshold is None else _per_channel(threshold, 4)
    step, bias, signs_out = _finish(node)
    if not packed:
        weight = _signs_of(node)

        def run_float(x: Tensor) -> Tensor:
            sums = F.conv2d(_signs(x, limits), weight, None, stride, padding)
            y = _scaled(
                sums, None if step is None else _per_channel(step, 4), None if bias is None else _per_channel(bias, 4)
            )
            return _signs(y, None) if signs_out else y

        return run_float
    words = kernels.pack_weight(_signs_of(node), padding)

    def run(x: Tensor) -> Tensor:
        if x.dtype != torch.int32:
            x = kernels.pack_activations(x if limits is None else x - limits)
        y = kernels.conv2d_of_packed(x, words, scale=step, bias=bias, stride=stride)
        return kernels.pack_activations(y) if signs_out else y

    return run


@operation("sign_linear", attrs=CODED, tensors=SIGN_TENSORS, required={"codes"})
def sign_linear(node: Node, packed: bool) -> Run:
    limits = node.tensors.get("threshold")
    step, bias, signs_out = _finish(node)
    if not packed:
        weight = _signs_of(node)

        def run_float(x: Tensor) -> Tensor:
            y = _scaled(F.linear(_signs(x, limits), weight), step, bias)
            return _signs(y, None) if signs_out else y

        return run_float
    words = kernels.pack_weight(_signs_of(node))

    def run(x: Tensor) -> Tensor:
        """Rows are the pixels of one image."""
        if x.dtype != torch.int32:
            rows = x if limits is None else x - limits
            x = kernels.pack_activations(rows.view(1, 1, *rows.shape).permute(0, 3, 1, 2))
        y = kernels.conv2d_of_packed(x, words, scale=step, bias=bias)
        return kernels.pack_activations(y) if signs_out else y.permute(0, 2, 3, 1).view(-1, y.shape[1])

    return run


def _signs_of(node: Node) -> Tensor:
    return weight_of(Node(node.op, node.name, (), node.attrs, {"codes": node.tensors["codes"]}))


def _finish(node: Node) -> tuple[Tensor | None, Tensor | None, bool]:
    """Scale and bias of the sums, and whether only the sign is wanted: then the sums are moved until it is that of 0."""
    following = node.tensors.get("next_threshold")
    if following is not None:
        return None, -following.to(torch.float32), True
    return node.tensors.get("step"), node.tensors.get("bias"), False


def _signs(x: Tensor, limits: Tensor | None) -> Tensor:
    """+1 and -1, in floats."""
    above = x >= (0 if limits is None else limits)
    return above.to(torch.float32).mul_(2).sub_(1)


def _scaled(sums: Tensor, step: Tensor | None, bias: Tensor | None) -> Tensor:
    scaled = sums if step is None else sums * step
    return scaled if bias is None else scaled + bias


@operation("input_scale", attrs=GEOMETRY | {"kernel": a.pair(1), "groups": a.whole(1), "out_channels": a.whole(1)})
def input_scale(node: Node, _: bool) -> Run:
    """K of XNOR-Net (arXiv 1603.05279, eq. 11): mean |x| over channels, then over the window; without `kernel`: of a row."""
    if "kernel" not in node.attrs:
        return lambda x: x.abs().mean(-1, keepdim=True)
    kernel, groups = node.attrs["kernel"], node.attrs.get("groups", 1)
    stride, padding = node.attrs.get("stride", (1, 1)), node.attrs.get("padding", (0, 0))
    if groups * kernel[0] * kernel[1] > 1 << 24:
        raise ValueError(f"{groups} windows of {kernel} are too large")
    box = torch.full((groups, 1, *kernel), 1 / (kernel[0] * kernel[1]))

    def run(x: Tensor) -> Tensor:
        means = x.abs().view(len(x), groups, -1, *x.shape[2:]).mean(2)
        k = F.conv2d(means, box, None, stride, padding, 1, groups)
        return k if groups == 1 else k.repeat_interleave(node.attrs["out_channels"] // groups, 1)

    return run


# ---- number by number ------------------------------------------------------------------------------------------------


def _affine(node: Node, into_input: bool) -> Run:
    vectors = node.tensors.get("scale"), node.tensors.get("shift")
    by_dims = {dims: tuple(None if v is None else _per_channel(v, dims) for v in vectors) for dims in (2, 4)}

    def run(x: Tensor) -> Tensor:
        scale, shift = by_dims[x.dim()]
        out = x if into_input else torch.empty_like(x)
        if scale is not None and shift is not None:
            return torch.addcmul(shift, x, scale, out=out)
        if scale is not None:
            return torch.mul(x, scale, out=out)
        assert shift is not None
        return torch.add(x, shift, out=out)

    return run


@operation("affine", tensors={"scale", "shift"}, in_place=lambda node, _: _affine(node, True))
def affine(node: Node, _: bool) -> Run:
    if not node.tensors:
        raise ValueError("neither scale nor shift")
    return _affine(node, False)


@operation(
    "quantize",
    attrs={"step": a.positive, "inverse": a.positive, "low": a.number, "high": a.number, "offset": a.number},
)
def quantize(node: Node, _: bool) -> Run:
    at = node.attrs
    step, offset, inverse = (torch.tensor(at[k]) if k in at else None for k in ("step", "offset", "inverse"))
    low, high = at["low"], at["high"]
    if step is None:
        raise ValueError("no step")

    def run(x: Tensor) -> Tensor:
        moved = x if offset is None else x - offset
        codes = (moved / step if inverse is None else moved * inverse).round_().clamp_(low, high)
        return codes.mul_(step) if offset is None else codes.mul_(step).add_(offset)

    return run


@operation("clamp", attrs={"low": a.number, "high": a.number}, in_place=lambda n, _: _clamp(n, torch.clamp_))
def clamp(node: Node, _: bool) -> Run:
    return _clamp(node, torch.clamp)


def _clamp(node: Node, function: Run) -> Run:
    low, high = node.attrs["low"], node.attrs["high"]
    return lambda x: function(x, low, high)


@operation("prelu", required={"slope"})
def prelu(node: Node, _: bool) -> Run:
    slope = node.tensors["slope"]
    return lambda x: F.prelu(x, slope)


@operation("leaky_relu", attrs={"slope": a.number})
def leaky_relu(node: Node, _: bool) -> Run:
    slope = node.attrs["slope"]
    return lambda x: F.leaky_relu(x, slope)


_plain("sign", lambda x: _signs(x, None))
_plain("relu", torch.relu, torch.relu_)
_plain("sigmoid", torch.sigmoid, torch.sigmoid_)
_plain("tanh", torch.tanh, torch.tanh_)
_plain("silu", F.silu)
_plain("gelu", F.gelu)
_plain("hardswish", F.hardswish)
_plain("hardsigmoid", F.hardsigmoid)
_plain("add", torch.add, lambda x, y: torch.add(x, y, out=x) if x.shape == y.shape else x + y, inputs=2)
_plain("mul", torch.mul, inputs=2)


@operation("unit", attrs={"dim": a.whole(-1)})
def unit(node: Node, _: bool) -> Run:
    """x / |x| along `dim`, zero where x is (arXiv 1801.04540); the peak is divided out first."""
    dim = node.attrs["dim"]

    def run(x: Tensor) -> Tensor:
        peak = x.abs().amax(dim, keepdim=True)
        x = x / torch.where(peak > 0, peak, 1)
        length: Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
        return x / length.clamp_min(1)

    return run


# ---- shapes and windows ----------------------------------------------------------------------------------------------

WINDOW = {"kernel": a.pair(1), "stride": a.pair(1), "padding": a.pair(0), "ceil": a.flag}


@operation("max_pool2d", attrs=WINDOW | {"dilation": a.pair(1)})
def max_pool2d(node: Node, _: bool) -> Run:
    at = node.attrs
    kernel, stride = at["kernel"], at.get("stride", at["kernel"])
    padding, dilation, ceil = at.get("padding", (0, 0)), at.get("dilation", (1, 1)), at.get("ceil", False)
    return lambda x: F.max_pool2d(x, kernel, stride, padding, dilation, ceil)


@operation("avg_pool2d", attrs=WINDOW | {"count_padding": a.flag})
def avg_pool2d(node: Node, _: bool) -> Run:
    at = node.attrs
    kernel, stride = at["kernel"], at.get("stride", at["kernel"])
    padding, ceil, count = at.get("padding", (0, 0)), at.get("ceil", False), at.get("count_padding", True)
    return lambda x: F.avg_pool2d(x, kernel, stride, padding, ceil, count)


@operation("adaptive_avg_pool2d", attrs={"size": a.pair(1)})
def adaptive_avg_pool2d(node: Node, _: bool) -> Run:
    size = tuple(node.attrs["size"])
    return lambda x: F.adaptive_avg_pool2d(x, size)


@operation("pad_shortcut", attrs={"stride": a.whole(1), "extra": a.whole(0)})
def pad_shortcut(node: Node, packed: bool) -> Run:
    """Every `stride`-th pixel, and `extra` channels of zeros (arXiv 1512.03385, option A)."""
    stride, extra = node.attrs["stride"], node.attrs["extra"]

    def run(x: Tensor) -> Tensor:
        y = F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, extra))
        return y.contiguous(memory_format=CHANNELS_LAST) if packed else y

    return run


_plain("spatial_mean", lambda x: x.mean((2, 3)))
_plain("flatten", lambda x: torch.flatten(x, 1))
_plain("concat", lambda *x: torch.cat(x, 1), inputs=-1)
