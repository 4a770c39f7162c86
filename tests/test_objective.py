"""The loss of a run: distillation against autograd of its definition, mixed images and the shares of their labels."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from runner.objective import Objective, distillation, mix


def trainer(**keys: Any) -> Any:
    return SimpleNamespace(**{"label_smoothing": 0.0, "distill_weight": 0.9, "distill_temperature": 4.0} | keys)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_distillation_and_its_gradient_are_the_closed_forms(temperature: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    answers = 3 * torch.randn(5, 7, dtype=torch.float64)
    loss = distillation(logits, answers, temperature)
    loss.backward()
    p, q = (answers / temperature).softmax(1), (logits.detach() / temperature).softmax(1)
    torch.testing.assert_close(loss.detach(), temperature**2 * (p * (p / q).log()).sum() / 5, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits.grad, temperature * (q - p) / 5, rtol=1e-12, atol=1e-12)


def test_at_high_temperature_it_is_the_squared_difference_of_centred_logits() -> None:
    """T^2 KL -> sum (z - v)^2 / (2 N) for centred z, v over N classes (Hinton et al., section 2.1)."""
    torch.manual_seed(0)
    z, v = (x - x.mean(1, keepdim=True) for x in torch.randn(2, 4, 10, dtype=torch.float64))
    expected = ((z - v) ** 2).sum(1).mean() / 20
    torch.testing.assert_close(distillation(z, v, 1e4), expected, rtol=1e-3, atol=0)


def test_a_teacher_who_agrees_adds_nothing() -> None:
    logits = torch.randn(3, 4, dtype=torch.float64)
    assert distillation(logits, logits + 5, 2.0).abs() < 1e-12


def test_the_objective_weighs_labels_and_teacher() -> None:
    torch.manual_seed(0)
    images, logits, labels = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    plain = Objective(trainer(label_smoothing=0.1))(images, logits, labels)
    assert torch.equal(plain, F.cross_entropy(logits, labels, label_smoothing=0.1))
    taught = Objective(trainer(distill_weight=0.25), teacher=lambda x: 2 * x)(images, logits, labels)
    expected = 0.75 * F.cross_entropy(logits, labels) + 0.25 * distillation(logits, 2 * images, 4.0)
    torch.testing.assert_close(taught, expected)


@pytest.mark.parametrize("alphas", [{"mixup": 0.2}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_shares_of_the_labels_are_the_shares_of_the_images(alphas: Any) -> None:
    """Image i is all i: what its mixture holds can be read off its mean."""
    labels = torch.arange(6)
    images = labels.view(6, 1, 1, 1).expand(6, 2, 16, 12).double()
    for batch in range(30):
        mixed, shares = mix(images, labels, alphas, 6, (3, 1, batch))
        assert shares.shape == (6, 6)
        torch.testing.assert_close(shares.sum(1), torch.ones(6, dtype=torch.float64))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), (shares * labels).sum(1))


def test_mixing_depends_on_seed_epoch_and_batch_alone() -> None:
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 0, 1])

    def drawn(draw: tuple[int, ...]) -> torch.Tensor:
        torch.rand(3)
        return mix(images, labels, {"mixup": 1.0}, 2, draw)[0]

    assert torch.equal(drawn((0, 1, 2)), drawn((0, 1, 2)))
    assert len({drawn(draw)[0].sum().item() for draw in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}) == 4


def test_both_kinds_get_their_turn() -> None:
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 0, 1])
    whole = [mix(images, labels, {"mixup": 1.0, "cutmix": 1.0}, 2, (0, 0, b))[0] for b in range(40)]
    pasted = sum(bool(torch.isin(m, images).all()) for m in whole)
    assert 10 <= pasted <= 30


def test_cutmix_boxes_have_the_area_that_was_drawn_in_the_mean() -> None:
    images, labels = torch.zeros(2, 1, 32, 32), torch.tensor([0, 1])
    shares = [mix(images, labels, {"cutmix": 1.0}, 2, (0, 0, b))[1][0, 0].item() for b in range(2000)]
    assert 0.5 < sum(shares) / len(shares) < 0.7  # 1/2 without the cut at the border
