"""Gradients by table lookup against float64: as near to them as float products are, whatever the geometry."""

from typing import Any

import pytest
import torch
from torch import Tensor

from quant import kernels
from quant.functional import sign
from quant.matmul import Conv, Linear
from quant.sign_gradients import obstacle_of_lookup

needs_lookup = pytest.mark.skipif(kernels.why_no_lookup() is not None, reason=str(kernels.why_no_lookup()))

# images, channels, filters, height, width, kernel, stride, padding
SHAPES: list[tuple[int, int, int, int, int, tuple[int, int], tuple[int, int], tuple[int, int]]] = [
    (4, 64, 64, 8, 8, (3, 3), (1, 1), (1, 1)),
    (5, 33, 7, 9, 7, (3, 3), (2, 2), (1, 1)),
    (3, 5, 6, 6, 6, (1, 1), (2, 2), (0, 0)),
    (2, 70, 20, 9, 6, (3, 2), (1, 2), (2, 0)),
    (1, 40, 9, 5, 5, (5, 5), (1, 1), (4, 4)),
    (7, 100, 65, 3, 80, (3, 5), (1, 3), (0, 2)),
    (4, 16, 3, 4, 4, (4, 4), (1, 1), (0, 0)),
    (9, 16, 32, 70, 5, (7, 5), (2, 2), (3, 2)),
    (2, 8, 4, 2, 300, (2, 2), (3, 3), (1, 1)),
    (2, 160, 1024, 40, 40, (3, 3), (1, 1), (1, 1)),
]


class Case:
    """A convolution of signs, the gradient of its output, and its gradients in floats."""

    def __init__(self, shape: Any, channels_last: bool) -> None:
        images, channels, filters, height, width, kernel, self.stride, self.padding = shape
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(images, channels, height, width, generator=generator)
        self.w = torch.randn(filters, channels, *kernel, generator=generator)
        y = torch.conv2d(x, self.w, None, self.stride, self.padding)
        g = torch.randn(y.shape, generator=generator)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.x, self.g = x.contiguous(memory_format=layout), g.contiguous(memory_format=layout)
        self.alpha = self.w.abs().mean((1, 2, 3))

    def looked_up(self) -> tuple[Tensor, Tensor]:
        size, signs = self.x.shape, kernels.pack_activations(self.x)
        dx = kernels.input_gradient(self.g, self.w, self.alpha, size, self.stride, self.padding)
        kernel = (self.w.shape[2], self.w.shape[3])
        return dx, kernels.weight_gradient(self.g, signs, size, kernel, self.stride, self.padding)

    def floats(self, dtype: torch.dtype) -> list[Tensor]:
        signs, weight = sign(self.x), sign(self.w) * self.alpha.view(-1, 1, 1, 1)
        given = (tensor.to(dtype) for tensor in (self.g, signs, weight))
        rest = (None, self.stride, self.padding, (1, 1), False, [0, 0], 1, [True, True, False])
        return [tensor for tensor in torch.ops.aten.convolution_backward(*given, *rest) if tensor is not None]


@needs_lookup
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_float64_but_for_rounding(shape: Any, channels_last: bool) -> None:
    case = Case(shape, channels_last)
    for ours, floats, exact in zip(
        case.looked_up(), case.floats(torch.float32), case.floats(torch.float64), strict=True
    ):
        error, usual = ((g.double() - exact).norm() / exact.norm() for g in (ours, floats))
        assert error < max(4 * float(usual), 1e-7)
    one_pixel = case.g.shape[2:].numel() == 1
    assert one_pixel or case.looked_up()[0].stride() == case.x.stride()


@needs_lookup
def test_small_whole_numbers_come_out_exactly() -> None:
    """Their sums need no rounding, in whatever order: equal to the last bit."""
    case = Case(SHAPES[1], channels_last=False)
    case.g, case.alpha = (case.g * 8).round(), torch.ones_like(case.alpha)
    for ours, exact in zip(case.looked_up(), case.floats(torch.float64), strict=True):
        assert torch.equal(ours.double(), exact)


@needs_lookup
def test_threads_change_no_bit() -> None:
    case, before = Case((6, 64, 64, 12, 12, (3, 3), (1, 1), (1, 1)), channels_last=False), torch.get_num_threads()
    try:
        answers = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            answers.append(case.looked_up())
    finally:
        torch.set_num_threads(before)
    for answer in answers[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(answer, answers[0], strict=True))


@pytest.mark.parametrize(
    ("g", "shape", "reason"),
    [
        (torch.ones(2, 3), Linear(), "a linear layer"),
        (torch.ones(2, 4, 3, 3), Conv(groups=2), "groups 2"),
        (torch.ones(2, 4, 3, 3), Conv(dilation=(2, 2)), "dilation 2 x 2"),
        (torch.ones(2, 4, 3, 3, dtype=torch.float64), Conv(), "float64"),
        (torch.ones(0, 4, 3, 3), Conv(), "shape (0, 4, 3, 3)"),
        (torch.ones(2, 4, 3, 3, device="meta"), Conv(), "on meta"),
    ],
)
def test_what_cannot_be_looked_up_is_said(g: Tensor, shape: Any, reason: str) -> None:
    assert reason in str(obstacle_of_lookup(g, shape))


def test_other_processors_multiply_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANT_KERNELS_PATH", "portable")
    assert obstacle_of_lookup(torch.ones(2, 4, 3, 3), Conv()) == "lookup products need AVX-512"
