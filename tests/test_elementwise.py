"""The one-pass kernels against the chains of torch operations that they stand in for."""

import pytest
import torch
from torch import Tensor

from quant import fused, kernels
from quant.codecs import Uniform
from quant.frugal import relu
from quant.pack import pack_bits
from quant.uniform import GradientRounding, Grid, GridCodes, decode, encode, grid, round_to, span

pytestmark = pytest.mark.skipif(kernels.why_not() is not None, reason=str(kernels.why_not()))
SIZES = [1, 63, 64, 65, 4096, (1 << 15) - 1, (1 << 15) + 1, 100_003]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """`slow.setattr(...)`: turns the kernels off, for the same call by torch."""
    return monkeypatch


def by_torch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fused, "usable", lambda x, size=None: False)


@pytest.mark.parametrize("size", SIZES)
def test_codes_of_learned_steps_and_back(size: int) -> None:
    from quant.kernels import elementwise

    torch.manual_seed(size)
    x, step = 3 * torch.randn(size), torch.tensor([0.37])
    for low, high in ((0, 15), (-8, 7), (-128, 127), (0, 255)):
        ends = torch.tensor(low), torch.tensor(high)
        want = (x / step).round().clamp(low, high)
        codes, bad = elementwise.encode(x, step, *ends)
        assert bad == 0
        assert torch.equal(codes.float() + low, want)
        assert torch.equal(elementwise.decode(codes, -ends[0], step), want * step)


@pytest.mark.parametrize("size", SIZES)
def test_gradient_of_a_step(size: int) -> None:
    from quant.kernels import elementwise

    torch.manual_seed(size)
    x, g, step = torch.randn(size).relu_(), torch.randn(size), torch.tensor([0.13])
    u = x / step
    inside, code = (u > 0) & (u < 15), u.round().clamp(0, 15)
    slope = torch.where(inside, code.double() - u.double(), code.double())
    want = (slope * g.double()).sum()
    dx, total = elementwise.step_gradient(x, g.clone(), step, torch.tensor(0), torch.tensor(15))
    assert torch.equal(dx, torch.where(inside, g, 0))
    assert torch.allclose(total, want, rtol=0, atol=1e-6 * float((slope * g).abs().sum() + 1))


@pytest.mark.parametrize("place", [0, 77, 40_000, 99_998])
def test_what_is_no_number_is_not_lost(place: int) -> None:
    from quant.kernels import elementwise

    x, ends = torch.ones(100_000), (torch.tensor(0), torch.tensor(3))
    x[place + 1 :: 2] = torch.inf
    codes, bad = elementwise.encode(x, torch.tensor(0.5), *ends)
    assert (codes[place + 1 :: 2] == 3).all()
    assert bad == 0
    x[place] = torch.nan
    codes, bad = elementwise.encode(x, torch.tensor(0.5), *ends)
    assert codes[place] == 0
    assert bad.isnan()


@pytest.mark.parametrize("zero_exact", [True, False])
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_grids(bits: int, zero_exact: bool, slow: pytest.MonkeyPatch) -> None:
    torch.manual_seed(bits)
    for x in (torch.randn(3, 7, 40, 41), torch.rand(70_001) + 1, torch.zeros(5000), torch.full((5000,), -2.0)):
        there = span(x, bits, zero_exact)
        narrow = Grid(there.step * 0.7, there.offset, zero_exact)  # some of x lies outside
        results = []
        for usable in (True, False):
            if not usable:
                by_torch(slow)
            row = [round_to(x, there, bits), round_to(x, narrow, bits), encode(x, there, bits)]
            results.append([*row, decode(row[-1], there)])
        slow.undo()
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize("zero_exact", [True, False])
def test_stochastic_rounding_takes_a_neighbour_and_means_what_it_rounds(zero_exact: bool) -> None:
    torch.manual_seed(0)
    g = torch.randn(4096)
    there = span(g, 4, zero_exact)
    rounding = GradientRounding(4, zero_exact)
    draws = torch.stack([rounding(g) for _ in range(2000)])
    assert ((draws - g).abs() <= there.step * 1.0001).all()
    error = (draws.mean(0) - g) / there.step
    assert error.abs().max() < 5 * 0.5 / 2000**0.5  # five standard deviations of a coin
    assert error.mean().abs() < 5 * 0.5 / (2000 * 4096) ** 0.5
    noise = (draws - g) / there.step
    assert torch.corrcoef(noise[:, :64].T).fill_diagonal_(0).abs().max() < 0.13
    assert torch.corrcoef(noise[:64]).fill_diagonal_(0).abs().max() < 0.13


def test_seeds_come_from_torch() -> None:
    g, draws = torch.randn(5000), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(GradientRounding(8)(g))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("group", [1, 7, 64, 100, 256, 5000, None])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_groups(bits: int, group: int | None, slow: pytest.MonkeyPatch) -> None:
    torch.manual_seed(bits)
    for x in (
        torch.randn(4, 5, 31, 17),
        torch.randn(2, 8, 16, 16).to(memory_format=torch.channels_last),
        torch.ones(3000),
    ):
        codec, results = Uniform.of(x, bits, group=group), []
        for usable in (True, False):
            if not usable:
                by_torch(slow)
            saved = codec.encode(x)
            results.append([*saved, codec.decode(*saved)])
        slow.undo()
        assert all(map(torch.equal, *results))
        either = Uniform.of(x, bits, stochastic=True, group=group)
        packed, low, step = either.encode(x)
        steps = codec.tensor(step.expand(-1, codec.group_size).reshape(-1))
        assert ((either.decode(packed, low, step) - x).abs() <= 1.001 * steps + 1e-6).all()


@pytest.mark.parametrize("size", [3000, 4096, 100_003])
def test_one_bit_keeps_the_gradient(size: int) -> None:
    from quant.kernels import elementwise

    flags, g = torch.rand(size) < 0.5, torch.randn(size)
    assert torch.equal(elementwise.keep(pack_bits(flags), g), torch.where(flags, g, 0))


def test_relu_in_any_memory_format() -> None:
    x, g = torch.randn(2, 5, 16, 16), torch.randn(2, 5, 16, 16)
    for a in (x, x.to(memory_format=torch.channels_last)):
        for b in (g, g.to(memory_format=torch.channels_last)):
            leaf = a.clone().requires_grad_()
            relu(leaf).backward(b)
            assert torch.equal(leaf.grad, torch.where(x > 0, g, 0))


def test_threads_change_nothing() -> None:
    from quant.kernels import elementwise

    x, before = torch.randn(1 << 18), torch.get_num_threads()

    def everything() -> list[Tensor]:
        there = grid(x.amin(), x.amax(), 8)
        codec = GridCodes(there, 8)
        _, total = elementwise.step_gradient(x, x.clone(), torch.tensor(0.1), torch.tensor(-8), torch.tensor(7))
        return [elementwise.round_to_grid(x, there.step, 0.0, there.offset, 255, seed=5), total, *codec.encode(x)]

    torch.set_num_threads(1)
    alone = everything()
    torch.set_num_threads(4)
    together = everything()
    torch.set_num_threads(before)
    assert all(map(torch.equal, alone, together))
