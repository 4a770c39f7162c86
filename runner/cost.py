"""What a network costs: multiply-accumulates by kind, bytes of its weights as float and packed. Computed, and labelled so."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant.base import FLOAT, QuantizedLayer
from quant.surgery import MATMUL


@dataclass(frozen=True)
class Cost:
    """Of one sample, and of the stored model."""

    layer_macs: dict[str, int]
    macs: dict[str, int]
    float_bytes: int
    packed_bytes: int


def cost_of(model: nn.Module, images: Tensor) -> Cost:
    """Count on one forward pass of a copy of the model (`images`: a batch of one, NCHW)."""
    layer_macs = _layer_macs(copy.deepcopy(model).eval(), images)
    modules = dict(model.named_modules())
    macs = {"float": 0, "int": 0, "binary": 0}
    for name, count in layer_macs.items():
        macs[_kind(modules[name])] += count
    state = sum(t.numel() for t in model.state_dict().values() if t.is_floating_point())
    saved = sum(_saved_bits(m) for m in modules.values() if isinstance(m, QuantizedLayer))
    return Cost(layer_macs, macs, float_bytes=4 * state, packed_bytes=4 * state - saved // 8)


def _layer_macs(model: nn.Module, images: Tensor) -> dict[str, int]:
    names: Mapping[nn.Module, str] = {module: name for name, module in model.named_modules()}
    counts: dict[str, int] = {}

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        per_output = weight[0].numel()
        counts[names[module]] = counts.get(names[module], 0) + per_output * (output.numel() // output.shape[0])

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, MATMUL)]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return counts


def _kind(module: nn.Module) -> str:
    precision = module.precision if isinstance(module, QuantizedLayer) else None
    if precision is None or FLOAT in (precision.weight, precision.act):
        return "float"
    return "binary" if precision.weight == precision.act == 1 else "int"


def _saved_bits(module: QuantizedLayer) -> int:
    weight = getattr(module, "weight", None)
    return (FLOAT - module.precision.weight) * weight.numel() if isinstance(weight, Tensor) else 0
