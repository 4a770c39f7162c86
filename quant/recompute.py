"""Keep only the inputs of parts of a network for backward, and compute the parts once more when their gradients are due.

Chen, Xu, Zhang, Guestrin, Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174. It suits low-bit layers: what is
computed twice is the forward pass, which bits make cheap; what is saved are float activations, which bits leave as they are.

The second pass is the first one again, to the bit: it draws the same random numbers (`torch.utils.checkpoint` sees to that), and
every buffer, such as the statistics of a normalisation, is read as it was then and updated once. Forward hooks run twice.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Unit = Literal["blocks", "stages"]


def recompute_(model: nn.Module, unit: Unit) -> list[str]:
    """Make training keep only the inputs of the blocks or stages of `model`; returns their names.

    blocks: each residual block (any module with layers inside that stands in a sequence), and in a sequence of plain layers
    each one that has weights, with those that follow it. stages: each part of the model itself that has layers inside.

    Raises ValueError where the model has no such parts.

    >>> block = lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU())
    >>> recompute_(nn.Sequential(block(), nn.Sequential(block(), block()), nn.Flatten()), "stages")
    ['0', '1']
    >>> recompute_(nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2)), "blocks")
    ['0-2']
    """
    if unit == "blocks":
        names = list(_blocks_(model, ""))
    else:
        names = [name for name, child in model.named_children() if _has_layers(child)]
        for name in names:
            _keep_input_of_(model.get_submodule(name))
    if not names:
        raise ValueError(f"recompute={unit}: {type(model).__name__} has no {unit}; accepted: none, blocks, stages")
    return names


def _blocks_(module: nn.Module, prefix: str) -> Iterator[str]:
    """Turn what stands in sequences inside `module` into blocks."""
    if isinstance(module, nn.Sequential):
        runs = _runs(module)
        for first, last in runs:
            yield f"{prefix}{_name(module, first)}-{_name(module, last - 1)}"
        if runs:
            _become(module, _with_runs).recomputed_runs = runs
    for name, child in module.named_children():
        if not _has_layers(child):
            continue
        if isinstance(module, nn.Sequential) and not isinstance(child, nn.Sequential):
            _keep_input_of_(child)
            yield prefix + name
        else:
            yield from _blocks_(child, f"{prefix}{name}.")


def _has_layers(module: nn.Module) -> bool:
    """Whether there is more inside than a single layer (which may have a normalisation of its own)."""
    return (
        not hasattr(module, "weight") and sum(not list(m.children()) for m in module.modules() if m is not module) > 1
    )


def _name(sequence: nn.Sequential, index: int) -> str:
    return list(sequence._modules)[index]


def _runs(sequence: nn.Sequential) -> list[tuple[int, int]]:
    """First and last + 1 of the plain layers that belong together: one with weights, and those that follow it."""
    layers = list(sequence)
    starts = [i for i, layer in enumerate(layers) if _has_layers(layer) or _has_matrix(layer)]
    bounds = zip(starts, [*starts[1:], len(layers)], strict=True)
    return [(first, last) for first, last in bounds if last - first > 1 and not _has_layers(layers[first])]


def _has_matrix(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() > 1


# ---- classes that recompute -------------------------------------------------------------------------------------------


def _keep_input_of_(module: nn.Module) -> None:
    _become(module, _whole)


def _become(module: nn.Module, make: Callable[[type], type]) -> Any:
    """Change the class of `module`: its copies behave alike, its state and the names in it stay what they are."""
    module.__class__ = make(type(module))
    return module


@functools.cache
def _whole(kind: type[nn.Module]) -> type:
    """A subclass of `kind` whose forward keeps its inputs only."""

    def forward(self: Any, *inputs: Any) -> Any:
        return _twice(self, functools.partial(kind.forward, self), *inputs)

    return type(kind.__name__, (kind,), {"forward": forward, "__doc__": kind.__doc__})


@functools.cache
def _with_runs(kind: type[nn.Sequential]) -> type:
    """A subclass of a sequence that keeps the inputs of its runs only (`recomputed_runs`)."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return super(made, self).forward(x)  # type: ignore[no-any-return]
        layers, ends = list(self), dict(self.recomputed_runs)
        at = 0
        while at < len(layers):
            last = ends.get(at, at + 1)
            part = (
                layers[at] if last == at + 1 else nn.Sequential(*layers[at:last])
            )  # a new one trains, its layers as they are
            x = _twice(part, part, x) if at in ends else part(x)
            at = last
        return x

    made: Any = type(kind.__name__, (kind,), {"forward": forward, "__doc__": kind.__doc__})
    return made  # type: ignore[no-any-return]


def _twice(module: nn.Module, run: Callable[..., Any], *inputs: Any) -> Any:
    """run(*inputs), and again in backward with the buffers of `module` as they are now."""
    if not (module.training and torch.is_grad_enabled()):
        return run(*inputs)
    as_now = _Buffers(module)
    return checkpoint(run, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), as_now))


class _Buffers:
    """A context in which `module` has copies of the buffers that it had when this was made. It may be entered many times."""

    def __init__(self, module: nn.Module) -> None:
        self.own: list[dict[str, Tensor | None]] = []
        self.parts = list(module.modules())
        self.before = [_copies(part._buffers) for part in self.parts]

    def __enter__(self) -> None:
        self.own = [dict(part._buffers) for part in self.parts]
        self._put([_copies(buffers) for buffers in self.before])

    def __exit__(self, *_: object) -> None:
        self._put(self.own)

    def _put(self, values: list[dict[str, Tensor | None]]) -> None:
        for part, buffers in zip(self.parts, values, strict=True):
            part._buffers.update(buffers)


def _copies(buffers: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if value is None else value.detach().clone() for name, value in buffers.items()}
