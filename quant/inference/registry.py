"""The table of operations: how each is made, and what its node may hold. `quant.inference.ops` fills it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from quant.inference import attributes as a
from quant.inference.graph import Node

Run = Callable[..., Tensor]
Make = Callable[[Node, bool], Run]


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


def plain(name: str, function: Run, in_place: Run | None = None, inputs: int = 1) -> None:
    """Register a function of tensors alone."""
    operation(name, inputs=inputs, in_place=None if in_place is None else lambda *_: in_place)(lambda *_: function)


def per_channel(vector: Tensor, dims: int) -> Tensor:
    return vector.view(-1, *[1] * (dims - 2))
