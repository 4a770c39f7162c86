"""How many bytes autograd keeps between forward and backward: measured on the graph, not computed from the layers.

Every tensor that a function saves passes through `torch.autograd.graph.saved_tensors_hooks`, those of custom functions and
of compiled graphs too. A storage counts once and whole, however many tensors view it. What a function keeps in an attribute of
its context the hooks never see: the graph is searched for such tensors, and they count too.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.nn import functional as F


def saved_bytes(run: Callable[[], Tensor], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes kept for the backward pass of `run()`, without the storages of `exclude` (parameters, buffers).

    >>> x = torch.ones(100, requires_grad=True)
    >>> saved_bytes(lambda: (x * x).sum()), saved_bytes(lambda: x.relu().sum()), saved_bytes(lambda: (2 * x).sum())
    (400, 400, 0)
    """
    kept: dict[int, torch.UntypedStorage] = {}  # holding the storages keeps their addresses from being given out again

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(record, lambda tensor: tensor):
        result = run()
    for tensor in _in_contexts(result):
        record(tensor)
    known = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    return sum(storage.nbytes() for address, storage in kept.items() if address not in known)


def saved_bytes_per_sample(
    model: nn.Module, images: Tensor, labels: Tensor, forward: Callable[[Tensor], Tensor] | None = None
) -> float:
    """Bytes a sample that a training step of `model` keeps for backward, with cross entropy behind it; images included.

    `forward`: how the model is called, where not as it is (autocast, compiled). The model is left as it was: buffers (running
    statistics) and the random state are put back.
    """
    call = forward or model
    with _undisturbed(model, images.device):
        exclude = [*model.parameters(), *model.buffers()]
        return saved_bytes(lambda: F.cross_entropy(call(images), labels), exclude) / len(images)


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
    with torch.no_grad():
        for buffer, value in before:
            buffer.copy_(value)


def _in_contexts(result: Tensor) -> Iterator[Tensor]:
    for node in _nodes(result.grad_fn):
        for value in getattr(node, "__dict__", {}).values():
            yield from _tensors_in(value)


def _nodes(root: Node | None) -> Iterator[Node]:
    waiting, seen = [root], set[Node]()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
            yield node


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors_in(inner)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors_in(getattr(value, field.name))
