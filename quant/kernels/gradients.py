"""Both gradients of a convolution of signs by table lookup, as functions of tensors.

One operand has one bit a value, so that nothing needs to be multiplied (`tables.py`): equal to the float products but for
rounding, which is of the same size (each sum runs over tables of four, one after the other).
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from quant.kernels.codes import codes_of
from quant.kernels.intrinsics import LANES
from quant.kernels.lookup import CODES, LOOKUP_JOB, STRIP_PIXELS, LookupJob, dw_entry, dx_entry
from quant.kernels.machine import compiled, run, threads_for
from quant.kernels.packing import is_channels_last, memory_format, pack_activations
from quant.kernels.tables import GROUP, MOST_BLOCKS, MOST_ROWS, TABLE

STRIP_BYTES = 512 * 1024  # of dx: tables that stay in the second-level cache


@functools.cache
def _entry(function: Callable[[Any], None]) -> int:
    return compiled(function, LOOKUP_JOB)


class Geometry(NamedTuple):
    """Shapes of a convolution: x (N, C, H, W), g (N, O, H', W')."""

    x: tuple[int, int, int, int]
    g: tuple[int, int, int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def job(self, g_last: bool, **more: int) -> tuple[bytes, int]:
        """The job but for its addresses; the fields that dx and dw fill in otherwise come in `more`."""
        images, filters, out_height, out_width = self.g
        pixels = out_height * out_width
        job = LookupJob(
            scratch_tickets=0, task_tickets=0, scratch=0, g=0, codes=0, factors=0, out=0, channels_last=0,
            g_image=4 * filters * pixels, g_filter=4 if g_last else 4 * pixels, g_pixel=4 * filters if g_last else 4,
            images=images, filters=filters, channels=self.x[1], height=self.x[2], width=self.x[3],
            out_height=out_height, out_width=out_width, kernel_height=self.kernel[0], kernel_width=self.kernel[1],
            stride_height=self.stride[0], stride_width=self.stride[1],
            padding_height=self.padding[0], padding_width=self.padding[1], **more,
        )  # fmt: skip
        return np.array(job, np.int64).tobytes(), more["tasks"]

    def order(self) -> Tensor:
        """Where each tap of the kernel comes among the codes: by its remainder modulo the stride, then descending."""
        orders = [_by_remainder(k, s) for k, s in zip(self.kernel, self.stride, strict=True)]
        place = torch.empty(self.kernel, dtype=torch.int32)
        for at, (ky, kx) in enumerate(itertools.product(*orders)):
            place[ky, kx] = at
        return place.flatten()


def _by_remainder(kernel: int, stride: int) -> list[int]:
    return sorted(range(kernel), key=lambda tap: (tap % stride, -tap))


@functools.lru_cache(4096)
def _plan_dx(shape: Geometry, g_last: bool) -> tuple[bytes, int, int, int, Tensor]:
    """The job, its tasks, the bytes of a thread's scratch, those of the codes, and the order of the taps."""
    (images, _, height, width), groups = shape.x, -(-shape.g[1] // GROUP)
    stride, kernel, padding = shape.stride[1], shape.kernel[1], shape.padding[1]
    left = max(-((padding - kernel + 1) // stride), 0)
    columns = left + max((width - 1 + padding) // stride + 1, shape.g[3])
    row = columns * groups * TABLE
    strip = min(max(STRIP_BYTES // row * shape.stride[0] - shape.kernel[0] + 1, shape.stride[0]), height)
    rows = (strip + shape.kernel[0] - 2) // shape.stride[0] + 2
    sums_at = rows * row
    scratch = sums_at + -(-width // LANES) * LANES * CODES
    strips = -(-height // strip)
    plan, tasks = shape.job(
        g_last, tasks=images * strips, scratch_size=scratch, sums_at=sums_at, left=left, columns=columns,
        strip=strip, strips=strips,
    )  # fmt: skip
    taps = shape.kernel[0] * shape.kernel[1]
    return plan, tasks, scratch, taps * groups * CODES, shape.order() * (groups * CODES)


@functools.lru_cache(4096)
def _plan_dw(shape: Geometry, g_last: bool) -> tuple[bytes, int, int, Tensor]:
    """The job, its tasks, the bytes of a thread's scratch, and where the codes of a pixel lie."""
    blocks, taps = -(-shape.x[1] // LANES), shape.kernel[0] * shape.kernel[1]
    strip = max(STRIP_PIXELS // shape.g[3], 1)
    sums_at = MOST_ROWS * STRIP_PIXELS * TABLE
    scratch = sums_at + (MOST_ROWS * taps + LANES) * blocks * 64
    plan, tasks = shape.job(
        g_last, tasks=-(-shape.g[1] // MOST_ROWS), scratch_size=scratch, sums_at=sums_at, left=0, columns=0,
        strip=strip, strips=0,
    )  # fmt: skip
    return plan, tasks, scratch, torch.arange(shape.x[2] * shape.x[3], dtype=torch.int32) * (blocks * 64)


def _launch(entry: Any, plan: bytes, tasks: int, scratch_size: int, tensors: tuple[Tensor, ...], last: bool) -> None:
    threads = threads_for(tasks)
    scratch = torch.empty(threads * scratch_size, dtype=torch.uint8)
    addresses = [tensor.data_ptr() for tensor in (scratch, *tensors)]
    run(_entry(entry), plan, (0, 0, *addresses, last), threads)


def _factors(given: Tensor | None, count: int) -> Tensor:
    """One for each member of every group, 0 for those that do not exist."""
    factors = torch.zeros(-(-count // GROUP) * GROUP)
    factors[:count] = 1 if given is None else given.reshape(-1)
    return factors


def _dense(g: Tensor) -> tuple[Tensor, bool]:
    last = is_channels_last(g) and not g.is_contiguous()  # a single pixel counts as contiguous
    return g if last else g.contiguous(), last


def input_gradient(
    g: Tensor, w: Tensor, factor: Tensor, size: torch.Size, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """dx of conv2d(x, sign(w) factor) from g (N, O, H', W'): float32 `size` = (N, C, H, W) in the memory format of g.

    `factor` has one number for each filter of w (O, C, KH, KW).
    """
    g, last = _dense(g)
    shape = Geometry(_four(size), _four(g.shape), (w.shape[2], w.shape[3]), stride, padding)
    plan, tasks, scratch, tile_step, order = _plan_dx(shape, last)
    tiles = -(-size[1] // (LANES * MOST_BLOCKS))
    codes = codes_of(pack_activations(w.contiguous()), size[1], order, tiles * tile_step, CODES, tile_step)
    dx = torch.empty(size, memory_format=memory_format(last))
    _launch(dx_entry, plan, tasks, scratch, (g, codes, _factors(factor, len(w)), dx), last)
    return dx


def weight_gradient(
    g: Tensor,
    signs: Tensor,
    size: torch.Size,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> Tensor:
    """dw of conv2d(sign(x), w) from g (N, O, H', W') and the packed signs of x (N, C, H, W) = `size`: (O, C, KH, KW)."""
    g, last = _dense(g)
    plan, tasks, scratch, places = _plan_dw(Geometry(_four(size), _four(g.shape), kernel, stride, padding), last)
    blocks, groups = -(-size[1] // LANES), -(-size[0] // GROUP)
    group_step = len(places) * blocks * 64
    codes = codes_of(signs, size[1], places, groups * group_step, group_step, CODES)
    dw = torch.empty(g.shape[1], size[1], *kernel)
    _launch(dw_entry, plan, tasks, scratch, (g, codes, _factors(None, size[0]), dw), False)
    return dw


def _four(size: torch.Size) -> tuple[int, int, int, int]:
    return size[0], size[1], size[2], size[3]
