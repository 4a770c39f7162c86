"""Range batch normalisation: the standard deviation estimated from minimum and maximum (Banner et al., arXiv 1805.11046).

    sigma_hat = mean over chunks k of C(n_k) (max_k - min_k)          y = gamma (x - mu) / (sigma_hat + eps) + beta     eq. 3
    dx = (gamma/s) (g - mean g) - (gamma sum(g (x - mu)) / s^2) sum_k C(n_k)/K (e_argmax_k - e_argmin_k),     s = sigma_hat + eps
    dgamma = sum(g (x - mu)) / s                                      dbeta = sum g

per channel. A range needs comparisons only and no squares, so low-precision hardware can compute it. The gradient is what
autograd makes of the definition; of equal maxima (minima) of a chunk the first sample's first pixel receives it.

A chunk is n_k values of a channel: whole samples, as many chunks as there are samples but at most `chunks`. Where these do not
divide the batch, chunks differ by one sample, and C is that of the real length. Small maps and batches get fewer chunks, of at
least 8 values each: the range of two values is often nearly 0, and gradients are divided by it (MobileNetV2's 1x1 maps at
batch 4: gradients of 1e37 in the second step, against 1e2 with one chunk of four).
"""

import math
from functools import lru_cache
from operator import index
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quant.base import Precision, QuantizedLayer
from quant.matmul import Codec, GradientMap, Whole
from quant.uniform import GradientRounding, GridCodes, RunningRange, fake_quantize

Scale = Literal["d2", "reference", "paper"]
LEAST = 8  # values in a chunk, where the batch has as many: about where a sample's ranges tell most of sigma
REFERENCE = 0.5 * 0.35 * (1 + math.sqrt(math.pi * math.log(4)))  # 0.5402, of convNet.pytorch's RangeBN


def expected_range(n: int) -> float:
    """d2(n): the expected range of n standard normal numbers, the integral of 1 - Phi^n - (1 - Phi)^n, good to 1e-12.

    >>> [round(expected_range(n), 3) for n in (2, 16, 128, 8192)]
    [1.128, 3.532, 5.189, 7.605]
    """
    return _expected_range(n)


# What torch.compiler.assume_constant_result does, which would import the compiler here: seconds of every start.
expected_range._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=1024)
def _expected_range(n: int) -> float:
    width = 0.05  # the trapezoid rule converges geometrically for an analytic integrand that vanishes at both ends
    total = 0.5 * (1 - 0.5 ** (n - 1))
    for i in range(1, 260):
        tail = 0.5 * math.erfc(i * width / math.sqrt(2))
        total += -math.expm1(n * math.log1p(-tail)) - tail**n
    return 2 * width * total


def range_factor(n: int, scale: Scale) -> float:
    """C(n), which turns the range of n values into a standard deviation.

    paper: 1/sqrt(2 ln n), which bounds the maximum and takes it for the range: sigma_hat is 1.5 to 1.85 sigma.
    reference: 0.5402/sqrt(2 ln n), as convNet.pytorch computes it: 0.81 to 1.0 sigma.
    Both ratios are those of 16 to a million normal numbers; of fewer they are lower.
    d2: 1/d2(n), unbiased for normal numbers.
    """
    if scale == "d2":
        mean_range: float = expected_range(n)
        return 1 / mean_range
    return (REFERENCE if scale == "reference" else 1.0) / math.sqrt(2 * math.log(n))


class _Chunks:
    """How a batch of B samples with `pixels` values a channel falls into chunks."""

    def __init__(self, batch: int, pixels: int, chunks: int) -> None:
        self.count = max(1, min(chunks, batch // -(-LEAST // pixels)))
        self.short, self.long_ones = divmod(batch, self.count)  # samples of a short chunk; chunks with one sample more
        self.pixels = pixels

    def samples(self, device: torch.device) -> Tensor:
        """(K, S) numbers of the samples of each chunk; a short one names its last sample twice, which moves no extreme."""
        k = torch.arange(self.count, device=device).unsqueeze(1)
        length = self.short + (k < self.long_ones)
        longest = self.short + (self.long_ones > 0)
        return k * self.short + k.clamp_max(self.long_ones) + torch.arange(longest, device=device).clamp_max(length - 1)

    def weigh(self, ranges: Tensor, scale: Scale) -> Tensor:
        """(K, C) ranges -> (K, C) terms C(n_k) range_k / K, whose sum is sigma_hat."""
        short = range_factor(self.short * self.pixels, scale)
        long = range_factor((self.short + 1) * self.pixels, scale)
        parts = [ranges[: self.long_ones] * long, ranges[self.long_ones :] * short]
        return torch.cat(parts) / self.count


def _extremes(x: Tensor, samples: Tensor, sign: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The maximum (sign 1) or minimum (-1) of every chunk and channel, (K, C), and where it is: its index into x.

    The whole tensor is read once, by a reduction without indices, which is many times faster; the place is then looked for
    only in the one sample of each chunk and channel that holds the extreme.
    """
    best = x.amax((2, 3)) if sign > 0 else x.amin((2, 3))
    of_chunk = best[samples]
    values, which = of_chunk.max(1) if sign > 0 else of_chunk.min(1)
    sample = samples.gather(1, which)
    channel = torch.arange(x.shape[1], device=x.device).expand_as(sample)
    planes = x[sample, channel].flatten(2)
    place = planes.argmax(2) if sign > 0 else planes.argmin(2)
    return values, (sample, channel, place // x.shape[3], place % x.shape[3])


class _RangeNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        eps: float,
        chunks: int,
        scale: Scale,
        codec: Codec,
        grad_map: GradientMap | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        batch, pixels = index(x.shape[0]), index(x.shape[2]) * index(x.shape[3])  # C(n) is compiled as a constant
        plan = _Chunks(batch, pixels, chunks)
        samples = plan.samples(x.device)
        high, at_high = _extremes(x, samples, 1)
        low, at_low = _extremes(x, samples, -1)
        sigma = plan.weigh(high.to(wide) - low.to(wide), scale).sum(0)
        mean = x.mean((0, 2, 3), dtype=wide)
        ctx.save_for_backward(mean, sigma + eps, gamma, *at_high, *at_low, *codec.encode(x))
        ctx.plan, ctx.scale, ctx.codec, ctx.grad_map, ctx.dtype = plan, scale, codec, grad_map, x.dtype
        ctx.mark_non_differentiable(mean, sigma)
        return normalise(x, mean, sigma + eps, gamma, beta), mean, sigma

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Any, ...]:
        mean, s, gamma, *saved = ctx.saved_tensors
        at_high, at_low = tuple(saved[:4]), tuple(saved[4:8])
        g = (ctx.grad_map(g) if ctx.grad_map else g).to(mean.dtype)
        x = ctx.codec.decode(*saved[8:]).to(mean.dtype)
        sum_g, dot = g.sum((0, 2, 3)), (x - _channels(mean)).mul_(g).sum((0, 2, 3))
        gain = (1 if gamma is None else gamma.to(mean.dtype)) / s
        dx = (g - _channels(sum_g * g.shape[1] / g.numel())).mul_(_channels(gain))
        d_sigma = -gain * dot / s
        d_range = ctx.plan.weigh(d_sigma.expand(ctx.plan.count, -1), ctx.scale)
        dx.index_put_(at_high, d_range, accumulate=True)
        dx.index_put_(at_low, -d_range, accumulate=True)
        d_gamma = None if gamma is None else dot / s
        return dx.to(ctx.dtype), d_gamma, sum_g if ctx.needs_input_grad[2] else None, *[None] * 5


def _channels(v: Tensor) -> Tensor:
    return v.view(-1, 1, 1)


def normalise(x: Tensor, mean: Tensor, s: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    """gamma (x - mean) / s + beta for x (B, C, H, W), in the dtype of x; as x gain + shift, in float32 at least."""
    gain = 1 / s if gamma is None else gamma / s
    shift = -mean * gain if beta is None else beta - mean * gain
    return torch.addcmul(_channels(shift), x.to(s.dtype), _channels(gain)).to(x.dtype)


def range_norm(
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    eps: float = 0.0,
    chunks: int = 16,
    scale: Scale = "d2",
    codec: Codec | None = None,
    grad_map: GradientMap | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, C, H, W) -> y, mu (C), sigma_hat (C). `codec` says what is kept of x, `grad_map` quantizes the incoming gradient.

    Raises ValueError where a channel has a single value: it has no range.

    >>> x = torch.tensor([0.0, 1.0, 4.0]).view(3, 1, 1, 1).requires_grad_()
    >>> y, mu, sigma = range_norm(x, chunks=1, scale="paper")
    >>> round(sigma.item() * math.sqrt(2 * math.log(3)), 4)
    4.0
    >>> (y[2] - y[0]).backward(torch.ones(1, 1, 1))          # the range of y is 1/C whatever x is: nothing to gain
    >>> x.grad.abs().max().item() < 1e-6
    True
    """
    if x.numel() <= x.shape[1]:
        raise ValueError(f"a range needs more than one value per channel in training, got an input of {tuple(x.shape)}")
    y, mean, sigma = _RangeNorm.apply(x, gamma, beta, eps, chunks, scale, codec or Whole(), grad_map)
    return y, mean, sigma


class _RangeBatchNorm(QuantizedLayer, nn.modules.batchnorm._BatchNorm):
    """What the layers for vectors and images share; parameters and running figures keep BatchNorm's names and meaning.

    `running_var` is the running mean of sigma_hat^2, with torch's momentum. With `scale="d2"` it is a variance like
    BatchNorm's, so float checkpoints load and evaluate; the other scales have their own, and gamma makes up for it.
    `eps` is added to sigma_hat, so it is the square root of BatchNorm's: a dead channel is amplified 316-fold by both.
    """

    def _take_over(self, old: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
        self.weight, self.bias = old.weight, old.bias
        self.running_mean, self.running_var = old.running_mean, old.running_var
        self.num_batches_tracked = old.num_batches_tracked
        self.eps = math.sqrt(old.eps)
        self.chunks: int = 16
        self.scale: Scale = "d2"
        self.input_range: RunningRange | None = None
        self.grad_map: GradientRounding | None = None

    def quantize(self, input_range: RunningRange, grad_map: GradientRounding) -> None:
        """Let the layer read quantized inputs, and pass on the gradient of a quantized one."""
        self.input_range, self.grad_map = input_range, grad_map
        self.precision = Precision(act=input_range.bits, grad=grad_map.bits)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return super().forward(x)  # as torch has it: nothing comes out, and nothing is remembered
        image = x.reshape(*x.shape, *[1] * (4 - x.dim()))
        codec: Codec = Whole()
        if self.input_range is not None:
            grid = self.input_range(image)
            image, codec = fake_quantize(image, grid, self.input_range.bits), GridCodes(grid, self.input_range.bits)
        if self.running_mean is not None and self.running_var is not None and not self.training:
            wide = torch.promote_types(x.dtype, torch.float32)
            s = self.running_var.to(wide).sqrt() + self.eps
            return normalise(image, self.running_mean.to(wide), s, self.weight, self.bias).view_as(x)
        y, mean, sigma = range_norm(
            image,
            self.weight,
            self.bias,
            eps=self.eps,
            chunks=self.chunks,
            scale=self.scale,
            codec=codec,
            grad_map=self.grad_map,
        )
        self._remember(mean, sigma)
        return y.view_as(x)

    def _remember(self, mean: Tensor, sigma: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            kind = self.running_mean.dtype
            fixed = torch.full((), self.momentum or 0.0, dtype=kind, device=mean.device)
            share = fixed if self.momentum is not None else 1 / self.num_batches_tracked.to(kind)
            self.running_mean.lerp_(mean.to(kind), share)
            self.running_var.lerp_(sigma.square().to(kind), share)

    def calibrate_(self, x: Tensor) -> None:
        if self.input_range is not None:
            self.input_range.calibrate_(x)

    @torch.no_grad()
    def health(self, x: Tensor) -> dict[str, float]:
        return {} if self.input_range is None else self.input_range.health(x)


class RangeBatchNorm1d(_RangeBatchNorm, nn.BatchNorm1d):
    """Range BN of x (B, C) or (B, C, L), built from a batch normalisation."""

    def __init__(self, old: nn.BatchNorm1d) -> None:
        super().__init__(old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats)
        self._take_over(old)


class RangeBatchNorm2d(_RangeBatchNorm, nn.BatchNorm2d):
    """Range BN of x (B, C, H, W), built from a batch normalisation."""

    def __init__(self, old: nn.BatchNorm2d) -> None:
        super().__init__(old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats)
        self._take_over(old)
