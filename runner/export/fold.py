"""What stands in front of a sign becomes a threshold, one a channel: exactly, whatever the floats round to.

A chain of affine maps and activations that never turn around, computed in floats, is monotone: each of its operations rounds a
monotone function, and rounding is monotone. So sign(chain(x)) changes once, at a float that bisection finds:

    in front of a binary layer             -1 where x < threshold, else +1
    between two binary layers              the first one's sums are whole numbers, and so is the threshold: scale, bias,
                                           normalisation and activation become one number a channel, bits go in and out

Where the chain falls, the sign is turned, and so are the next layer's weights of that channel: the product is the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quant.inference.graph import Node, pack_planes, unpack_planes, uses
from quant.inference.ops import OPS

SIGNED = ("sign_conv2d", "sign_linear")
LARGEST = torch.finfo(torch.float32).max
WIDEST = (
    0x71800000  # ordinal of 2^100: no activation is larger, and nothing that is multiplied with it becomes infinite
)
Predicate = Callable[[Tensor], Tensor]


def fold(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """The same network with thresholds in front of its binary layers; chains that became one are gone."""
    found: dict[int, Node] = dict(enumerate(nodes, start=1))
    counts = uses(nodes)
    replaced: dict[int, int] = {}  # values that are another one now
    for k, node in list(found.items()):
        if node.op not in SIGNED:
            continue
        steps, source = _chain(found, counts, node.inputs[0])
        chain, before = [found[value] for value in steps], found.get(source)
        if before is not None and before.op in SIGNED and counts[source] == 1:
            found[source], flips = _with_next_threshold(before, chain)
            found[k] = _flipped(node, flips)
        elif chain:
            threshold, flips = _float_threshold(chain, node)
            found[k] = _flipped(replace(node, tensors={**node.tensors, "threshold": threshold}), flips)
        for value in steps:
            replaced[value] = source
            del found[value]
    return _renumbered(found, replaced)


def _chain(nodes: dict[int, Node], counts: Sequence[int], value: int) -> tuple[list[int], int]:
    """The monotone operations that lead to `value` and to nothing else, and the value that they start from."""
    steps: list[int] = []
    while value in nodes and counts[value] == 1 and _is_monotone(nodes[value]):
        steps.insert(0, value)
        value = nodes[value].inputs[0]
    return steps, value


def _is_monotone(node: Node) -> bool:
    if node.op == "prelu":
        return bool((node.tensors["slope"] >= 0).all())
    if node.op == "leaky_relu":
        return bool(node.attrs["slope"] >= 0)
    return node.op in ("affine", "relu", "clamp")


def _renumbered(nodes: dict[int, Node], replaced: dict[int, int]) -> tuple[Node, ...]:
    place = {0: 0} | {old: new for new, old in enumerate(sorted(nodes), start=1)}

    def now(value: int) -> int:
        while value in replaced:
            value = replaced[value]
        return place[value]

    return tuple(replace(nodes[k], inputs=tuple(now(v) for v in nodes[k].inputs)) for k in sorted(nodes))


# ---- thresholds ------------------------------------------------------------------------------------------------------


def _float_threshold(chain: Sequence[Node], node: Node) -> tuple[Tensor, Tensor]:
    """(threshold, flips) of a chain that starts from floats."""
    channels = int(node.attrs["shape"][1])
    ordinals, flips, always = change(lambda at: _run(chain, _float_at(at)) < 0, channels, -WIDEST, WIDEST)
    threshold = torch.where(always.isnan(), _float_at(ordinals), always * LARGEST)
    return threshold, flips


def _with_next_threshold(source: Node, chain: Sequence[Node]) -> tuple[Node, Tensor]:
    """(a binary layer that hands on signs, flips) from one with sums of signs, scaled, and a chain behind it."""
    outs, *inner = source.attrs["shape"]
    most = int(torch.tensor(inner).prod())
    step, bias = source.tensors.get("step"), source.tensors.get("bias")

    def negative(at: Tensor) -> Tensor:
        y = at.to(torch.float32)
        y = y if step is None else y * step
        return _run(chain, y if bias is None else y + bias) < 0

    whole, flips, always = change(negative, outs, -most, most)
    threshold = torch.where(always.isnan(), whole, torch.where(always > 0, most + 1, -most))
    kept = {key: t for key, t in source.tensors.items() if key not in ("step", "bias")}
    dtype = torch.int16 if most < torch.iinfo(torch.int16).max else torch.int32
    return replace(source, tensors=kept | {"next_threshold": threshold.to(dtype)}), flips


def change(negative: Predicate, channels: int, low: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where a predicate that changes at most once between `low` and `high` does, for each channel, by bisection.

    `negative` takes int64 (channels) and gives bool. Returns the first number at which it is not what it is at `low`; whether it
    is false there (then the sign must be turned); and where it never changes 1 for always, -1 for never, elsewhere nan.

    >>> change(lambda at: at * torch.tensor([1, -1, 0]) < torch.tensor([3, 3, 3]), 3, -8, 8)
    (tensor([ 3, -2,  8]), tensor([False,  True, False]), tensor([nan, nan, 1.]))
    """
    below, above = torch.full((channels,), low), torch.full((channels,), high)
    at_low, at_high = negative(below), negative(above)
    constant = at_low == at_high
    always = torch.where(constant, torch.where(at_low, 1.0, -1.0), torch.nan)
    while bool((above - below > 1).any()):
        middle = (below + above) // 2
        same = negative(middle) == at_low
        below, above = torch.where(same, middle, below), torch.where(same, above, middle)
    return above, ~at_low & ~constant, always


def _run(chain: Sequence[Node], x: Tensor) -> Tensor:
    """The chain for one number a channel, with the operations that inference uses."""
    value = x[None]
    for node in chain:
        value = OPS[node.op].make(node, False)(value)
    return value[0]


def _float_at(ordinal: Tensor) -> Tensor:
    """Floats in order: ordinal 0 is 0, 1 the smallest float above it, -1 the largest below."""
    bits = torch.where(ordinal < 0, ordinal.abs() | 0x80000000, ordinal)
    signed = torch.where(bits >= 1 << 31, bits - (1 << 32), bits)
    return signed.to(torch.int32).view(torch.float32)


def _flipped(node: Node, flips: Tensor) -> Node:
    """The weights of some input channels with their signs turned."""
    if not bool(flips.any()):
        return node
    shape = node.attrs["shape"]
    turned = unpack_planes(node.tensors["codes"], shape) ^ flips.view(1, -1, *[1] * (len(shape) - 2))
    return replace(node, tensors={**node.tensors, "codes": pack_planes(turned, 1)})
