"""The shared functions against golden numbers, independently written closed forms, autograd and finite differences."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quant.functional import SignBits, binop_factor, scaled_sign, sign, ste_sign, ste_slope, straight_through
from quant.pack import Layout

GOLDEN = Path(__file__).parent / "golden"
SHAPES = [(6, 5, 3, 3), (4, 7), (3, 1, 5, 5), (1, 2, 1, 1)]
CURVES = [("clip", 1.0), ("bireal", 1.0), ("identity", 1.0), ("ede", 0.3), ("ede", 4.0), ("reste", 1.0), ("reste", 2.5)]


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / name) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


def weight(shape: tuple[int, ...], spread: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * spread


def gradient(w: Tensor, g: Tensor, form: str) -> Tensor:
    w = w.clone().requires_grad_()
    scaled_sign(w, form).backward(g)
    return w.grad


def closed_form(w: Tensor, g: Tensor) -> Tensor:
    """J^T G filter by filter with the whole Jacobian J = s s^T / n + alpha diag(m)."""
    rows = []
    for filter_weights, filter_gradient in zip(w.flatten(1), g.flatten(1), strict=True):
        n = len(filter_weights)
        s = torch.tensor([1.0 if v >= 0 else -1.0 for v in filter_weights], dtype=w.dtype)
        m = torch.tensor([1.0 if -1 <= v <= 1 else 0.0 for v in filter_weights], dtype=w.dtype)
        alpha = sum(abs(v) for v in filter_weights) / n
        rows.append((torch.outer(s, s) / n + alpha * torch.diag(m)).T @ filter_gradient)
    return torch.stack(rows).view_as(w)


# ---- sign and bits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_sign_has_two_values_and_zero_is_plus(dtype: torch.dtype) -> None:
    x = torch.tensor([-3.0, -0.0, 0.0, 5.0], dtype=dtype)
    assert sign(x).tolist() == [-1, 1, 1, 1]
    assert sign(x).dtype == dtype
    assert ste_sign(x).tolist() == [-1, 1, 1, 1]
    assert scaled_sign(x[None]).tolist() == [[-2, 2, 2, 2]]


@given(st.integers(0, 5), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31))
def test_one_bit_a_value_and_nothing_lost_in_any_layout(b: int, c: int, h: int, w: int, seed: int) -> None:
    x = sign(weight((b, c, h, w), seed=seed))
    layouts = [x, x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)]
    for laid_out in layouts:
        codec = SignBits.of(laid_out)
        (packed,) = codec.encode(laid_out)
        assert packed.dtype == torch.uint8
        assert packed.numel() == -(-x.numel() // 8)
        assert torch.equal(codec.decode(packed).double(), x)


def test_a_channels_last_tensor_comes_back_channels_last() -> None:
    x = sign(weight((2, 8, 4, 4))).to(memory_format=torch.channels_last)
    layout = Layout.of(x)
    assert layout.unpack_flags(layout.pack_flags(x > 0)).is_contiguous(memory_format=torch.channels_last)


def test_straight_through_gives_the_value_to_the_bit_and_the_gradient_unchanged() -> None:
    x = weight((50,), 3.0).requires_grad_()
    y = straight_through(x, x * 1e30 + 0.1)
    y.backward(weight((50,), seed=1))
    assert torch.equal(y, x.detach() * 1e30 + 0.1)
    assert torch.equal(x.grad, weight((50,), seed=1))


# ---- activations


def test_activation_matches_golden() -> None:
    data = golden("xnor_activation.npz")
    x = data["x"].clone().requires_grad_()
    y = ste_sign(x)
    y.backward(data["grad_output"])
    assert torch.equal(y, data["sign"])
    assert torch.allclose(x.grad, data["grad_input"], rtol=0, atol=1e-12)


def surrogate(x: Tensor, ste: str, t: float) -> Tensor:
    """The function that each estimator is the derivative of, written down from its paper."""
    if ste == "clip":
        return x.clamp(-1, 1)
    if ste == "bireal":
        inner = torch.where(x < 0, 2 * x + x**2, 2 * x - x**2)
        return torch.where(x.abs() < 1, inner, torch.sign(x))
    if ste == "ede":
        return max(1 / t, 1) * torch.tanh(t * x)
    if ste == "reste":
        power = torch.sign(x) * x.abs() ** (1 / t)
        limit = torch.sign(x) * 1.5 ** (1 / t)
        return torch.where(x.abs() < 0.1, x * 0.1 ** (1 / t) / 0.1, torch.where(x.abs() > 1.5, limit, power))
    return x


@pytest.mark.parametrize(("ste", "t"), CURVES)
def test_slopes_are_the_finite_differences_of_their_surrogates(ste: str, t: float) -> None:
    x = torch.linspace(-2.01, 2.013, 401, dtype=torch.float64)
    for kink in (-1.5, -1.0, -0.1, 0.0, 0.1, 1.0, 1.5):
        x = x[(x - kink).abs() > 1e-4]
    eps = 1e-6
    slope = (surrogate(x + eps, ste, t) - surrogate(x - eps, ste, t)) / (2 * eps)
    assert torch.allclose(ste_slope(x, ste, torch.tensor(t)), slope, atol=1e-7)


@pytest.mark.parametrize(("ste", "t"), CURVES)
def test_backward_is_the_slope_times_the_gradient(ste: str, t: float) -> None:
    x, g = weight((3, 4, 5, 5)).requires_grad_(), weight((3, 4, 5, 5), seed=1)
    ste_sign(x, ste, torch.tensor(t)).backward(g)
    assert torch.equal(x.grad, g * ste_slope(x.detach(), ste, torch.tensor(t)))


@pytest.mark.parametrize("ste", ["ede", "reste"])
def test_a_curve_without_its_sharpness_is_refused(ste: str) -> None:
    with pytest.raises(ValueError, match="sharpness"):
        ste_slope(torch.zeros(1), ste)


@pytest.mark.parametrize(("ste", "saved"), [("clip", 1024 // 8), ("identity", 0)])
def test_the_sign_remembers_one_bit_or_nothing(ste: str, saved: int) -> None:
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        ste_sign(torch.randn(1024, requires_grad=True), ste)
    assert sum(kept) == saved


# ---- weights


def test_weight_matches_golden() -> None:
    data = golden("xnor_weight.npz")
    w, g = data["weight_centred_clamped"], data["grad_output"]
    assert torch.allclose(scaled_sign(w), data["binarized"], rtol=0, atol=1e-12)
    assert torch.allclose(gradient(w, g, "exact"), data["grad_corrected"], rtol=0, atol=1e-12)
    assert torch.allclose(gradient(w, g, "binop"), data["grad_binop"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_is_the_closed_form_and_the_autograd_of_the_definition(shape: tuple[int, ...], spread: float) -> None:
    w, g = weight(shape, spread), weight(shape, seed=1)
    latent = w.clone().requires_grad_()
    through = latent.clamp(-1, 1)
    binary = through + (sign(w) - through).detach()
    (latent.abs().mean(list(range(1, w.dim())), keepdim=True) * binary).backward(g)
    exact = gradient(w, g, "exact")
    assert torch.allclose(exact, closed_form(w, g), rtol=0, atol=1e-12)
    assert torch.allclose(exact, latent.grad, rtol=0, atol=1e-12)


def test_exact_holds_at_zero_and_at_the_edge_of_the_window() -> None:
    w = torch.tensor([[0.0, -0.0, 1.0, -1.0, 1.5, -2.0]], dtype=torch.float64)
    g = weight((1, 6), seed=1)
    assert torch.allclose(gradient(w, g, "exact"), closed_form(w, g), rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_alpha_term_is_the_finite_difference_of_the_forward(shape: tuple[int, ...]) -> None:
    """sign is flat between its jumps, so what is left of the true derivative is the way through alpha."""
    w, g = weight(shape), weight(shape, seed=1)
    w = w + 0.01 * sign(w)
    numeric = torch.zeros_like(w)
    eps = 1e-6
    for i in range(w.numel()):
        step = torch.zeros_like(w).view(-1).index_fill_(0, torch.tensor(i), eps).view_as(w)
        numeric.view(-1)[i] = ((scaled_sign(w + step) - scaled_sign(w - step)) * g).sum() / (2 * eps)
    assert torch.allclose(gradient(w, g, "exact") - gradient(w, g, "ste"), numeric, atol=1e-8)


@pytest.mark.parametrize(("shape", "factor"), [((6, 5, 3, 3), 36), ((4, 7), 6), ((4, 3, 3, 3), 18), ((3, 1, 5, 5), 25)])
def test_binop_is_a_constant_times_exact(shape: tuple[int, ...], factor: float) -> None:
    w, g = weight(shape), weight(shape, seed=1)
    assert binop_factor(w[0].numel(), shape[1]) == factor
    assert torch.allclose(gradient(w, g, "binop"), factor * gradient(w, g, "exact"), rtol=1e-12, atol=1e-12)


def test_the_printed_form_is_right_only_for_filters_of_one_weight() -> None:
    w, g = weight((64, 1, 1, 1)), weight((64, 1, 1, 1), seed=1)
    assert torch.allclose(gradient(w, g, "paper"), gradient(w, g, "exact"), rtol=0, atol=1e-14)
    w, g = weight((256, 16, 3, 3), 0.3), weight((256, 16, 3, 3), seed=1)
    exact, paper = gradient(w, g, "exact"), gradient(w, g, "paper")
    assert (paper - exact).norm() > 0.1 * exact.norm()


@pytest.mark.parametrize(("spread", "expected"), [(0.05, 0.50), (0.1, 0.73), (1.0, 0.99)])
def test_how_far_the_printed_form_is_from_the_derivative(spread: float, expected: float) -> None:
    w, g = weight((512, 16, 3, 3), spread), weight((512, 16, 3, 3), seed=1)
    exact, paper, ste = (gradient(w, g, form).flatten() for form in ("exact", "paper", "ste"))
    assert torch.cosine_similarity(exact, paper, 0).item() == pytest.approx(expected, abs=0.01)
    assert torch.cosine_similarity(ste, paper, 0) > 0.9999


@pytest.mark.parametrize("shape", SHAPES)
def test_paper_and_ste_are_what_they_say(shape: tuple[int, ...]) -> None:
    w, g = weight(shape), weight(shape, seed=1)
    alpha = w.abs().flatten(1).mean(1).view(-1, *[1] * (w.dim() - 1))
    window = ((w >= -1) & (w <= 1)).double()
    assert torch.allclose(gradient(w, g, "ste"), alpha * window * g, rtol=0, atol=1e-14)
    assert torch.allclose(gradient(w, g, "paper"), g * (1 / w[0].numel() + alpha * window), rtol=0, atol=1e-14)


def test_no_scaled_sign_is_nearer_than_mean_and_sign() -> None:
    """Eq. 4 and 6: J(B, alpha) = |W - alpha B|^2 is least at B = sign(W), alpha = mean |W|; all B of a small filter tried."""
    w = weight((1, 6))
    best = (w - scaled_sign(w)).square().sum()
    codes = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 6)
    alphas = torch.linspace(0, 3, 301, dtype=torch.float64)
    errors = (w - alphas[:, None, None] * codes).square().sum(-1)
    assert errors.min() >= best - 1e-12
    assert errors.min() - best < 1e-3
    assert torch.allclose(best, w.square().sum() - w.abs().sum() ** 2 / 6)


def test_the_best_binary_filter_leaves_36_percent_of_a_gaussian() -> None:
    w = weight((1, 200_000))
    left = (w - scaled_sign(w)).square().sum() / w.square().sum()
    assert abs(left.item() - (1 - 2 / torch.pi)) < 5e-3


@pytest.mark.parametrize("form", ["exact", "binop", "paper", "ste"])
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e4])
def test_constant_weights_give_finite_gradients(form: str, value: float) -> None:
    w = torch.full((4, 3, 3, 3), value)
    assert gradient(w, torch.ones_like(w), form).isfinite().all()
