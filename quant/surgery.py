"""Rewrite the layers of a float model in place: which layers become what, and why.

>>> from quant.base import find
>>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 10))
>>> rows = quantize_(model, find("xnor")(), [Rule(match=["first", "last"], keep=True, why="first and last stay float")])
>>> [(row.layer, row.becomes, row.weight_bits) for row in rows]
[('0', 'kept', 32), ('2', 'BinaryConv2d', 1), ('4', 'kept', 32)]
"""

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from quant.base import Precision, QuantizedLayer, Quantizer

MATMUL = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What happens to the layers that `match`; the first rule that matches a layer wins.

    match: `first` or `last` (matrix layer of the model), a class name (`Linear`), or a name pattern (`layer1.*.conv2`); one
    of them, or several.
    keep: leave the layer in float. settings: fields of the quantizer that are different for these layers.
    optional: it is no error when no layer matches. why: shown in the preflight table.
    """

    match: str | Sequence[str]
    keep: bool = False
    optional: bool = False
    why: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def patterns(self) -> list[str]:
        return [self.match] if isinstance(self.match, str) else list(self.match)


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One line of the preflight table."""

    layer: str
    kind: str
    becomes: str
    weight_bits: int
    act_bits: int
    grad_bits: int
    parameters: int
    why: str


def quantize_(model: nn.Module, quantizer: Quantizer, rules: Iterable[Rule] = ()) -> list[LayerRow]:
    """Replace layers of `model` by the quantizer's own and say what was done, a row a layer.

    Raises ValueError for a rule that matches no layer, where the quantizer refuses a layer, and for a bare layer.

    A training loop of your own then calls `calibrate_` on one batch before its first step, `project_` of each of the
    `quantized_layers` after every step, and keeps weight decay from the parameters in their `no_decay`; quant/README.md has
    an example.
    """
    rules = list(rules)
    names = {module: name for name, module in model.named_modules() if name}
    handled = MATMUL + quantizer.handles
    if isinstance(model, handled):  # nobody holds it, so that no other layer can take its place
        raise ValueError(f"a bare {type(model).__name__} cannot be replaced in place; put it into an nn.Sequential")
    _refuse_idle_rules(rules, names, handled)
    rows: list[LayerRow] = []
    for module, name in names.items():
        if not isinstance(module, handled) or _inside(name, rows):
            continue
        new, why = _decide(module, name, quantizer, rules, names)
        if new is not None:
            _replace(model, module, new)
        if new is not None or isinstance(module, MATMUL):
            rows.append(_row(name, module, new, why))
    return rows


def calibrate_(model: nn.Module, images: Tensor, done: Collection[str] = ()) -> None:
    """One forward pass in which every layer sets its steps and ranges from the first input that it sees.

    `done`: names of layers that have theirs already. Raises ValueError, naming the layer, where that input does not fit the
    layer's settings, and where a quantized weight belongs to a layer that is never called.
    """
    names: dict[Any, str] = {module: name for name, module in model.named_modules()}
    seen: set[str] = set()

    def calibrate(layer: QuantizedLayer, x: Tensor) -> None:
        name = names[layer]
        if name not in seen and name not in done:
            try:
                layer.calibrate_(x)
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from error
        seen.add(name)

    with torch.no_grad(), _before_each(model, calibrate):
        model(images)
    if idle := [name for name, layer in quantized_layers(model).items() if name not in seen and multiplies(layer)]:
        raise ValueError(
            f"{', '.join(idle)}: not called in a forward pass (the layer around may use the weight itself), so that nothing "
            "of it is quantized; leave it in float by a rule with keep: true"
        )


def multiplies(layer: object) -> bool:
    """Whether its weight is a matrix or a filter: a batch norm has no product."""
    weight = getattr(layer, "weight", None)
    return weight is not None and weight.dim() > 1


def health(model: nn.Module, images: Tensor) -> dict[str, dict[str, float]]:
    """Figures of health of every quantized layer for one batch, by the layer's name."""
    figures: dict[str, dict[str, float]] = {}
    names = {module: name for name, module in model.named_modules()}

    def record(layer: QuantizedLayer, x: Tensor) -> None:
        figures[names[layer]] = layer.health(x)

    with torch.no_grad(), _before_each(model, record):
        model(images)
    return figures


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The layers that a quantizer built, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def _refuse_idle_rules(
    rules: Iterable[Rule], names: Mapping[nn.Module, str], handled: tuple[type[nn.Module], ...]
) -> None:
    candidates = {m: n for m, n in names.items() if isinstance(m, handled)}
    for rule in rules:
        if not rule.optional and not any(_matches(rule, m, n, names) for m, n in candidates.items()):
            near = [hit for p in rule.patterns for hit in difflib.get_close_matches(p, candidates.values(), n=2)]
            within = [f"{p}.*" for p in rule.patterns if any(name.startswith(f"{p}.") for name in candidates.values())]
            hint = f" Did you mean {' or '.join(within or near)}?" if within or near else ""
            layers = ", ".join(n for m, n in names.items() if isinstance(m, MATMUL))
            raise ValueError(
                f"rule {rule.patterns} matches no layer.{hint} Layers: {layers}; also: first, last, a class name"
            )


def _decide(
    module: nn.Module, name: str, quantizer: Quantizer, rules: Iterable[Rule], names: Mapping[nn.Module, str]
) -> tuple[nn.Module | None, str]:
    rule = next((r for r in rules if _matches(r, module, name, names)), None)
    if rule is not None and rule.keep:
        return None, rule.why or f"rule {', '.join(rule.patterns)}"
    if type(module) not in quantizer.handles:
        return None, f"{quantizer.name} has no layer for a {type(module).__name__}" if quantizer.handles else ""
    if rule is not None:
        quantizer = replace(quantizer, **rule.settings)
    try:
        new = quantizer.layer(module)
    except ValueError as error:
        raise ValueError(f"layer {name!r} ({type(module).__name__}): {error}") from error
    reason = rule.why or f"rule {', '.join(rule.patterns)}" if rule is not None else ""
    return new, reason or ("" if new is not None else f"left alone by {quantizer.name}")


def _matches(rule: Rule, module: nn.Module, name: str, names: Mapping[nn.Module, str]) -> bool:
    if not rule.settings and not rule.keep:
        raise ValueError(f"rule {rule.patterns} says nothing: give keep: true or settings")
    matrix = [m for m in names if isinstance(m, MATMUL)]
    ends = {"first": matrix[:1], "last": matrix[-1:]}
    return any(
        module in ends[p] if p in ends else type(module).__name__ == p or fnmatchcase(name, p) for p in rule.patterns
    )


def _inside(name: str, rows: Iterable[LayerRow]) -> bool:
    """Whether `name` belongs to a layer that was replaced already (its parts are not rewritten a second time)."""
    return any(name.startswith(f"{row.layer}.") for row in rows if row.becomes != "kept")


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    new.train(old.training)
    for parent in list(model.modules()):
        for child_name, child in list(
            parent._modules.items()
        ):  # named_children would skip a second name of the same module
            if child is old:
                setattr(parent, child_name, new)


def _row(name: str, module: nn.Module, new: nn.Module | None, why: str) -> LayerRow:
    precision, remark = (new.precision, new.remark) if isinstance(new, QuantizedLayer) else (Precision(), "")
    return LayerRow(
        layer=name,
        kind=type(module).__name__,
        becomes="kept" if new is None else type(new).__name__,
        weight_bits=precision.weight,
        act_bits=precision.act,
        grad_bits=precision.grad,
        parameters=sum(p.numel() for p in (new or module).parameters()),
        why="; ".join(filter(None, (why, remark))),
    )


@contextmanager
def _before_each(model: nn.Module, visit: Any) -> Iterator[None]:
    def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        visit(layer, inputs[0])

    layers = [m for m in model.modules() if isinstance(m, QuantizedLayer)]
    handles = [layer.register_forward_pre_hook(hook) for layer in layers if isinstance(layer, nn.Module)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
