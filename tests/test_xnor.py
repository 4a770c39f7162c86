"""Binary layers against plain autograd of their defining formula, naive loops, and the paper's claims about them."""

import copy
from typing import Any

import pytest
import torch
from test_functional import golden, weight
from torch import Tensor, nn
from torch.nn import functional as F

from quant.latent import standardised, window
from quant.xnor import BinaryConv2d, BinaryLinear, Xnor, window_mean

CONVS: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False},
    {"kernel_size": (3, 2), "padding": (2, 1), "dilation": 2, "groups": 2},
    {"kernel_size": 1, "groups": 6},
]


def conv(**kwargs: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(6, 12, dtype=torch.float64, **kwargs)


def with_affine(layer: nn.Module) -> Any:
    """Give the normalisation a scale and a shift that matter."""
    norm: Any = layer.norm
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.bias, -0.5, 0.5)
    return layer


def definition(x: Tensor, layer: Any, product: Any, channel: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """BN -> sign with the clipped identity as its derivative -> product with mean |W| sign(W); plain autograd throughout."""
    norm, w = layer.norm, layer.weight
    dims = [d for d in range(x.dim()) if d != 1]
    centred = x - x.mean(dims, keepdim=True)
    normalised = centred / (centred.square().mean(dims, keepdim=True) + 1e-4).sqrt()
    normalised = normalised * norm.weight.view(channel) + norm.bias.view(channel)

    def clipped_sign(v: Tensor) -> Tensor:
        c = v.clamp(-1, 1)
        return c + ((v >= 0) * 2.0 - 1 - c).detach()

    alpha = w.abs().flatten(1).mean(1)
    return product(clipped_sign(normalised), clipped_sign(w)) * alpha.view(channel), normalised


def compare(layer: Any, x: Tensor, expected: Any) -> None:
    """Same output and same gradients for the input and every parameter."""
    results = []
    for forward in (layer, expected):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        y = forward(leaf)
        y.backward(weight(tuple(y.shape), seed=3))
        results.append([y.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("input_scale", [False, True])
@pytest.mark.parametrize("kwargs", CONVS)
def test_conv_is_its_definition_forward_and_backward(kwargs: dict[str, Any], input_scale: bool) -> None:
    layer = with_affine(BinaryConv2d(conv(**kwargs), Xnor(input_scale=input_scale)))

    def expected(x: Tensor) -> Tensor:
        def product(a: Tensor, b: Tensor) -> Tensor:
            return F.conv2d(a, b, None, layer.stride, layer.padding, layer.dilation, layer.groups)

        y, normalised = definition(x, layer, product, (1, -1, 1, 1))
        y = y * naive_window_mean(normalised, layer) if input_scale else y
        return y if layer.bias is None else y + layer.bias.view(1, -1, 1, 1)

    compare(layer, weight((3, 6, 7, 7)), expected)


@pytest.mark.parametrize("input_scale", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_its_definition_forward_and_backward(bias: bool, input_scale: bool) -> None:
    torch.manual_seed(0)
    layer = with_affine(BinaryLinear(nn.Linear(10, 4, bias, dtype=torch.float64), Xnor(input_scale=input_scale)))

    def expected(x: Tensor) -> Tensor:
        y, normalised = definition(x, layer, lambda a, b: a @ b.T, (1, -1))
        y = y * normalised.abs().mean(1, keepdim=True) if input_scale else y
        return y if layer.bias is None else y + layer.bias

    compare(layer, weight((16, 10)), expected)


def test_linear_treats_every_row_alike_whatever_the_leading_dimensions() -> None:
    layer = BinaryLinear(nn.Linear(6, 3), Xnor(input_scale=True))
    x = torch.randn(4, 5, 6)
    assert torch.equal(layer(x), layer(x.view(20, 6)).view(4, 5, 3))


def naive_window_mean(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """K of eq. 11 as the paper words it: average |x| over channels, then average each window, zeros outside."""
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    per_group = []
    for part in x.abs().chunk(layer.groups, 1):
        a = F.pad(part.mean(1), (layer.padding[1], layer.padding[1], layer.padding[0], layer.padding[0]))
        rows = range(0, a.shape[1] - dh * (kh - 1), sh)
        columns = range(0, a.shape[2] - dw * (kw - 1), sw)
        cells = [a[:, r : r + dh * kh : dh, c : c + dw * kw : dw].mean((1, 2)) for r in rows for c in columns]
        per_group.append(torch.stack(cells, 1).view(-1, 1, len(rows), len(columns)))
    return torch.cat([k.expand(-1, layer.out_channels // layer.groups, -1, -1) for k in per_group], 1)


@pytest.mark.parametrize("kwargs", CONVS)
def test_input_scale_is_the_naive_box_filter(kwargs: dict[str, Any]) -> None:
    layer, x = conv(**kwargs), weight((2, 6, 7, 8))
    assert torch.allclose(window_mean(x, layer).expand(-1, 12, -1, -1), naive_window_mean(x, layer), rtol=0, atol=1e-14)


def test_input_scale_of_a_1x1_filter_matches_golden() -> None:
    data = golden("xnor_activation.npz")
    k = window_mean(data["x"], nn.Conv2d(5, 3, 1))
    assert torch.allclose(k, data["K_mean_abs_over_channels"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kwargs", CONVS)
def test_the_sum_is_a_whole_number_scaled_once(kwargs: dict[str, Any]) -> None:
    """What a packed kernel gives: popcounts, zeros at the border adding nothing, one product with alpha; equal to the bit."""
    layer = BinaryConv2d(conv(**{**kwargs, "bias": False}).float(), Xnor(input_norm="none"))
    x = weight((2, 6, 7, 7)).float()
    shape = (layer.stride, layer.padding, layer.dilation, layer.groups)
    counts = F.conv2d(torch.where(x >= 0, 1.0, -1.0), layer.weight_codes().float(), None, *shape).to(torch.int32)
    alpha = layer.weight.detach().abs().mean((1, 2, 3)).view(-1, 1, 1)
    assert torch.equal(layer(x), counts * alpha)


# ---- the paper's claims, and ours in quant/README.md


@pytest.mark.parametrize("normalised", [True, False])
def test_the_alpha_term_vanishes_where_a_batch_norm_follows(normalised: bool) -> None:
    """C does not change with alpha then, so sum_j G_j s_j = dC/dalpha = 0."""
    gradients = {}
    for form in ("exact", "ste"):
        layer = BinaryConv2d(conv(kernel_size=3, bias=False), Xnor(gradient=form))
        behind = nn.BatchNorm2d(12, dtype=torch.float64) if normalised else nn.Identity()
        (behind(layer(weight((8, 6, 7, 7)))) - weight((8, 12, 5, 5), seed=1)).square().mean().backward()
        gradients[form] = layer.weight.grad
    ratio = (gradients["exact"] - gradients["ste"]).norm() / gradients["ste"].norm()
    assert ratio < 1e-2 if normalised else ratio > 0.1


def test_centring_in_the_graph_takes_the_mean_off_the_gradient() -> None:
    old = conv(kernel_size=3)
    centred = nn.Parameter((old.weight - old.weight.mean(1, keepdim=True)).detach())
    x = weight((2, 6, 7, 7))
    inside = BinaryConv2d(old, Xnor(centre="graph"))
    plain = BinaryConv2d(conv(kernel_size=3), Xnor(centre="none"))
    plain.weight = centred
    for layer in (inside, plain):
        layer(x).backward(weight((2, 12, 5, 5), seed=1))
    g = centred.grad
    assert torch.allclose(inside.weight.grad, g - g.mean(1, keepdim=True), rtol=0, atol=1e-12)
    assert torch.equal(inside.weight_codes(), plain.weight_codes())


def test_for_plain_descent_the_factor_of_binop_is_the_centring() -> None:
    """P(V - eta (1 - 1/c) g) = V - eta (1 - 1/c) P g for a centred V: the projection makes up for the missing part of P."""
    w, g, c, eta = weight((4, 6, 3, 3)), weight((4, 6, 3, 3), seed=1), 6, 0.1

    def project(v: Tensor) -> Tensor:
        return v - v.mean(1, keepdim=True)

    v = project(w)
    assert torch.allclose(project(v - eta * (1 - 1 / c) * g), v - eta * (1 - 1 / c) * project(g), rtol=0, atol=1e-14)


# ---- projections


@pytest.mark.parametrize("centre", ["none", "project", "graph"])
@pytest.mark.parametrize("clamp", [False, True])
def test_projection_does_what_it_says_and_forward_does_nothing(centre: str, clamp: bool) -> None:
    layer = BinaryConv2d(conv(kernel_size=3), Xnor(centre=centre, clamp=clamp))
    with torch.no_grad():
        layer.weight.mul_(10).add_(0.5)
    before = layer.weight.detach().clone()
    layer(weight((2, 6, 5, 5))).sum().backward()
    assert torch.equal(layer.weight, before)
    layer.project_()
    expected = before - before.mean(1, keepdim=True) if centre == "project" else before
    assert torch.equal(layer.weight, expected.clamp(-1, 1) if clamp else expected)


def test_projection_matches_golden() -> None:
    data = golden("xnor_weight.npz")
    old = nn.Conv2d(5, 6, 3, dtype=torch.float64)
    old.weight = nn.Parameter(data["weight"])
    layer = BinaryConv2d(old, Xnor())
    layer.project_()
    assert torch.allclose(layer.weight, data["weight_centred_clamped"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("centre", ["project", "graph"])
def test_a_layer_with_one_channel_a_group_is_not_centred(centre: str) -> None:
    layer = BinaryConv2d(conv(kernel_size=3, groups=6), Xnor(centre=centre, gradient="binop"))
    before = layer.weight.detach().clone()
    layer.project_()
    assert torch.equal(layer.weight, before)
    layer(weight((2, 6, 5, 5))).square().sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    assert set(layer.weight_codes().unique().tolist()) == {-1, 1}


# ---- latent weights


LATENT: list[dict[str, Any]] = [
    {"standardise": True},
    {"tau": 0.85},
    {"standardise": True, "tau": 0.99, "gradient": "ste"},
]


def test_standardised_filters_have_mean_0_and_deviation_1_and_keep_no_gradient_along_either() -> None:
    w = (weight((4, 3, 3, 3)) * 0.02 + 0.3).requires_grad_()
    v = standardised(w)
    assert torch.allclose(v.flatten(1).mean(1), torch.zeros(4, dtype=v.dtype), atol=1e-9)
    assert torch.allclose(v.flatten(1).std(1, correction=0), torch.ones(4, dtype=v.dtype), atol=1e-6)
    v.backward(weight((4, 3, 3, 3), seed=1))
    assert w.grad is not None
    assert w.grad.flatten(1).sum(1).abs().max() < 1e-10
    assert (w.grad * v).flatten(1).sum(1).abs().max() < 1e-4 * w.grad.norm()


@pytest.mark.parametrize("tau", [0.5, 0.85, 0.99])
def test_the_window_is_the_quantile_of_the_law_of_laplace(tau: float) -> None:
    law = torch.distributions.Laplace(0.0, 2.0)
    torch.manual_seed(0)
    v = law.sample((200_000,))
    bound = window(v, torch.tensor(tau))
    assert (v <= bound).float().mean().item() == pytest.approx(tau, abs=5e-3)


def test_the_window_moves_the_gradient_and_no_value() -> None:
    x, g = weight((2, 6, 7, 7)), weight((2, 12, 5, 5), seed=1)
    layers = [BinaryConv2d(conv(kernel_size=3), Xnor(standardise=True, tau=tau, gradient="ste")) for tau in (0.6, 0.99)]
    outputs = [layer(x) for layer in layers]
    assert torch.equal(*outputs)
    for y in outputs:
        y.backward(g)
    narrow, wide = (layer.weight.grad for layer in layers)
    assert narrow.norm() < wide.norm()
    layers[0].tau.fill_(0.99)
    layers[0].weight.grad = None
    layers[0](x).backward(g)
    assert torch.equal(layers[0].weight.grad, wide)
    assert "tau" not in layers[0].state_dict()


@pytest.mark.parametrize("settings", LATENT)
@pytest.mark.parametrize("old", [nn.Conv2d(32, 8, 3, padding=1), nn.Linear(64, 8)])
def test_packed_and_float_kernels_agree_to_the_bit_for_latent_weights(settings: dict[str, Any], old: nn.Module) -> None:
    x = torch.randn(4, 32, 6, 6) if isinstance(old, nn.Conv2d) else torch.randn(16, 64)
    results = []
    for kernel in ("packed", "float"):
        layer: Any = Xnor(**settings, kernel=kernel).layer(copy.deepcopy(old))
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.square().sum().backward()
        results.append((y, leaf.grad, layer.weight.grad))
    for packed, floats in zip(*results, strict=True):
        assert torch.equal(packed, floats)


def test_activations_only_is_a_float_layer_behind_signs() -> None:
    layer = BinaryConv2d(conv(kernel_size=3, padding=1), Xnor(binary_weights=False, input_norm="none"))
    x = weight((2, 6, 5, 5))
    assert torch.allclose(
        layer(x), F.conv2d(torch.where(x >= 0, 1.0, -1.0).double(), layer.weight, layer.bias, padding=1)
    )
    assert (layer.precision.weight, layer.precision.act) == (32, 1)
    assert layer.weight_codes() is None
    assert not layer.backward_in_bf16_()
    assert "weights are float" in layer.remark


def test_the_second_stage_takes_every_tensor_of_the_first() -> None:
    first, second = (BinaryConv2d(conv(kernel_size=3), Xnor(standardise=True, binary_weights=b)) for b in (False, True))
    assert first.state_dict().keys() == second.state_dict().keys()
    assert torch.equal(first._latent_weight(), second._latent_weight())


def test_nothing_binary_is_refused() -> None:
    with pytest.raises(ValueError, match="accepted: binary_weights or binary_activations"):
        Xnor(binary_weights=False, binary_activations=False).layer(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match="weights are float"):
        Xnor(binary_weights=False, kernel="packed").layer(nn.Conv2d(3, 4, 3))


# ---- what a layer is made of


def test_weights_only_is_a_plain_convolution_with_a_binary_filter() -> None:
    layer = BinaryConv2d(conv(kernel_size=3, padding=1), Xnor(binary_activations=False))
    x = weight((2, 6, 5, 5))
    alpha = layer.weight.abs().mean((1, 2, 3), keepdim=True)
    expected = F.conv2d(x, alpha * torch.where(layer.weight >= 0, 1.0, -1.0), layer.bias, padding=1)
    assert layer.norm is None
    assert (layer.precision.weight, layer.precision.act) == (1, 32)
    assert torch.allclose(layer(x), expected, rtol=0, atol=1e-12)
    assert "clip_ratio" not in layer.health(x)


@pytest.mark.parametrize("old", [nn.Conv2d(4, 2, 3, bias=False), nn.Linear(4, 2).half()])
def test_a_layer_takes_over_the_parameters_and_draws_no_random_number(old: nn.Module) -> None:
    state = torch.get_rng_state()
    new: Any = Xnor().layer(old)
    assert new.weight is old.weight
    assert new.bias is old.bias
    assert new.norm.weight.dtype == old.weight.dtype
    assert torch.equal(torch.get_rng_state(), state)
    missing, unexpected = new.load_state_dict(old.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("norm.") for name in missing)


@pytest.mark.parametrize("padding", [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}])
def test_a_padding_that_is_not_zeros_is_refused(padding: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="padding"):
        Xnor().layer(nn.Conv2d(4, 4, 3, **padding))


def test_other_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="Conv2d and Linear"):
        Xnor().layer(nn.BatchNorm2d(3))


def test_sharpness_is_a_buffer_that_a_schedule_drives_and_no_checkpoint_holds() -> None:
    layer = BinaryLinear(nn.Linear(6, 3), Xnor(ste="ede", sharpness=0.5))
    assert "sharpness" not in layer.state_dict()
    x = torch.randn(8, 6)
    gradients = []
    for sharpness in (0.5, 5.0):
        layer.sharpness.fill_(sharpness)
        leaf = x.clone().requires_grad_()
        layer(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    assert not torch.allclose(*gradients)
    assert BinaryLinear(nn.Linear(6, 3), Xnor()).sharpness is None


def test_health_counts_what_the_window_cuts_off_and_leaves_no_trace() -> None:
    layer = BinaryConv2d(nn.Conv2d(3, 4, 3), Xnor())
    layer.norm.running_var.fill_(4.0)
    x = torch.full((2, 3, 5, 5), 1.9)
    x[:, :, 0] = -2.5
    before = layer.norm.running_mean.clone()
    figures = layer.health(x)
    assert figures["clip_ratio"] == pytest.approx(0.2)
    assert figures["step_size"] == pytest.approx(layer.weight.abs().mean().item())
    assert torch.equal(layer.norm.running_mean, before)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"input_scale": True, "centre": "graph"},
        {"ste": "reste"},
        {"standardise": True, "tau": 0.9},
        {"binary_weights": False},
    ],
)
def test_compiles_to_one_graph(settings: dict[str, Any]) -> None:
    quantizer = Xnor(**settings)
    model = nn.Sequential(quantizer.layer(nn.Conv2d(4, 8, 3)), nn.Flatten(), quantizer.layer(nn.Linear(32, 2)))
    x = torch.randn(16, 4, 4, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for forward in (model, compiled):
        model.zero_grad()
        y = forward(x)
        y.square().sum().backward()
        gradients.append((y.detach(), model[0].weight.grad.clone()))
    for eager, graph in zip(*gradients, strict=True):
        assert torch.allclose(eager, graph, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_runs_in_half_and_under_autocast(dtype: torch.dtype) -> None:
    x = torch.randn(4, 6, 5, 5)
    low = Xnor(input_scale=True).layer(nn.Conv2d(6, 4, 3).to(dtype))
    mixed = Xnor(input_scale=True).layer(nn.Conv2d(6, 4, 3))
    y = low(x.to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        z = mixed(x)
    for layer, out in ((low, y), (mixed, z)):
        assert out.dtype == dtype or layer is mixed
        out.float().sum().backward()
        assert layer.weight.grad.isfinite().all()


def test_what_is_kept_for_backward_is_two_bits_a_value_beside_the_normalisation() -> None:
    layer = BinaryConv2d(nn.Conv2d(16, 16, 3, padding=1, bias=False), Xnor(input_norm="none", kernel="float"))
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    x = torch.randn(8, 16, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    weights = 2 * layer.weight.numel() * 4  # W and alpha sign(W)
    assert sum(kept.values()) == 2 * x.numel() // 8 + weights
