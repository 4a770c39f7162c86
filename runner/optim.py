"""Optimizers as a regime names them: built from a setting, and kept in step with it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from quant.base import QuantizedLayer
from runner.regime import Setting
from runner.schema import COMMON, OPTIMIZERS

Tensors = tuple[Tensor, ...] | list[Tensor]
CLASSES: dict[str, type[torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD,
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "RMSprop": torch.optim.RMSprop,
}
BEGUN_AT_ZERO = (  # a buffer, the argument that needs it, and a buffer that tells whose state it is
    ("momentum_buffer", "momentum", "square_avg"),
    ("grad_avg", "centered", "square_avg"),
    ("max_exp_avg_sq", "amsgrad", "exp_avg_sq"),
)


def optimizer_for(model: nn.Module, setting: Setting, current: torch.optim.Optimizer | None) -> torch.optim.Optimizer:
    """The optimizer that a setting asks for: the current one, brought up to date, or a new one where the class changes."""
    cls = CLASSES[setting["optimizer"]]
    if current is None or type(current) is not cls:
        current = cls(_groups(model), **_arguments(setting))
    for group in current.param_groups:
        group |= _arguments(setting)
        if group["name"] == "no_decay":
            group["weight_decay"] = 0.0
        for parameter in group["params"]:
            _complete_(current.state.get(parameter, {}), parameter, group)
    return current


def _complete_(state: dict[str, Any], parameter: torch.Tensor, group: dict[str, Any]) -> None:
    """What an argument needs that a phase has switched on and torch would have begun with at the first step."""
    for buffer, argument, beside in BEGUN_AT_ZERO:
        if beside in state and group.get(argument) and buffer not in state:
            state[buffer] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def _arguments(setting: Setting) -> dict[str, Any]:
    keys = COMMON | OPTIMIZERS[setting["optimizer"]]
    arguments = {key: value for key, value in setting.items() if key in keys}
    return arguments | ({"betas": tuple(arguments["betas"])} if "betas" in arguments else {})


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameters in two groups: those that weight decay may touch, and those that their layer keeps from it."""
    kept = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, QuantizedLayer)
        for name, parameter in module.named_parameters()
        if name in module.no_decay
    }
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        ("decay", [p for p in parameters if id(p) not in kept]),
        ("no_decay", [p for p in parameters if id(p) in kept]),
    ]
    return [{"params": members, "name": name} for name, members in groups if members]


def average_of(model: nn.Module, decay: float | None) -> AveragedModel | None:
    """An exponential average of the weights, to be updated after each step; None without a decay."""
    if not decay:
        return None
    lerp = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    def average(own: Tensors, new: Tensors, updates: Tensor | int) -> None:
        """Of tensors of one type. Whole numbers are copied: 15 levels averaged with 15 would be cut to 14."""
        if own[0].is_floating_point():
            lerp(own, new, updates)
        else:
            torch._foreach_copy_(own, new)

    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)
