"""How large what the proofs name is, over what it depends on: the numbers behind the figures of quant/README.md.

A scan is one figure: lines of points (x, y), the same on every machine but for rounding. `python -m runner verify`
writes them all as scans.csv, and `python -m runner report scans.csv --format svg --out DIR` draws them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant.actgrad import ActGrad
from quant.functional import WeightGradient, scaled_sign
from quant.learned_step import lsq_quantize
from quant.lsq_init import least_squares, mean_absolute
from quant.proofs.tools import gradients, numbers
from quant.range_bn import Scale, expected_range, range_factor, range_norm
from quant.saved import saved_bytes_per_sample
from quant.surgery import quantize_

Line = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Scan:
    """A figure of the quantizer `quant`. `logarithmic` names axes, `level` is a line across."""

    quant: str
    figure: str
    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Line]
    logarithmic: str = ""
    level: float | None = None


def scans(names: Iterable[str]) -> Iterator[Scan]:
    """Those of these quantizers."""
    for name in names:
        for scan in SCANS.get(name, ()):
            yield scan()


# ---- XNOR-Net


def _normal(count: int) -> Tensor:
    """Evenly spaced quantiles of N(0, 1): a sample without chance."""
    quantiles: Tensor = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    return quantiles


def why_the_mean() -> Scan:
    """What t alpha sign(W) leaves of W, for alpha = mean|W| and weights of three distributions."""
    normal = _normal(20_000)
    even = 2 * torch.special.ndtr(normal) - 1  # of -1 to 1
    kinds = {"normal": normal, "uniform": even, "Laplace": -even.sign() * (1 - even.abs()).log()}

    def left(w: Tensor, times: float) -> float:
        return float((w - times * scaled_sign(w.view(1, -1)).view(-1)).square().sum() / w.square().sum())

    steps = [0.1 * step for step in range(21)]
    lines = {f"{kind} weights": [(step, left(w, step)) for step in steps] for kind, w in kinds.items()}
    title = "What a scaled sign misses of the weights, for every scale"
    return Scan("xnor", "scale", title, "scale, in units of mean|W|", "squared error / squared norm of W", lines)


def _weight_gradient(form: WeightGradient, behind: nn.Module, w: Tensor) -> Tensor:
    """dC/dW for C = mean square distance of behind(sign(x) * alpha sign(W)) from random targets."""
    w = w.clone().requires_grad_()
    y = behind(F.conv2d(numbers(8, w.shape[1], 12, 12, seed=4).sign(), scaled_sign(w, form)))
    (y - numbers(*y.shape, seed=5)).square().mean().backward()
    assert w.grad is not None
    return w.grad


def alpha_term() -> Scan:
    """Of dC/dW = (s/n) sum G s + alpha m G: the norm of the first term over that of the second, for layers of any width."""
    norm, dense = nn.BatchNorm2d(16, dtype=torch.float64), nn.Linear(1600, 10, bias=False, dtype=torch.float64)
    dense.weight = nn.Parameter(numbers(10, 1600, seed=6, spread=0.025))
    behind = {
        "nothing behind": nn.Identity(),
        "ReLU, float layer": nn.Sequential(nn.ReLU(), nn.Flatten(), dense),
        "ReLU, max pool, batch norm": nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), norm),
        "batch norm": norm,
    }

    def ratio(module: nn.Module, channels: int) -> float:
        w = numbers(16, channels, 3, 3, seed=1, spread=0.05)
        exact, ste = (_weight_gradient(form, module, w) for form in ("exact", "ste"))
        return float((exact - ste).norm() / ste.norm())

    widths = [1, 2, 4, 8, 16, 32, 64, 128]
    lines = {name: [(9 * c, ratio(module, c)) for c in widths] for name, module in behind.items()}
    title = "The gradient through alpha / the gradient through the signs"
    return Scan("xnor", "alpha-term", title, "weights in a filter", "ratio of the norms", lines, "xy", 1.0)


def printed_gradient() -> Scan:
    """The cosine between the gradient as the paper prints it, and with alpha held, and the derivative, for a random G."""

    def cosine(form: WeightGradient, spread: float) -> float:
        w = numbers(64, 16, 3, 3, seed=1, spread=spread)
        exact, other = (gradients(lambda v, f=f: scaled_sign(v, f), w)[1] for f in ("exact", form))
        return float((exact * other).sum() / (exact.norm() * other.norm()))

    spreads = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0]
    forms: dict[str, WeightGradient] = {"paper": "paper", "ste": "ste", "binop": "binop"}
    lines = {label: [(spread, cosine(form, spread)) for spread in spreads] for label, form in forms.items()}
    title = "Cosine with the exact gradient, n = 144, G independent of W"
    return Scan("xnor", "printed-gradient", title, "standard deviation of W", "cosine", lines, "x")


# ---- LSQ


def step_gradient() -> Scan:
    """R = (|ds| / s) / (|dw| / |w|) at the first step of 4-bit weights: root mean square over a G that knows nothing of w."""
    qn, qp = 8, 7

    def rate(count: int, scale: float) -> float:
        w = _normal(count).view(-1, 1)
        step = mean_absolute(w.view(1, -1), qp)
        apart = step.repeat(count).view(-1, 1)  # a step for each value: its gradient is the value's own term
        _, dw, ds = gradients_of_ones(lambda v, s: lsq_quantize(v, s, qn, qp, grad_scale=scale), w, apart)
        return float(ds.norm() / step / (dw.norm() / w.norm()))

    scales: dict[str, Callable[[int], float]] = {
        "none": lambda n: 1.0,
        "1/sqrt_n": lambda n: n**-0.5,
        "1/sqrt_n_qp": lambda n: (n * qp) ** -0.5,
    }
    counts = [10**2, 10**3, 10**4, 10**5, 10**6]
    lines = {f"grad_scale {name}": [(n, rate(n, scale(n))) for n in counts] for name, scale in scales.items()}
    title = "How fast a step changes beside its weights (4 bits)"
    return Scan("lsq", "step-gradient", title, "weights in a layer", "R = (|ds| / s) / (|dw| / |w|)", lines, "xy", 1.0)


def gradients_of_ones(function: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    """The value, and its gradients for G = 1."""
    copies = [leaf.clone().requires_grad_() for leaf in leaves]
    y = function(*copies)
    return [y.detach(), *torch.autograd.grad(y.sum(), copies)]


def lost_bit() -> Scan:
    """The least mean squared error on ReLU(N(0, 1)) with symmetric and with unsigned levels."""
    x = _normal(20_000).clamp_min(0).view(1, -1)

    def error(qn: int, qp: int) -> float:
        step = least_squares(x, qn, qp, offset=False)[0].view(1)
        return float((lsq_quantize(x, step, qn, qp) - x).square().mean())

    lines = {
        "symmetric (plain)": [(bits, error(2 ** (bits - 1) - 1, 2 ** (bits - 1) - 1)) for bits in range(2, 9)],
        "unsigned (v3, v1, plus)": [(bits, error(0, 2**bits - 1)) for bits in range(2, 9)],
    }
    title = "Activations behind a ReLU: symmetric levels lose a bit"
    return Scan("lsq", "lost-bit", title, "bits", "least mean squared error", lines, "y")


# ---- 8-bit training


def range_constants() -> Scan:
    """sigma_hat / sigma of n normal values: C(n) times the expected range."""
    sizes = [2**power for power in range(1, 18)]
    kinds: tuple[Scale, ...] = ("paper", "reference", "d2")
    lines = {f"scale {kind}": [(n, range_factor(n, kind) * expected_range(n)) for n in sizes] for kind in kinds}
    title = "What Range BN takes for the standard deviation"
    return Scan("8bit-rangebn", "constant", title, "values in a chunk", "sigma_hat / sigma", lines, "x", 1.0)


def other_distributions() -> Scan:
    """The same with 1/d2 for values that are not normal: the expected range is the integral of 1 - F^n - (1 - F)^n."""
    x = torch.linspace(-30, 30, 120_001, dtype=torch.float64)
    normal, laplace = torch.special.ndtr(x), torch.where(x < 0, x.exp() / 2, 1 - (-x).exp() / 2)
    behind_relu = (0.5 - 0.5 / math.pi) ** 0.5  # the standard deviation of max(0, x) for a normal x
    kinds = {
        "Laplace": (laplace, 2**0.5),
        "normal": (normal, 1.0),
        "normal behind a ReLU": (torch.where(x < 0, 0, normal), behind_relu),
        "uniform": ((x / 2 + 0.5).clamp(0, 1), 3**-0.5),
    }

    def ratio(distribution: Tensor, deviation: float, n: int) -> float:
        spread = torch.trapezoid(1 - distribution**n - (1 - distribution) ** n, x)
        return float(spread) * range_factor(n, "d2") / deviation

    sizes = [2**power for power in range(3, 18)]
    lines = {label: [(n, ratio(*kind, n)) for n in sizes] for label, kind in kinds.items()}
    title = "Range BN with d2 on other distributions"
    return Scan("8bit-rangebn", "distribution", title, "values in a chunk", "sigma_hat / sigma", lines, "x", 1.0)


def chunks() -> Scan:
    """How far the estimate from 8192 normal values scatters, over 500 channels: relative standard deviation."""
    x = numbers(64, 500, 16, 8, seed=4)

    def scatter(estimate: Tensor) -> float:
        return float(estimate.std() / estimate.mean())

    counts = [1, 2, 4, 8, 16, 32, 64]
    usual = scatter(x.transpose(0, 1).flatten(1).std(1))
    lines = {
        "mean range of the chunks": [(count, scatter(range_norm(x, chunks=count)[2])) for count in counts],
        "usual estimate": [(count, usual) for count in (counts[0], counts[-1])],
    }
    title = "Scatter of sigma_hat from 8192 values"
    return Scan("8bit-rangebn", "chunks", title, "chunks", "relative standard deviation", lines, "xy")


# ---- weight gradients from quantized activations


def _network() -> nn.Module:
    """Four convolutions and a classifier, weights as torch draws them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * 16, 10),
        )  # fmt: skip


def _kept_and_wrong(images: Tensor, labels: Tensor, **settings: Any) -> tuple[float, float]:
    """Bytes kept, as a share of those of float32; relative error of a weight gradient, the median over the layers."""
    model, floats = _network(), _network()
    quantize_(model, ActGrad(**settings))
    kept = [saved_bytes_per_sample(net, images, labels) for net in (model, floats)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for net in (model, floats):
            torch.autograd.backward(F.cross_entropy(net(images), labels))
    mine, theirs = ([p.grad for p in net.parameters() if p.grad is not None and p.dim() > 1] for net in (model, floats))
    return kept[0] / kept[1], median(float((a - b).norm() / b.norm()) for a, b in zip(mine, theirs, strict=True))


def compression() -> Scan:
    """What fewer bits save, and what they cost in every weight gradient."""
    images, labels = numbers(16, 3, 16, 16, seed=4).float(), torch.arange(16) % 10
    kinds: dict[str, dict[str, Any]] = {
        "stochastic": {},
        "nearest": {"rounding": "nearest"},
        "stochastic, group null": {"group": None},
    }
    lines = {
        label: [_kept_and_wrong(images, labels, bits=bits, **settings) for bits in (8, 4, 2, 1)]
        for label, settings in kinds.items()
    }
    title = "8, 4, 2 and 1 bits: bytes kept and error of the weight gradients"
    labels_of_axes = "bytes kept for backward / those of float", "relative error"
    return Scan("actgrad", "compression", title, *labels_of_axes, lines, "xy")


SCANS: dict[str, tuple[Callable[[], Scan], ...]] = {
    "xnor": (why_the_mean, alpha_term, printed_gradient),
    "lsq": (step_gradient, lost_bit),
    "8bit-rangebn": (range_constants, other_distributions, chunks),
    "actgrad": (compression,),
}
