"""A packed network, loaded and ready: a list of operations that are done one after the other."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from quant import kernels
from quant.inference.file import BadPackedFile, from_bytes, read
from quant.inference.graph import Graph, Node, uses
from quant.inference.ops import OPS, Operation, Run

MOST_VALUES = 1 << 28  # numbers in any one value for one image: 1 GiB
SHARED = {"flatten"}  # operations whose result may be a view of their input


class Op:
    """One step of a network: `op(values)` makes values[op.output]. `name` is the layer's, `kind` the operation's.

    `threshold`: below which the input of a binary layer counts as -1, one number a channel; None for 0.
    """

    __slots__ = ("ends", "inputs", "kind", "name", "nbytes", "output", "run", "threshold")

    def __init__(self, node: Node, output: int, run: Run, ends: tuple[int, ...]) -> None:
        self.name, self.kind, self.inputs, self.nbytes = node.name, node.op, node.inputs, node.nbytes
        self.output, self.run, self.ends = output, run, ends
        self.threshold = node.tensors.get("threshold")

    def __call__(self, values: list[Any]) -> None:
        values[self.output] = self.run(*[values[i] for i in self.inputs])
        for value in self.ends:  # nobody will ask for these again
            values[value] = None


class PackedModel:
    """A network from a packed file. Logits (N, classes) of normalised images (N, C, size, size), float32 on the CPU; images of
    another shape or type are a ValueError.

        model = PackedModel.load("model.packed.safetensors")
        logits = model(images)

        values = model.begin(images)          the same, a layer at a time: to measure or to look at what lies between
        for op in model.ops:
            op(values)
        logits = values[-1]

    `kernel` is the code path of the packed kernels, or "float", and `why_float` then says why. Loading never runs code from
    the file, and raises BadPackedFile for one that is damaged, of another version, or makes no sense.
    """

    def __init__(self, graph: Graph, *, packed: bool = True) -> None:
        self.graph = graph
        self.preprocessing, self.classes, self.about = graph.preprocessing, graph.classes, graph.about
        self.binary = any(node.op.startswith("sign_") for node in graph.nodes)
        self.why_float = "as asked for" if not packed else kernels.why_not() if self.binary else "no binary layers"
        self.kernel: str = "float" if self.why_float else kernels.available()
        _try_shapes(graph)
        _refuse_misread_bits(graph.nodes)
        self.ops: Sequence[Op] = _ops(graph, packed=self.why_float is None)

    @classmethod
    def load(cls, path: str | Path, *, packed: bool = True) -> Self:
        """Read a file. `packed` False computes in floats, without the packed kernels."""
        return cls(read(Path(path)), packed=packed)

    @classmethod
    def from_bytes(cls, content: bytes, *, packed: bool = True) -> Self:
        """The content of such a file."""
        return cls(from_bytes(content), packed=packed)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        values = self.begin(images)
        for op in self.ops:
            op(values)
        logits: Tensor = values[-1]
        return logits

    def begin(self, images: Tensor) -> list[Any]:
        """The values of a pass over the operations: the images first, the others still to be made.

        Raises ValueError for images of another shape or type: what broadcasts would be answered without a word.
        """
        take = self.preprocessing
        if images.dtype != torch.float32 or tuple(images.shape[1:]) != (take.channels, take.size, take.size):
            raise ValueError(
                f"images are {images.dtype} {tuple(images.shape)}; "
                f"accepted: torch.float32 (N, {take.channels}, {take.size}, {take.size})"
            )
        return [images, *[None] * len(self.ops)]

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(op.nbytes for op in self.ops)


def _ops(graph: Graph, *, packed: bool) -> list[Op]:
    counts = uses(graph.nodes)
    last_use = {value: k for k, node in enumerate(graph.nodes, start=1) for value in node.inputs}
    ops = []
    for k, node in enumerate(graph.nodes, start=1):
        make = _maker(OPS[node.op], node, graph.nodes, counts)
        ends = tuple(value for value in set(node.inputs) if last_use[value] == k)
        ops.append(Op(node, k, make(node, packed), ends))
    return ops


def _maker(
    operation: Operation, node: Node, nodes: Sequence[Node], counts: Sequence[int]
) -> Callable[[Node, bool], Run]:
    """The maker that works in the memory of its first input, where that is made for this node alone."""
    first = node.inputs[0]
    alone = first > 0 and counts[first] == 1 and nodes[first - 1].op not in SHARED
    return operation.in_place if operation.in_place is not None and alone else operation.make


def _refuse_misread_bits(nodes: Sequence[Node]) -> None:
    """Signs that are handed on are packed bits, or floats without the kernels: only what takes both alike may read them."""
    handed_on = {value: node.op for value, node in enumerate(nodes, start=1) if "next_threshold" in node.tensors}
    for node in nodes:
        for value in handed_on.keys() & set(node.inputs):
            if node.op != handed_on[value] or "threshold" in node.tensors:
                raise BadPackedFile(f"{node.name} ({node.op}) reads the signs of {nodes[value - 1].name} as numbers")
    if len(nodes) in handed_on:
        raise BadPackedFile(f"{nodes[-1].name} ({nodes[-1].op}) hands signs on, but is the last operation")


def _try_shapes(graph: Graph) -> None:
    """One pass without memory: every tensor has to fit, and nothing may become absurdly large."""
    take = graph.preprocessing
    meta = torch.device("meta")
    values: list[Any] = [torch.empty(1, take.channels, take.size, take.size, device=meta)]
    for node in graph.nodes:
        bare = Node(node.op, node.name, node.inputs, node.attrs, {k: t.to(meta) for k, t in node.tensors.items()})
        try:
            with meta:
                run = OPS[node.op].make(bare, False)
            value = run(*[values[i] for i in node.inputs])
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            raise BadPackedFile(f"{node.name} ({node.op}) makes no sense here: {str(error).splitlines()[0]}") from error
        if value.numel() > MOST_VALUES:
            raise BadPackedFile(f"{node.name} ({node.op}) would make {value.numel():,} numbers of one image")
        values.append(value)
    if values[-1].shape != (1, len(graph.classes)):
        raise BadPackedFile(f"the network gives {tuple(values[-1].shape)}, but there are {len(graph.classes)} classes")
