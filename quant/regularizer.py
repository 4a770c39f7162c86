"""Terms that are added to the loss: the contract, and the rounding margin.

A regularizer is a frozen dataclass of settings under `@register("name")`, its fields the keys of conf/regularizer/NAME.yaml.
`attach(model)` gives a `Penalty`, which from then on watches every forward pass of training and is asked after each:

    penalty = find("rounding_margin")(weight=1.0).attach(model)    # once, after calibration
    loss = cross_entropy(model(x), y) + penalty.value()            # value() forgets what it has counted
    penalty.weight = 0.5                                           # a regime may drive it
    penalty.figures()                                              # per layer, for the epoch's record
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from quant.learned_step import StepQuantizer
from quant.registry import Registry
from quant.surgery import quantized_layers


class Penalty:
    """What a regularizer asks of one model. This one asks nothing."""

    weight: float = 0.0
    shares: dict[str, tuple[Tensor, int]]
    """What `figures` is made of, summed since the last call: part of the state of a run."""

    def __init__(self) -> None:
        self.shares = {}

    def value(self) -> Tensor:
        """weight * penalty of the forward passes since the last call: a number to add to the loss of these passes."""
        return torch.zeros(())

    def figures(self) -> dict[str, float]:
        """A figure for each layer, the mean since the last call."""
        return {}

    def remove(self) -> None:
        """Stop watching the model."""


@dataclass(frozen=True, kw_only=True)
class Regularizer(ABC):
    """Settings of a regularizer: its fields are the keys of its YAML."""

    name: ClassVar[str] = ""

    @abstractmethod
    def attach(self, model: nn.Module) -> Penalty:
        """Begin to watch a model. Raises ValueError where the model has nothing that it could watch."""


REGULARIZERS: Registry[type[Regularizer]] = Registry("regularizer")
register, find = REGULARIZERS.register, REGULARIZERS.find


@register("none")
@dataclass(frozen=True, kw_only=True)
class NoRegularizer(Regularizer):
    """Nothing is added to the loss."""

    def attach(self, model: nn.Module) -> Penalty:
        return Penalty()


# ---- rounding margin ----------------------------------------------------------------------------------------------------


class _Margin(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, v: Tensor, step: Tensor, offset: Tensor, qn: Tensor, qp: Tensor, margin: float
    ) -> tuple[Tensor, Tensor]:
        wide = v.to(torch.promote_types(v.dtype, torch.float32))
        u = ((wide - offset) / step).clamp(-qn, qp)
        beyond = u - u.floor() - 0.5
        lack = (margin - beyond.abs()).clamp_min(0)
        ctx.save_for_backward((lack * beyond.sign()).to(v.dtype), step)
        ctx.count = max(v.numel(), 1)
        close = (lack > 0).sum() / ctx.count
        ctx.mark_non_differentiable(close)
        return lack.square().sum() / ctx.count, close

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Any, ...]:
        lack, step = ctx.saved_tensors
        return (lack * (-2 * g / ctx.count / step)).to(lack.dtype), None, None, None, None, None


def rounding_margin(
    v: Tensor,
    step: Tensor,
    qn: int | Tensor,
    qp: int | Tensor,
    margin: float = 0.25,
    offset: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(L, share): what it costs that values stand closer than `margin` steps to where their code changes, and how many do.

        u = clip((v - offset) / step, -qn, qp)      d = |u - floor(u) - 1/2|, the distance to the nearest threshold, 0 .. 1/2
        L = mean max(0, margin - d)^2               dL/du = -2 max(0, margin - d) sign(u - floor(u) - 1/2) / numel

    A threshold is where rounding changes its mind: halfway between two codes; there is none beyond -qn and qp, where L is 0.
    step and offset count as constants, or a large step would be the cheapest answer. With margin 1/2, L = mean (u - round u)^2:
    the dampening loss of arXiv 2203.11086 in steps instead of in units of v.

    >>> v = torch.tensor([0.9, 1.4, 1.6, 7.0], requires_grad=True)
    >>> loss, share = rounding_margin(v, torch.tensor(1.0), qn=0, qp=3)
    >>> loss.backward()
    >>> round(loss.item(), 4), share.item(), [round(g, 3) for g in v.grad.tolist()]  # 1.4 is sent down, 1.6 up
    (0.0112, 0.5, [-0.0, 0.075, -0.075, 0.0])
    """
    step, offset, qn, qp = (torch.as_tensor(t, device=v.device).detach() for t in (step, offset, qn, qp))
    loss, share = _Margin.apply(v, step, offset, qn, qp, margin)
    return loss, share


Measured = tuple[str, Tensor, Tensor]  # layer, L, share


class MarginPenalty(Penalty):
    """Collects L of every watched tensor while the model trains; nothing in eval or without gradients."""

    def __init__(self, model: nn.Module, settings: "RoundingMargin") -> None:
        super().__init__()
        self.weight = settings.weight
        self._passes: list[Measured] = []
        self._handles = list(_watch(model, settings, self._passes))
        if not self._handles:
            raise ValueError(
                f"rounding_margin: the model has no {settings.target.replace('_', ' ')} that are rounded; "
                "accepted: quant=lsq (both targets), quant=xnor (partial_sums)"
            )

    def value(self) -> Tensor:
        total = torch.zeros(())
        for name, loss, share in self._passes:
            total = total + loss
            known, count = self.shares.get(name, (torch.zeros(()), 0))
            self.shares[name] = known + share.detach(), count + 1
        self._passes.clear()
        return self.weight * total

    def figures(self) -> dict[str, float]:
        """Share of values within the margin of a threshold."""
        figures = {name: float(total) / count for name, (total, count) in self.shares.items()}
        self.shares.clear()
        return figures

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _watch(model: nn.Module, settings: "RoundingMargin", passes: list[Measured]) -> Iterator[RemovableHandle]:
    """Hooks on whatever rounds: layers and activations with learned steps, binary layers on what their sign is taken of."""
    for name, layer in quantized_layers(model).items():
        part = getattr(layer, "act_quantizer" if settings.target == "partial_sums" else "weight_quantizer", None)
        if isinstance(part, StepQuantizer):
            # A matrix layer may multiply codes without calling its quantizer; an activation rounds what comes out of its ReLU.
            inner = not hasattr(layer, "weight_quantizer")
            weight = getattr(layer, "weight", None) if settings.target == "weights" else None
            hook = _step_hook(name, part, weight, settings.margin, passes)
            yield (part if inner else layer).register_forward_pre_hook(hook)  # type: ignore[union-attr]
        elif layer.precision.act == 1 and settings.target == "partial_sums":
            norm = getattr(layer, "norm", None)
            part = layer if norm is None else norm
            assert isinstance(part, nn.Module)
            yield part.register_forward_hook(_sign_hook(name, settings.margin, passes, after=norm is not None))


def _step_hook(
    name: str, part: StepQuantizer, weight: Tensor | None, margin: float, passes: list[Measured]
) -> Callable[[nn.Module, tuple[Tensor]], None]:
    def measure(module: nn.Module, inputs: tuple[Tensor]) -> None:
        v = inputs[0] if weight is None else weight
        if module.training and v.requires_grad and torch.is_grad_enabled():  # images are nobody's partial sums
            offset = 0.0 if part.offset is None else part.offset
            passes.append((name, *rounding_margin(v, part.size(), part.qn, part.qp, margin, offset)))

    return measure


def _sign_hook(name: str, margin: float, passes: list[Measured], after: bool) -> Callable[..., None]:
    """The sign has one threshold, 0: codes 0 and 1 of step 1 from -1/2."""

    def measure(part: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        y = output if after else inputs[0]
        if part.training and y.requires_grad and torch.is_grad_enabled():
            passes.append((name, *rounding_margin(y, y.new_ones(()), 0, 1, margin, -0.5)))

    return measure


@register("rounding_margin")
@dataclass(frozen=True, kw_only=True)
class RoundingMargin(Regularizer):
    """Keep what is rounded away from where rounding changes its mind; conf/regularizer/rounding_margin.yaml explains the keys.

    The penalty is weight * sum over layers of L (`rounding_margin`); `figures` the share of values within the margin.

    >>> from quant.base import find
    >>> model = find("lsq")().layer(nn.Linear(8, 4))
    >>> penalty = RoundingMargin(margin=0.5, weight=2.0).attach(model)
    >>> _ = model(torch.rand(16, 8, requires_grad=True)); penalty.value().item() > 0, penalty.value().item()
    (True, 0.0)
    """

    weight: Annotated[float, Ge(0)] = 1.0
    margin: Annotated[float, Interval(gt=0, le=0.5)] = 0.25
    target: Literal["partial_sums", "weights"] = "partial_sums"

    def attach(self, model: nn.Module) -> Penalty:
        return MarginPenalty(model, self)
