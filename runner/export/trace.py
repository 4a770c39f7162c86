"""A trained network as a list of operations: followed by torch.fx, layer by layer, each turned into plain data.

What a layer means as plain data stands in `runner.export.layers`; here are the functions that a network may call between its
layers, and the walk itself. Whatever is not known is listed by name, all of it at once.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from quant.base import QuantizedLayer
from quant.inference.graph import Node
from runner.export.layers import LAYERS, Attrs, Emit, NotPlain, Tensors
from runner.faults import BadData


class _Tracer(fx.Tracer):
    """Layers that have a meaning of their own are not looked into."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, QuantizedLayer) or type(m) in LAYERS
        return known or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> tuple[Node, ...]:
    """The operations of a network in eval mode. Raises BadData that names every layer without a plain meaning."""
    model = model.eval()
    try:
        graph = _Tracer().trace(model)
    except (fx.proxy.TraceError, TypeError, RuntimeError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise BadData(f"the network cannot be exported: what it does depends on its input ({reason})") from error
    walk = _Walk(model)
    for node in graph.nodes:
        walk.visit(node)
    if walk.refused:
        listed = "".join(f"\n  {line}" for line in walk.refused)
        raise BadData(f"{len(walk.refused)} layers of the network cannot be exported:{listed}")
    return tuple(walk.nodes)


class _Walk:
    """The operations so far, and which value each node of the traced graph became."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.nodes: list[Node] = []
        self.refused: list[str] = []
        self.values: dict[fx.Node, int] = {}

    def visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            if self.values:
                self.refused.append(f"{node.name}: a second input")
            self.values[node] = 0
        elif node.op == "output":
            self._finish(node)
        else:
            try:
                self.values[node] = self._made(node)
            except NotPlain as why:
                self.refused.append(f"{node.target if node.op == 'call_module' else node.name}: {why}")
                self.values[node] = 0  # goes on, to list whatever else is not known

    def _finish(self, node: fx.Node) -> None:
        last = node.args[0]
        if not isinstance(last, fx.Node):
            self.refused.append("output: not a single tensor")
        elif not self.refused and self.values[last] != len(self.nodes):
            self.refused.append("output: not what the last layer computes")

    def _made(self, node: fx.Node) -> int:
        if node.op == "call_module":
            name = str(node.target)
            module = self.model.get_submodule(name)
            make = LAYERS.get(type(module))
            if make is None:
                raise NotPlain(f"{type(module).__name__} has no plain form")
            return make(self._emitter(name), module, self._inputs(node)[0])
        if node.op == "get_attr":
            raise NotPlain(f"the network uses {node.target} outside of a layer")
        return self._called(node)

    def _called(self, node: fx.Node) -> int:
        said = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        function = said if isinstance(node.target, str) or said in BY_NAME else FUNCTIONS.get(node.target, "")
        make = CALLS.get(function)
        if make is None:
            raise NotPlain(f"the function {said} has no plain form")
        arguments = [a for a in node.args[1:] if not isinstance(a, fx.Node)]
        try:
            return make(self._emitter(node.name), self._inputs(node), *arguments, **node.kwargs)
        except TypeError as error:
            raise NotPlain(f"{function} with arguments {arguments} {dict(node.kwargs)}") from error

    def _inputs(self, node: fx.Node) -> list[int]:
        """One value for each argument, in their order: x + x reads x twice, and [a, b, a] is not [a, a, b]."""
        sources: list[fx.Node] = []
        fx.node.map_arg((node.args, node.kwargs), sources.append)
        return [self.values[source] for source in sources]

    def _emitter(self, name: str) -> Emit:
        taken = {node.name for node in self.nodes}
        used = (
            name if name not in taken else next(f"{name}.{k}" for k in range(2, 1 << 30) if f"{name}.{k}" not in taken)
        )

        def emit(
            op: str, inputs: list[int], attrs: Attrs | None = None, tensors: Tensors | None = None, part: str = ""
        ) -> int:
            plain = {key: t.detach().clone().contiguous() for key, t in (tensors or {}).items() if t is not None}
            _refuse_odd_numbers(attrs or {}, plain)
            self.nodes.append(Node(op, f"{used}.{part}" if part else used, tuple(inputs), attrs or {}, plain))
            return len(self.nodes)

        return emit


def _refuse_odd_numbers(attrs: Attrs, tensors: Tensors) -> None:
    """Raises NotPlain for a network that diverged: no format holds what it is, and NaN would agree with NaN."""
    odd = [key for key, t in tensors.items() if t is not None and not bool(t.isfinite().all())]
    odd += [key for key, value in attrs.items() if value != value]
    if odd:
        raise NotPlain(f"not all numbers of its {', '.join(odd)} are finite")


# ---- functions between layers ----------------------------------------------------------------------------------------


def _two(op: str) -> Callable[..., int]:
    def make(emit: Emit, x: list[int]) -> int:
        if len(x) != 2:
            raise NotPlain(f"{op} with a number")
        return emit(op, x)

    return make


def _flatten(emit: Emit, x: list[int], start_dim: int = 0, end_dim: int = -1) -> int:
    if (start_dim, end_dim) != (1, -1):
        raise NotPlain(f"flatten from {start_dim} to {end_dim}; known: from 1 to the last")
    return emit("flatten", x)


def _pool(emit: Emit, x: list[int], output_size: Any) -> int:
    size = [output_size] * 2 if isinstance(output_size, int) else list(output_size)
    return emit("adaptive_avg_pool2d", x, {"size": size})


def _mean(emit: Emit, x: list[int], dim: Any, keepdim: bool = False) -> int:
    if sorted(d % 4 for d in (dim if isinstance(dim, tuple | list) else [dim])) != [2, 3] or keepdim:
        raise NotPlain(f"mean over {dim}; known: over height and width")
    return emit("spatial_mean", x)


def _concat(emit: Emit, x: list[int], dim: int = 0) -> int:
    if dim != 1:
        raise NotPlain(f"concatenation along {dim}; known: along the channels")
    return emit("concat", x)


def _relu(emit: Emit, x: list[int], inplace: bool = False) -> int:
    return emit("relu", x)


def _relu6(emit: Emit, x: list[int], inplace: bool = False) -> int:
    return emit("clamp", x, {"low": 0.0, "high": 6.0})


def _contiguous(emit: Emit, x: list[int]) -> int:
    return x[0]


def _dropped(emit: Emit, x: list[int], *settings: Any, **named: Any) -> int:
    """Dropout and stochastic depth, which do nothing in eval mode, where they are told of it."""
    if not any(value is False for value in (*settings, named.get("training"))):
        raise NotPlain("drops values in eval mode, too")
    return x[0]


CALLS: dict[str, Callable[..., int]] = {
    "add": _two("add"), "mul": _two("mul"), "flatten": _flatten, "adaptive_avg_pool2d": _pool, "mean": _mean,
    "concat": _concat, "relu": _relu, "relu6": _relu6, "dropout": _dropped, "stochastic_depth": _dropped,
    "contiguous": _contiguous,
}  # fmt: skip
BY_NAME = {"stochastic_depth"}  # of torchvision, which takes seconds to import
FUNCTIONS: dict[Any, str] = {
    operator.add: "add", operator.iadd: "add", torch.add: "add", operator.mul: "mul", operator.imul: "mul",
    torch.mul: "mul", torch.flatten: "flatten", F.adaptive_avg_pool2d: "adaptive_avg_pool2d", torch.mean: "mean",
    torch.cat: "concat", torch.concat: "concat", torch.relu: "relu", F.relu: "relu", F.relu6: "relu6", F.dropout: "dropout",
}  # fmt: skip
