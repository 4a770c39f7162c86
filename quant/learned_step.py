"""Quantization of one tensor with a step size that is learned (LSQ, arXiv 1902.08153), and an offset (LSQ+, arXiv 2004.09576).

    levels      u = (v - beta) / s      code = round(clip(u, -Qn, Qp))      v_q = s code + beta           LSQ eq. 1, 2
    step        dv_q/ds = code - u where -Qn < u < Qp, else code (-Qn below, Qp above)                    LSQ eq. 3
    input       dv_q/dv = 1 where -Qn < u < Qp, else 0                                                    LSQ eq. 5
    offset      dv_q/dbeta = 0 where -Qn < u < Qp, else 1                                                 LSQ+

`quant.lsq` builds layers of it, `quant.lsq_init` has the first steps.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from quant import lsq_init
from quant.lsq_product import StepSpec
from quant.matmul import Scaled
from quant.pack import WIDTHS, Layout, pack, unpack

Range = Literal["auto", "unsigned", "signed", "symmetric"]
StepSte = Literal["clipped", "passthrough"]
GradScale = Literal["none", "1/sqrt_n", "1/sqrt_n_qp"]
Init = Literal["lsq", "lsq+", "mse", "const"]
FirstStep = Literal["lsq", "three_sigma", "mse", "const"]
Param = Literal["raw", "softplus"]

SMALLEST_STEP = 1e-8


class _Lsq(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, v: Tensor, step: Tensor, offset: Tensor | None, qn: Tensor, qp: Tensor, scale: Tensor, masked: bool
    ) -> Tensor:
        ctx.save_for_backward(v, step, offset, qn, qp, scale)
        ctx.masked = masked
        return value_of(codes_of(v, step, offset, qn, qp), step, offset).to(v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        v, step, offset, qn, qp, scale = ctx.saved_tensors
        need_v, need_step, need_offset = ctx.needs_input_grad[:3]
        u = _in_steps(v, step, offset)
        inside = (u > -qn) & (u < qp)
        dv = dstep = doffset = None
        if need_v:
            dv = torch.where(inside, g, 0) if ctx.masked else g
        if need_step:
            code = u.round().clamp(-qn, qp)
            slope = torch.where(inside, code - u, code)
            dstep = ((slope * g).sum_to_size(step.shape) * scale).to(step.dtype)
        if need_offset:
            clipped = torch.where(inside, 0, g.to(u.dtype))
            doffset = (clipped.sum_to_size(offset.shape) * scale).to(offset.dtype)
        return dv, dstep, doffset, None, None, None, None


def lsq_quantize(
    v: Tensor,
    step: Tensor,
    qn: int | Tensor,
    qp: int | Tensor,
    *,
    offset: Tensor | None = None,
    grad_scale: float | Tensor = 1.0,
    passthrough: bool = False,
) -> Tensor:
    """v_q = step round(clip((v - offset) / step, -qn, qp)) + offset, with the gradients at the top of this file.

    step (and offset) broadcast against v: one element, or (O, 1, ...) for a step an output channel. `grad_scale` multiplies
    the gradients of these two only. `passthrough` takes the mask off dv_q/dv. Where u is -qn or qp exactly, v counts as clipped.
    Half and bfloat16 are rounded and summed in float32. Kept for backward: v, which the ReLU in front of it keeps anyway.

    >>> v = torch.tensor([-1.0, 0.3, 0.9, 2.0], requires_grad=True)
    >>> step = torch.tensor([0.5], requires_grad=True)
    >>> y = lsq_quantize(v, step, qn=0, qp=3)
    >>> y.sum().backward()
    >>> y.tolist(), v.grad.tolist(), round(step.grad.item(), 4)  # 0 + (1 - 0.6) + (2 - 1.8) + 3
    ([0.0, 0.5, 1.0, 1.5], [0.0, 1.0, 1.0, 0.0], 3.6)
    """
    qn, qp = torch.as_tensor(qn, device=v.device), torch.as_tensor(qp, device=v.device)
    scale = torch.as_tensor(grad_scale, device=v.device, dtype=torch.promote_types(step.dtype, torch.float32))
    return _Lsq.apply(v, step, offset, qn, qp, scale, not passthrough)  # type: ignore[no-any-return]


def codes_of(v: Tensor, step: Tensor, offset: Tensor | None, qn: Tensor, qp: Tensor) -> Tensor:
    """round(clip(u, -Qn, Qp)), whole numbers in float."""
    return _in_steps(v, step, offset).round_().clamp_(-qn, qp)


def value_of(codes: Tensor, step: Tensor, offset: Tensor | None) -> Tensor:
    """What codes stand for."""
    return codes * step if offset is None else codes * step + offset


def _in_steps(v: Tensor, step: Tensor, offset: Tensor | None) -> Tensor:
    """u, in float32 at least: a bfloat16 cannot tell 200.5 from 200."""
    wide = v.to(torch.promote_types(v.dtype, torch.float32))
    return (wide if offset is None else wide - offset) / step


@dataclass(frozen=True)
class StepCodes:
    """How a matrix product remembers a quantized input: its codes, packed (2 bits: 4 a byte, 3 and 4: 2, above: 1 a byte).

    `decode` gives bit for bit the input in float32 and float64, so that the weight gradient is that of the input itself.
    """

    layout: Layout
    width: int
    step: Tensor
    qn: Tensor
    offset: Tensor | None

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        codes = _in_steps(self.layout.flat(x), self.step, self.offset).round_().add_(self.qn)
        codes.clamp_(0, (1 << self.width) - 1)  # 255 steps may be 255.5 in bfloat16, and 256 would wrap to 0
        packed = pack(codes.to(torch.uint8), self.width)
        return (packed, self.step, self.qn) if self.offset is None else (packed, self.step, self.qn, self.offset)

    def decode(self, *saved: Tensor) -> Tensor:
        packed, step, qn, *offset = saved
        codes = unpack(packed, self.width, (self.layout.count,)).to(step.dtype) - qn
        return self.layout.restore(value_of(codes, step, offset[0] if offset else None))

    def numbers(self, *saved: Tensor) -> Scaled:
        """Codes and step, where there is no offset."""
        packed, step, qn = saved
        codes = unpack(packed, self.width, (self.layout.count,)).to(torch.bfloat16) - qn
        return Scaled(self.layout.restore(codes), step)


# ---- the parameters -----------------------------------------------------------------------------------------------------


def levels(kind: Range, bits: int) -> tuple[int, int]:
    """(Qn, Qp): codes go from -Qn to Qp. `auto` is unsigned until a negative value was seen.

    >>> [levels(kind, 3) for kind in ("unsigned", "signed", "symmetric")]
    [(0, 7), (4, 3), (3, 3)]
    """
    if kind in ("auto", "unsigned"):
        return 0, 2**bits - 1
    top = 2 ** (bits - 1) - 1
    return (top if kind == "symmetric" else top + 1), top


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Of one tensor; conf/quant/lsq.yaml explains the choices."""

    bits: int
    kind: Range
    offset: bool = False
    ste: StepSte = "clipped"
    grad_scale: GradScale = "1/sqrt_n_qp"
    init: FirstStep = "lsq"
    constant: float = 1.0
    param: Param = "raw"
    change: float | None = None
    """No update changes a step by more than this share of itself."""
    per_sample: bool = False
    """N of the gradient scale counts the values of one sample, not of the whole tensor."""


class StepQuantizer(nn.Module):
    """Steps (and offsets) of one tensor: parameters `step`, `offset`, buffers `qn`, `qp` (which say: signed or not), `before`
    (the steps that `bound_` left behind).

    A step that training drives to zero or below is held at 1e-8 (float16: 6.1e-5). The output is then next to nothing; the
    parameter still gets its gradient and may come back, and `dead` counts it.
    """

    qn: Tensor
    qp: Tensor
    before: Tensor

    def __init__(self, settings: StepSettings, shape: tuple[int, ...], like: Tensor) -> None:
        super().__init__()
        self.settings = settings
        self.step = nn.Parameter(like.new_ones(shape))
        self.offset = nn.Parameter(like.new_zeros(shape)) if settings.offset else None
        self.register_buffer("before", like.new_ones(shape))
        for name, number in zip(("qn", "qp"), levels(settings.kind, settings.bits), strict=True):
            self.register_buffer(name, torch.tensor(number, device=like.device))

    def forward(self, v: Tensor) -> Tensor:
        """v_q."""
        scale, passthrough = self._grad_scale(v), self.settings.ste == "passthrough"
        return lsq_quantize(
            v, self.size(), self.qn, self.qp, offset=self.offset, grad_scale=scale, passthrough=passthrough
        )

    def raw_size(self) -> Tensor:
        return F.softplus(self.step) if self.settings.param == "softplus" else self.step

    def size(self) -> Tensor:
        """The steps in use: above zero, whatever the parameter is, and never without a gradient."""
        raw, smallest = self.raw_size(), _smallest(self.step.dtype)
        return torch.where(raw > smallest, raw, raw - raw.detach() + smallest)

    def _grad_scale(self, v: Tensor) -> float | Tensor:
        samples = len(v) if self.settings.per_sample and v.dim() > 1 else 1
        count = max(v.numel() // max(samples, 1) // self.step.numel(), 1)
        match self.settings.grad_scale:
            case "1/sqrt_n_qp":
                return (self.qp.to(torch.promote_types(self.step.dtype, torch.float32)) * count).rsqrt()
            case "1/sqrt_n":
                return float(count**-0.5)
        return 1.0

    def learned(self, v: Tensor) -> StepSpec:
        """What `quant.lsq_product` has to know besides v and the step."""
        settings = self.settings
        return StepSpec(-self.qn, self.qp, self._grad_scale(v), settings.bits, settings.ste == "passthrough")

    def codec(self, v_q: Tensor) -> StepCodes:
        """How to remember a result of `forward`."""
        width = next(width for width in WIDTHS if width >= self.settings.bits)
        offset = None if self.offset is None else self.offset.detach()
        return StepCodes(Layout.of(v_q), width, self.size().detach(), self.qn, offset)

    @torch.no_grad()
    def codes(self, v: Tensor) -> Tensor:
        """The codes of v, -Qn .. Qp: int16, or int8 where all of them fit."""
        kind = torch.int16 if self.settings.kind in ("auto", "unsigned") else torch.int8
        return codes_of(v, self.size(), self.offset, self.qn, self.qp).to(kind)

    @torch.no_grad()
    def calibrate_(self, v: Tensor) -> None:
        """Set the range (signed or not), the steps and the offsets from v. Raises ValueError where v does not fit the settings.

        A tensor or channel of zeros (or of next to nothing) has no scale of its own: its step becomes 1 / Qp, so that its levels
        reach 1.
        """
        lowest = float(v.min()) if v.numel() else 0.0
        self._set_range_(lowest)
        wide = v.to(torch.promote_types(v.dtype, torch.float32)).reshape(self.step.numel(), -1)
        step, offset = self._first(wide) if v.numel() else (wide.new_zeros(len(wide)), wide.new_zeros(len(wide)))
        if not bool((step.to(self.step.dtype).isfinite() & offset.isfinite()).all()):
            raise ValueError(f"no step can be found: the first input is not finite, or too large for {v.dtype}")
        step = torch.where(step > _smallest(self.step.dtype), step, 1 / int(self.qp))
        self.step.copy_(self._parameter_of(step).view_as(self.step))
        self.before.copy_(self.size())
        if self.offset is not None:
            self.offset.copy_(offset.view_as(self.offset))

    def _parameter_of(self, size: Tensor) -> Tensor:
        return size + torch.log(-torch.expm1(-size)) if self.settings.param == "softplus" else size

    def has_fitting_levels(self) -> bool:
        """Whether what a file may bring fits: `qn` and `qp` this number of bits, `step` the steps that the file meant by it.

        0.05 of `param: raw` would be 0.72 of `softplus`; `before` tells.
        """
        kinds: tuple[Range, ...] = ("unsigned", "signed") if self.settings.kind == "auto" else (self.settings.kind,)
        fitting = (int(self.qn), int(self.qp)) in [levels(kind, self.settings.bits) for kind in kinds]
        return fitting and torch.allclose(self.size(), self.before, rtol=0.5)

    @torch.no_grad()
    def bound_(self) -> None:
        """After an update: take steps that have changed by more than a share `change` of themselves back to that."""
        if self.settings.change is not None:
            low, high = 1 - self.settings.change, 1 + self.settings.change
            size = self.raw_size()
            bounded = torch.minimum(torch.maximum(size, self.before * low), self.before * high)
            self.step.copy_(torch.where(size == bounded, self.step, self._parameter_of(bounded)))
        self.before.copy_(self.size())

    def _set_range_(self, lowest: float) -> None:
        kind = self.settings.kind
        if kind == "unsigned" and lowest < 0 and self.offset is None:
            raise ValueError(
                f"act_range: unsigned, but the first input reaches down to {lowest:.3g} and everything below 0 would be lost; "
                "use act_range: auto, signed or symmetric, or act_offset: true"
            )
        if kind == "auto" and lowest < 0 and self.offset is None:
            kind = "signed"
        qn, qp = levels(kind, self.settings.bits)
        self.qn.fill_(qn)
        self.qp.fill_(qp)

    def _first(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        settings, qn, qp = self.settings, int(self.qn), int(self.qp)
        none = rows.new_zeros(len(rows))
        match settings.init:
            case "lsq":
                return lsq_init.mean_absolute(rows, qp), none
            case "three_sigma":
                return lsq_init.three_sigma(rows, settings.bits), none
            case "const":
                return none + settings.constant, none
        return lsq_init.least_squares(rows, qn, qp, settings.offset)

    @torch.no_grad()
    def health(self, v: Tensor) -> dict[str, float]:
        """Mean `step_size` as the parameter has it, `dead_steps`: share of them that are zero or below, or so large that all they
        round becomes 0, `clip_ratio`: share of v more than half a step outside the levels; where these have no sign,
        `negative_ratio`: share of v that is lost below 0.
        """
        raw, u = self.raw_size(), _in_steps(v, self.size(), self.offset)
        figures = {
            "step_size": raw.mean().item(),
            "clip_ratio": ((u < -0.5 - self.qn) | (u > self.qp + 0.5)).float().mean().item(),
            "dead_steps": ((raw <= _smallest(raw.dtype)).flatten() | self._too_large(u)).float().mean().item(),
        }
        blind = self.offset is None and int(self.qn) == 0
        return figures | ({"negative_ratio": (v < 0).float().mean().item()} if blind else {})

    def _too_large(self, u: Tensor) -> Tensor:
        """Whether each step rounds everything to 0."""
        rows = u.abs().reshape(self.step.numel(), -1)
        return rows.amax(1) < 0.5 if rows.numel() else torch.zeros(len(rows), dtype=torch.bool, device=u.device)


def _smallest(dtype: torch.dtype) -> float:
    return max(SMALLEST_STEP, torch.finfo(dtype).tiny)
