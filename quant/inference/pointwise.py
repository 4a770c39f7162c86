"""What is done number by number, and to shapes and windows."""

import torch
from torch import Tensor
from torch.nn import functional as F

from quant.inference import attributes as a
from quant.inference.graph import Node
from quant.inference.registry import Run, operation, per_channel, plain

# ---- number by number ------------------------------------------------------------------------------------------------


def _affine(node: Node, into_input: bool) -> Run:
    vectors = node.tensors.get("scale"), node.tensors.get("shift")
    by_dims = {dims: tuple(None if v is None else per_channel(v, dims) for v in vectors) for dims in (2, 4)}

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


plain("relu", torch.relu, torch.relu_)
plain("sigmoid", torch.sigmoid, torch.sigmoid_)
plain("tanh", torch.tanh, torch.tanh_)
plain("silu", F.silu)
plain("gelu", F.gelu)
plain("hardswish", F.hardswish)
plain("hardsigmoid", F.hardsigmoid)
plain("add", torch.add, lambda x, y: torch.add(x, y, out=x) if x.shape == y.shape else x + y, inputs=2)
plain("mul", torch.mul, inputs=2)


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
        return y.contiguous(memory_format=torch.channels_last) if packed else y

    return run


plain("spatial_mean", lambda x: x.mean((2, 3)))
plain("flatten", lambda x: torch.flatten(x, 1))
plain("concat", lambda *x: torch.cat(x, 1), inputs=-1)
