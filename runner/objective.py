"""What a training step minimises: cross entropy with the labels, with those of mixed images, and with a teacher's answers.

    loss = (1 - w) CE(logits, targets) + w T^2 KL(softmax(teacher / T) || softmax(logits / T))

w: trainer.distill_weight, T: trainer.distill_temperature; without a teacher w is 0. T^2 keeps the size of the gradient
(Hinton, Vinyals, Dean, arXiv 1503.02531); as T grows, the second term becomes that of squared differences of centred logits.

Mixing is a pure function of (seed, epoch, batch), so that a run taken up again mixes the same images in the same shares.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from runner.schema import TrainerConfig

Alphas = Mapping[str, float]  # of mixup, cutmix: those that are asked for


def mix(images: Tensor, labels: Tensor, alphas: Alphas, classes: int, draw: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Every image mixed with its neighbour in the batch, and for each the shares of its classes (B, classes).

    `draw`: whole numbers that the randomness is a function of, such as seed, epoch and batch.

    mixup (arXiv 1710.09412): x = s x_i + (1 - s) x_j. cutmix (arXiv 1905.04899): a box of x_j, of about the share 1 - s of the
    area, pasted into x_i; s is then what is left of x_i. s from Beta(alpha, alpha); where both are asked for, one by the toss
    of a coin. Targets are mixed in the same shares.

    >>> images, labels = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1), torch.tensor([0, 1])
    >>> mixed, shares = mix(images, labels, {"mixup": 1.0}, 2, (0, 0, 0))
    >>> bool(mixed[0] == shares[0, 0] * 1 + shares[0, 1] * 3)
    True
    """
    random = np.random.default_rng(draw)
    kind = sorted(alphas)[int(random.integers(len(alphas)))]
    share, others = random.beta(alphas[kind], alphas[kind]), images.roll(1, 0)
    if kind == "mixup":
        images = torch.lerp(others, images, share)
    else:
        rows, columns = _box(images.shape[-2], images.shape[-1], share, random)
        images = images.clone()
        images[..., rows, columns] = others[..., rows, columns]
        share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / images[0, 0].numel()
    own = F.one_hot(labels, classes).to(images.dtype)
    return images, torch.lerp(own.roll(1, 0), own, share)


def likeliest(targets: Tensor) -> Tensor:
    """The class of every image: that of its larger part where it is a mixture."""
    return targets if targets.dim() == 1 else targets.argmax(1)


def _box(height: int, width: int, share: float, random: np.random.Generator) -> tuple[slice, slice]:
    """A box around a random pixel whose area is 1 - share of the image, cut at the border."""
    side = (1 - share) ** 0.5

    def edge(length: int) -> slice:
        centre, half = int(random.integers(length)), round(length * side / 2)
        return slice(max(centre - half, 0), min(centre + half, length))

    return edge(height), edge(width)


def distillation(logits: Tensor, answers: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(answers / T) || softmax(logits / T)), mean over the batch of B.

    Gradient by the logits: T (softmax(logits / T) - softmax(answers / T)) / B.

    >>> logits = torch.zeros(1, 2, requires_grad=True)
    >>> distillation(logits, torch.tensor([[0.0, 4.0]]), 2.0).backward()
    >>> [round(g, 4) for g in logits.grad[0].tolist()]            # 2 (1/2 - softmax([0, 2]))
    [0.7616, -0.7616]
    """
    student, teacher = (x.div(temperature).log_softmax(1) for x in (logits, answers))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


class Objective:
    """The loss of a run: label smoothing, and a teacher where one is given."""

    def __init__(self, config: TrainerConfig, teacher: Callable[[Tensor], Tensor] | None = None) -> None:
        self.config, self.teacher = config, teacher

    def __call__(self, images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of a part of a batch. `images` are what the network has seen: the teacher answers to the same."""
        loss = F.cross_entropy(logits, targets, label_smoothing=self.config.label_smoothing)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            answers = self.teacher(images).to(logits.dtype)
        taught = distillation(logits, answers, self.config.distill_temperature)
        return (1 - self.config.distill_weight) * loss + self.config.distill_weight * taught
