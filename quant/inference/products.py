"""Products: of floats, of codes of a few bits, of signs."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from quant import kernels
from quant.inference import attributes as a
from quant.inference.graph import Node, weight_of
from quant.inference.registry import Run, operation, per_channel, plain

WEIGHT = {"weight", "codes", "step", "zero", "offset", "bias"}
CODED = {"bits": a.whole(1, 16), "shape": a.shape}
GEOMETRY = {"stride": a.pair(1), "padding": a.pair(0)}

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
        return y.contiguous(memory_format=torch.channels_last) if packed else y

    return run


@operation("linear", attrs=CODED, tensors=WEIGHT)
def linear(node: Node, _: bool) -> Run:
    weight, bias = weight_of(node), node.tensors.get("bias")
    return lambda x: F.linear(x, weight, bias)


# ---- products of signs -----------------------------------------------------------------------------------------------

SIGN_TENSORS = {"step", "bias", "threshold", "next_threshold"}
MOST_LANES = 32  # output channels that packed kernels compute at once, whether there are as many or not
SMALL_TABLE = 1 << 18  # numbers, that any layer may have
SIGNED = CODED | {"bits": a.whole(1, 1)}


@operation("sign_conv2d", attrs=SIGNED | GEOMETRY, tensors=SIGN_TENSORS, required={"codes"})
def sign_conv2d(node: Node, packed: bool) -> Run:
    stride, padding = (
        tuple(node.attrs.get(key, default)) for key, default in (("stride", (1, 1)), ("padding", (0, 0)))
    )
    threshold = node.tensors.get("threshold")
    limits = None if threshold is None else per_channel(threshold, 4)
    step, bias, signs_out = _finish(node)
    _refuse_large_borders(node.attrs["shape"], padding)
    if not packed:
        weight = _signs_of(node)

        def run_float(x: Tensor) -> Tensor:
            sums = F.conv2d(_signs(x, limits), weight, None, stride, padding)
            y = _scaled(
                sums, None if step is None else per_channel(step, 4), None if bias is None else per_channel(bias, 4)
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


@operation("sign_linear", attrs=SIGNED, tensors=SIGN_TENSORS, required={"codes"})
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


def _refuse_large_borders(shape: Sequence[int], padding: tuple[int, ...]) -> None:
    """Raises ValueError where a small weight would take a lot of memory: packed, each of its rows has a table of all the ways
    in which kernel columns stick out of the image, which grows with the square of the padding."""
    outs, _, height, width = shape
    entries = max(outs, MOST_LANES) * (height + 1) * (min(padding[1], width) + 1) ** 2
    if entries > max(SMALL_TABLE, 16 * prod(shape)):
        raise ValueError(f"a kernel of {(height, width)} with padding {padding} needs a table of {entries:,} numbers")


def _signs_of(node: Node) -> Tensor:
    return weight_of(Node(node.op, node.name, (), node.attrs, {"codes": node.tensors["codes"]}))


def _finish(node: Node) -> tuple[Tensor | None, Tensor | None, bool]:
    """Scale and bias of the sums, and whether only the sign is wanted: then the sums are moved until it is that of 0.

    Raises ValueError where a tensor has not one number for each of its channels: floats would broadcast it, bits would not.
    """
    outs, ins = node.attrs["shape"][:2]
    for key, tensor in node.tensors.items():
        count = ins if key == "threshold" else outs
        if key in SIGN_TENSORS and tuple(tensor.shape) != (count,):
            raise ValueError(f"{key} has the shape {tuple(tensor.shape)}; accepted: ({count},), one number a channel")
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


SCALE = {"kernel": a.pair(1), "dilation": a.pair(1), "groups": a.whole(1), "out_channels": a.whole(1)}


@operation("input_scale", attrs=GEOMETRY | SCALE)
def input_scale(node: Node, _: bool) -> Run:
    """K of XNOR-Net (arXiv 1603.05279, eq. 11): mean |x| over channels, then over the window; without `kernel`: of a row."""
    if "kernel" not in node.attrs:
        return lambda x: x.abs().mean(-1, keepdim=True)
    kernel, groups = node.attrs["kernel"], node.attrs.get("groups", 1)
    stride, padding = node.attrs.get("stride", (1, 1)), node.attrs.get("padding", (0, 0))
    dilation = node.attrs.get("dilation", (1, 1))
    if groups * kernel[0] * kernel[1] > 1 << 24:
        raise ValueError(f"{groups} windows of {kernel} are too large")
    box = torch.full((groups, 1, *kernel), 1 / (kernel[0] * kernel[1]))

    def run(x: Tensor) -> Tensor:
        means = x.abs().view(len(x), groups, x.shape[1] // groups, *x.shape[2:]).mean(2)
        k = F.conv2d(means, box, None, stride, padding, dilation, groups)
        return k if groups == 1 else k.repeat_interleave(node.attrs["out_channels"] // groups, 1)

    return run


plain("sign", lambda x: _signs(x, None))
