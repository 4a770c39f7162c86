"""Min-max grids: golden numbers, what a grid promises, unbiased rounding, running ranges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_functional import golden
from torch import Tensor

from quant.uniform import (
    GradientRounding,
    Grid,
    RunningRange,
    decode,
    encode,
    fake_quantize,
    grid,
    mean_sample_limits,
    round_to,
    row_limits,
    span,
)

BITS = [2, 3, 8, 12, 16]
LIMITS = st.floats(-1e6, 1e6, allow_nan=False)


def ends(of: Grid, bits: int) -> tuple[float, float]:
    """The smallest and the largest value of a grid, from its definition."""
    codes = torch.tensor([0.0, 2.0**bits - 1], dtype=of.step.dtype)
    low, high = ((codes - of.offset) * of.step if of.zero_exact else codes * of.step + of.offset).tolist()
    return low, high


def test_the_golden_quantizer_of_convnet_pytorch() -> None:
    z = golden("uniform8.npz")
    x = z["x"]
    assert_close(round_to(x, grid(*row_limits(x), 8, zero_exact=False), 8), z["quantized_per_sample"])
    low, high = mean_sample_limits(x)
    assert_close(low, z["zero_point_mean_over_samples"].squeeze())
    assert_close(high - low, z["range_mean_over_samples"].squeeze())
    assert_close(round_to(x, grid(low, high, 8, zero_exact=False), 8), z["quantized_mean_over_samples"])


@settings(max_examples=200, deadline=None)
@given(a=LIMITS, b=LIMITS, bits=st.sampled_from(BITS), zero_exact=st.booleans())
def test_a_grid_covers_its_range(a: float, b: float, bits: int, zero_exact: bool) -> None:
    low, high = (torch.tensor(v, dtype=torch.float64) for v in (min(a, b), max(a, b)))
    of = grid(low, high, bits, zero_exact)
    first, last = ends(of, bits)
    slack = 1e-9 * max(abs(a), abs(b))
    assert first <= low.item() + slack
    assert last >= high.item() - slack
    assert of.step.item() > 0
    x = torch.linspace(low.item(), high.item(), 101, dtype=torch.float64)
    assert ((round_to(x, of, bits) - x).abs() <= 0.5 * of.step * (1 + 1e-6) + slack).all()


@settings(max_examples=200, deadline=None)
@given(a=LIMITS, b=LIMITS, bits=st.sampled_from(BITS), stochastic=st.booleans())
def test_zero_is_exact(a: float, b: float, bits: int, stochastic: bool) -> None:
    of = grid(torch.tensor(min(a, b)), torch.tensor(max(a, b)), bits)
    assert round_to(torch.zeros(64), of, bits, stochastic).count_nonzero() == 0
    assert decode(encode(torch.zeros(3), of, bits), of).count_nonzero() == 0


@pytest.mark.parametrize("zero_exact", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_codes_hold_the_values(bits: int, dtype: torch.dtype, zero_exact: bool) -> None:
    x = torch.randn(7, 50, dtype=dtype)
    of = grid(*mean_sample_limits(x), bits, zero_exact)
    codes = encode(x, of, bits)
    assert codes.dtype == (torch.uint8 if bits <= 8 else torch.int16)
    assert torch.equal(decode(codes, of), round_to(x, of, bits))
    assert torch.equal(decode(encode(round_to(x, of, bits), of, bits), of), round_to(x, of, bits))


@pytest.mark.parametrize("zero_exact", [True, False])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e30, -3e38, 3e38, 1e-30, 1e-42])
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_a_constant_tensor_has_a_grid(value: float, bits: int, zero_exact: bool) -> None:
    x = torch.full((4, 3), value)
    for stochastic in (False, True):
        y = round_to(x, span(x, bits, zero_exact), bits, stochastic)
        assert y.isfinite().all()
        assert ((y - x).abs() <= max(2e-5 * abs(value), 2e-38)).all()


def test_the_widest_range_does_not_overflow() -> None:
    x = torch.tensor([-3.4e38, 0.0, 1.0, 3.4e38])
    assert span(x, 8).step.isfinite()
    for dtype in (torch.float16, torch.bfloat16):
        wide = torch.tensor([-6e4, 0.0, 6e4], dtype=dtype)
        y = round_to(wide, span(wide, 8), 8)
        assert y.dtype == dtype
        assert y.isfinite().all()


def test_nan_stays_visible() -> None:
    x = torch.tensor([1.0, float("nan")])
    assert round_to(x, span(x, 8), 8).isnan().all()


@pytest.mark.parametrize("zero_exact", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_stochastic_rounding_is_unbiased_everywhere(bits: int, zero_exact: bool) -> None:
    torch.manual_seed(0)
    x = torch.linspace(-1.0, 2.3, 50, dtype=torch.float64)
    of, draws = span(x, bits, zero_exact), 4000
    y = round_to(x.expand(draws, -1), of, bits, stochastic=True)
    assert ((y - x).abs() <= of.step * (1 + 1e-9)).all()
    standard_error = 0.5 * of.step / draws**0.5
    assert ((y.mean(0) - x).abs() <= 5 * standard_error).all()


def test_gradients_are_rounded_over_the_whole_tensor_by_the_default_generator() -> None:
    g = torch.randn(4, 3, 5, 5)
    rounding = GradientRounding(8)
    torch.manual_seed(7)
    first = rounding(g)
    torch.manual_seed(7)
    assert torch.equal(first, rounding(g))
    assert not torch.equal(first, rounding(g))
    assert len((first / span(g, 8).step).round().unique()) <= 256
    assert GradientRounding(8)(torch.zeros(3, 3)).count_nonzero() == 0
    relu_masked = g.clamp_min(0)
    assert torch.equal(rounding(relu_masked)[relu_masked == 0], relu_masked[relu_masked == 0])


def test_the_gradient_is_the_identity_outside_the_range_too() -> None:
    x = torch.tensor([-9.0, -0.3, 0.0, 0.2, 9.0], dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, dtype=torch.float64)
    y = fake_quantize(x, grid(torch.tensor(-1.0), torch.tensor(1.0), 4), 4)
    y.backward(g)
    assert x.grad is not None
    assert torch.equal(x.grad, g)
    assert y.abs().max() < 1.2


def test_running_ranges_follow_torch_after_a_mean_of_the_first_batches() -> None:
    torch.manual_seed(0)
    ranges = RunningRange(8, momentum=0.1, zero_exact=True).double()
    expected = torch.zeros(2, dtype=torch.float64)
    for batch in range(15):
        x = torch.randn(6, 20, dtype=torch.float64) * (batch + 1)
        new = torch.stack(mean_sample_limits(x))
        share = max(0.1, 1 / (batch + 1))
        expected = (1 - share) * expected + share * new
        ranges(x)
        if batch == 0:
            assert_close(torch.stack([ranges.low, ranges.high]), new)
    assert_close(torch.stack([ranges.low, ranges.high]), expected)
    ranges.eval()
    assert_close(ranges(x).step, grid(expected[0], expected[1], 8).step)


def test_eval_reads_the_running_range_or_measures_before_there_is_one() -> None:
    ranges = RunningRange(8, momentum=0.1, zero_exact=True).eval()
    x = torch.randn(4, 9)
    assert torch.equal(ranges(x).step, grid(*mean_sample_limits(x), 8).step)
    assert ranges.batches.item() == 0
    ranges.calibrate_(x)
    before = ranges(x).step
    assert torch.equal(ranges(100 * x).step, before)
    ranges.calibrate_(2 * x)
    assert torch.equal(ranges(x).step, grid(*mean_sample_limits(2 * x), 8).step)


def test_health_counts_what_lies_outside() -> None:
    ranges = RunningRange(8, momentum=0.1, zero_exact=False)
    x = torch.tensor([[0.0, 1.0], [0.0, 3.0]])
    assert ranges.health(x) == {"clip_ratio": 0.25, "step_size": pytest.approx(2 / 255)}


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
