"""The parity certificate: the whole validation set through the trained network and through what was exported.

A difference in the answer is accepted in two ways only: a bound that says how many there may be, or an explanation. For a
packed network that is: computed in floats, in the memory format of training, the file gives the trained network's answer; with
the packed kernels it gives another, because a named float operation rounds differently in another memory format, by so many
units in the last place, and a value that lies that near to a threshold falls on its other side.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quant import kernels
from quant.inference import Op, PackedModel
from runner.data.sources import Source

ROUNDING = (
    256  # units in the last place of the largest value, by which sums of floats may differ when added in another order
)
MOST_LISTED = 100
Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Bound:
    """What is accepted: the least percentage of equal answers (explained ones count), the largest differences."""

    agreement: float
    top1_delta: float | None = None
    logit_difference: float | None = None


@dataclass
class Parity:
    """Figures of both networks on the same images; accuracies in percent."""

    images: int = 0
    trained_top1: float = 0.0
    exported_top1: float = 0.0
    trained_loss: float = 0.0
    exported_loss: float = 0.0
    equal_top1: float = 0.0
    largest_logit_difference: float = 0.0
    different: list[dict[str, Any]] = field(default_factory=list)
    unexplained: int = 0
    not_finite: int = 0
    """Images for which a logit of either network is none: their answers mean nothing, also where they are equal."""

    @property
    def top1_delta(self) -> float:
        return self.exported_top1 - self.trained_top1

    def faults(self, bound: Bound) -> list[str]:
        """Where the figures are outside of the bound."""
        agreement = 100 * (1 - self.unexplained / self.images)
        found = []
        if self.not_finite:
            found.append(f"{self.not_finite} of {self.images} answers hold logits that are not finite")
        if agreement < bound.agreement:
            found.append(
                f"{self.unexplained} of {self.images} answers differ; at least {bound.agreement:g} % must agree"
            )
        if bound.top1_delta is not None and abs(self.top1_delta) > bound.top1_delta:
            found.append(f"top1 changes by {self.top1_delta:+.3f} points; at most {bound.top1_delta:g} are accepted")
        if bound.logit_difference is not None and not self.largest_logit_difference <= bound.logit_difference:
            difference = self.largest_logit_difference
            found.append(f"logits differ by up to {difference:.3g}; at most {bound.logit_difference:g} is accepted")
        return found

    def figures(self) -> dict[str, Any]:
        listed = asdict(self) | {"different": self.different[:MOST_LISTED], "different_top1": len(self.different)}
        return listed | {"top1_delta": self.top1_delta}


@torch.no_grad()
def compare(trained: Network, exported: Network, source: Source, sizes: dict[str, int]) -> Parity:
    """Both networks on every image of `source`. Differences are explained where `exported` is a packed network."""
    parity, sums = Parity(), torch.zeros(5, dtype=torch.float64)
    twin = PackedModel(exported.graph, packed=False) if isinstance(exported, PackedModel) else None
    for images, labels in source.batches(seed=0, epoch=0, **sizes):
        first, second = trained(images).float(), exported(images).float()
        parity.not_finite += int((~(first.isfinite() & second.isfinite()).all(1)).sum())
        answers = first.argmax(1), second.argmax(1)
        losses = (F.cross_entropy(logits, labels, reduction="sum").double() for logits in (first, second))
        right = ((answer == labels).sum().double() for answer in answers)
        sums += torch.stack([*losses, *right, torch.tensor(float(len(labels)), dtype=torch.float64)])
        largest = (first - second).abs().max().item()
        parity.largest_logit_difference = max(
            parity.largest_logit_difference, largest if largest == largest else float("inf")
        )
        for row in (answers[0] != answers[1]).nonzero().flatten().tolist():
            trained_says, exported_says = int(answers[0][row]), int(answers[1][row])
            why = None
            if (
                isinstance(exported, PackedModel)
                and twin is not None
                and int(twin(images)[row].argmax()) == trained_says
            ):
                why = explained(exported, twin, images, row)
            found = {"image": parity.images + row, "trained": trained_says, "exported": exported_says}
            parity.different.append(found | {"because": why or "not explained"})
            parity.unexplained += why is None
        parity.images += len(labels)
    loss, other_loss, right_count, other_right, count = sums.tolist()
    parity.trained_loss, parity.exported_loss = loss / count, other_loss / count
    parity.trained_top1, parity.exported_top1 = 100 * right_count / count, 100 * other_right / count
    parity.equal_top1 = 100 * (1 - len(parity.different) / count)
    return parity


@torch.inference_mode()
def explained(packed: PackedModel, twin: PackedModel, images: Tensor, row: int) -> str | None:
    """Which float operation rounds differently for an image of a batch, and which sign turns by it; None if there is none.

    `twin` is the same network in floats, in the memory format of training.
    """
    values, others = packed.begin(images), twin.begin(images)
    rounding = ""
    for op, other in zip(packed.ops, twin.ops, strict=True):
        turned = _turned(op, values[op.inputs[0]], others[op.inputs[0]], row) if rounding else ""
        op(values)
        other(others)
        mine, theirs = _floats(values[op.output], others[op.output])[row], others[op.output][row]
        if turned:
            return f"{rounding}; {turned}"
        difference = (mine - theirs).abs().max().item()
        if rounding or not difference:
            continue
        largest = theirs.abs().max()
        unit = (torch.nextafter(largest, largest + 1) - largest).item()
        if op.kind.startswith("sign_") or difference > ROUNDING * unit:
            return None
        rounding = f"{op.name} ({op.kind}) differs by {difference:.3g}, {difference / unit:.1f} units in the last place"
    return f"{rounding}; no sign turns, the largest two logits are that near" if rounding else None


def _turned(op: Op, mine: Tensor, theirs: Tensor, row: int) -> str:
    """The signs in front of a binary layer that are not the same, in words."""
    if not op.kind.startswith("sign_") or mine.dtype == torch.int32:
        return ""
    threshold = op.threshold
    limits = torch.zeros(()) if threshold is None else threshold.view(-1, *[1] * (mine.dim() - 2))
    other_side = (mine < limits)[row] != (theirs < limits)[row]
    if not bool(other_side.any()):
        return ""
    distance = (mine - limits)[row].abs()[other_side].max().item()
    return (
        f"{int(other_side.sum())} signs in front of {op.name} turn, of values within {distance:.3g} of their threshold"
    )


def _floats(value: Tensor, like: Tensor) -> Tensor:
    """Packed bits as +1 and -1 in the shape of `like`; floats as they are."""
    if value.dtype != torch.int32:
        return value
    if like.dim() == 4:
        return kernels.unpack_signs(value, like.shape)
    rows = kernels.unpack_signs(value, (1, like.shape[1], 1, like.shape[0]))
    return rows.permute(0, 2, 3, 1).reshape(like.shape)
