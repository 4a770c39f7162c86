"""A trained network as plain data: a list of operations with their tensors. No code travels in it.

Value 0 is the batch of images; node k (from 1) makes value k from earlier ones. `quant.inference.ops` says what each
operation means, `quant.inference.file` how all of it lies on disk.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from quant.pack import pack_bits, unpack_bits


@dataclass(frozen=True)
class Node:
    """One operation. `attrs` are numbers and lists of them; `tensors` are stored under `<name>.<key>`."""

    op: str
    name: str
    inputs: tuple[int, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the input: its central square at `pixels` x `pixels`, (p / 255 - mean) / std, resized to `size`.

    `crop` is the side of that square as a share of the image's shorter side.
    """

    channels: int
    size: int
    pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float = 1.0


@dataclass(frozen=True)
class Graph:
    """A network, what it takes, and what is known of where it comes from (`about`: names, settings of its data set)."""

    nodes: tuple[Node, ...]
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    about: Mapping[str, Any] = field(default_factory=dict)


def uses(nodes: Sequence[Node]) -> list[int]:
    """How many nodes read each value; the last value counts as read once more, by the caller.

    >>> uses([Node("relu", "a", (0,)), Node("add", "b", (0, 1))])
    [2, 1, 1]
    """
    counts = [0] * (len(nodes) + 1)
    counts[-1] = 1
    for node in nodes:
        for value in node.inputs:
            counts[value] += 1
    return counts


# ---- weights of a few bits -------------------------------------------------------------------------------------------


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """Codes 0 .. 2^bits - 1 of any shape -> uint8 (bits, ceil(n / 8)): plane b holds bit b of every code, so any width is dense.

    >>> pack_planes(torch.tensor([1, 5, 2]), 3).tolist()
    [[3], [4], [2]]
    """
    flat = codes.reshape(-1)
    if flat.dtype == torch.bool:
        return pack_bits(flat)[None]
    flat = flat.to(torch.uint8 if bits <= 8 else torch.int32)
    return torch.stack([pack_bits((flat >> bit & 1).to(torch.bool)) for bit in range(bits)])


def unpack_planes(planes: Tensor, shape: Sequence[int]) -> Tensor:
    """The codes that `pack_planes` was given in `shape`: uint8 up to 8 bits, else int32; bool of a single plane."""
    if len(planes) == 1:
        return unpack_bits(planes[0], shape)
    kind = torch.uint8 if len(planes) <= 8 else torch.int32
    codes = torch.zeros(tuple(shape), dtype=kind, device=planes.device)
    for bit, plane in enumerate(planes.unbind()):
        codes |= unpack_bits(plane, shape).to(kind) << bit
    return codes


def coded(signs_or_codes: Tensor, bits: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Attributes and tensors of a weight of `bits` bits: codes, or for one bit True where the weight is negative."""
    planes = pack_planes(signs_or_codes, bits)
    return {"bits": bits, "shape": list(signs_or_codes.shape)}, {"codes": planes}


def weight_of(node: Node) -> Tensor:
    """The weight of a node in float32: as stored, or

        (1 - 2 code) step             one bit
        (code - zero) step [+ offset] more bits; step, zero and offset are one number, or one for each output channel

    A missing step is 1, a missing zero or offset 0.
    """
    if "weight" in node.tensors:
        return node.tensors["weight"]
    planes, shape = node.tensors["codes"], node.attrs["shape"]
    if planes.is_meta:
        return planes.new_empty(shape, dtype=torch.float32)
    codes = unpack_planes(planes, shape)
    # A bool becomes a float through int8: whole bytes are many times as fast.
    value = codes.view(torch.int8).to(torch.float32).mul_(-2).add_(1) if len(planes) == 1 else codes.to(torch.float32)
    for key, combine in (("zero", torch.sub), ("step", torch.mul), ("offset", torch.add)):
        number = node.tensors.get(key)
        if number is not None:
            value = combine(value, number.to(torch.float32).view(-1, *[1] * (len(shape) - 1)))
    return value


def planes_shape(bits: int, shape: Sequence[int]) -> tuple[int, int]:
    """The shape of the codes of a weight.

    >>> planes_shape(3, [10, 2])
    (3, 3)
    """
    return bits, -(-prod(shape) // 8)
