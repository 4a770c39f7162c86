"""The packed convolution and linear layer as functions of tensors: plan a job, give it to the threads."""

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from quant.kernels.conv import ENTRIES, JOB, SHAPES, ConvJob
from quant.kernels.machine import Processor, compiled, repeatable, run, threads_for
from quant.kernels.packing import dense_bits, is_channels_last, memory_format, pack_activations
from quant.kernels.weights import PackedWeight

CACHED_WEIGHTS = 384 * 1024  # bytes of weights that pass over all images before the next ones
MOST_THREADS = 1 << 20
SMALL = 1 << 21  # bytes of weights that one thread reads sooner than a team starts
BAND_PIXELS = 128  # whose raw sums lie in the first-level cache until they are finished


@functools.cache
def _entry(path: Processor) -> int:
    return compiled(ENTRIES[path], JOB)


@functools.lru_cache(4096)
def _plan(
    path: Processor, shape: torch.Size, acts_last: bool, kernel: tuple[int, int], stride: tuple[int, int],
    padding: tuple[int, int], out_channels: int, threads: int,
) -> tuple[bytes, Tensor, tuple[int, int, int, int], int, int]:  # fmt: skip
    """The job but for its addresses, the columns' border classes, the output's shape, the bytes of scratch, the threads.

    No threads for an empty batch.
    """
    if min(stride) < 1:
        raise ValueError(f"stride: {stride}, accepted: 1 or more")
    images, words, height, width = shape
    out_height = (height + 2 * padding[0] - kernel[0]) // stride[0] + 1
    out_width = (width + 2 * padding[1] - kernel[1]) // stride[1] + 1
    out_shape = (images, out_channels, max(out_height, 0), max(out_width, 0))
    if not images * height * width:
        return b"", torch.empty(0, dtype=torch.int32), out_shape, 0, 0
    if min(out_height, out_width) < 1:
        raise ValueError(f"a kernel of {kernel} with padding {padding} does not fit on an image of {(height, width)}")
    tile = SHAPES[path]
    blocks = -(-out_channels // tile.lanes)
    block_size = kernel[0] * kernel[1] * words * tile.weight_word
    # A part of the weights stays in the second-level cache while all images pass by; every thread gets some parts.
    if images * out_height * out_width * blocks * block_size < SMALL:
        threads = 1
    wanted = 1 if threads == 1 else min(-(-2 * threads // images), -(-blocks // tile.blocks))
    parts = max(-(-blocks * block_size // CACHED_WEIGHTS), wanted)
    per_task = -(-blocks // (parts * tile.blocks)) * tile.blocks
    tasks = images * -(-blocks // per_task)
    threads = min(threads, tasks)
    band = max(BAND_PIXELS // out_width, 1) * out_width if out_width <= BAND_PIXELS else BAND_PIXELS
    sums_at = -(-height * (width + 2 * padding[1]) * words * tile.act_word // 64) * 64
    band_at = sums_at + tile.pixels * tile.blocks * tile.lanes * 4
    scratch_size = band_at + (band + 16) * tile.blocks * tile.lanes * 4
    columns, classes = _border_classes(width, out_width, kernel[1], stride[1], padding[1])
    job = ConvJob(
        scratch_tickets=0, task_tickets=0, scratch=0, acts=0, weights=0, base=0, scale=0, bias=0, columns=0, out=0,
        channels_last=0, tasks=tasks, scratch_size=scratch_size, sums_at=sums_at, band_at=band_at,
        act_image_words=words * height * width, act_channel_words=1 if acts_last else height * width,
        act_pixel_words=words if acts_last else 1, images=images, words=words, height=height, width=width,
        block_size=block_size, blocks=blocks, blocks_per_task=per_task,
        kernel_height=kernel[0], kernel_width=kernel[1], stride_height=stride[0], stride_width=stride[1],
        padding_height=padding[0], padding_width=padding[1], out_height=out_height, out_width=out_width, band=band,
        base_row_size=classes * blocks * tile.lanes * 4, out_channels=out_channels,
    )  # fmt: skip
    return (
        np.array(job, np.int64).tobytes(),
        columns * (4 * blocks * tile.lanes),
        out_shape,
        scratch_size,
        threads,
    )


def _border_classes(width: int, out_width: int, kernel: int, stride: int, padding: int) -> tuple[Tensor, int]:
    """Of each output column, which one of how many: how many columns of the kernel stick out left, and right."""
    left = padding - torch.arange(out_width, dtype=torch.int32) * stride
    first = left.clamp(0, kernel)
    last = torch.maximum((left + width).clamp(max=kernel), first)
    side = min(padding, kernel) + 1
    return first * side + kernel - last, side * side


def binary_conv2d(
    x: Tensor,
    weight: PackedWeight,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    channels_last: bool | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """conv2d(sign(x), sign(w)) * scale + bias with zero padding as the weight was packed for: float32 (N, O, H', W').

    The sum of signs is exact; scale and bias have one number for each output channel (ValueError otherwise) and are applied
    in this order.
    The output has the memory format of x, unless `channels_last` chooses one. A dense float32 `out` is written to where
    given: memory that is fresh from the system costs more time than a large batch takes to compute.

    Groups are 1: raises ValueError where x has not as many channels as the weight.
    """
    acts = pack_activations(x)
    if x.shape[1] != weight.in_channels:  # packed, 33 to 64 channels look alike
        raise ValueError(f"x has {x.shape[1]} channels; accepted: the {weight.in_channels} of the weight")
    return conv2d_of_packed(acts, weight, scale=scale, bias=bias, stride=stride, channels_last=channels_last, out=out)


def conv2d_of_packed(
    acts: Tensor,
    weight: PackedWeight,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    channels_last: bool | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The same for activations that `pack_activations` has packed."""
    entry, plan, now, threads, tensors = _job(acts, weight, scale, bias, stride, channels_last, out)
    if threads:
        run(entry, plan, now, threads)
    return tensors[-1]


def prepared(
    acts: Tensor,
    weight: PackedWeight,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
) -> tuple[Callable[[], None], Tensor]:
    """The same as a function, and the tensor that it writes whenever it is called: the kernel without its caller."""
    entry, plan, now, threads, tensors = _job(acts, weight, scale, bias, stride)
    job = repeatable(entry, plan, now, threads) if threads else lambda: None

    def once(keep: tuple[Tensor, ...] = tensors) -> None:
        job()

    return once, tensors[-1]


def _job(
    acts: Tensor,
    weight: PackedWeight,
    scale: Tensor | None,
    bias: Tensor | None,
    stride: int | tuple[int, int],
    channels_last: bool | None = None,
    out: Tensor | None = None,
) -> tuple[int, bytes, list[int], int, tuple[Tensor, ...]]:
    """What `machine.run` is to be given, and the tensors that have to stay until then; the last one is the output."""
    if acts.dtype != torch.int32 or acts.ndim != 4 or acts.shape[1] != -(-weight.in_channels // 32):
        raise ValueError(
            f"the weight takes {weight.in_channels} packed channels; given {acts.dtype} {tuple(acts.shape)}, "
            f"accepted torch.int32 (N, {-(-weight.in_channels // 32)}, H, W)"
        )
    acts, acts_last = dense_bits(acts)
    steps = (stride, stride) if isinstance(stride, int) else stride
    plan, columns, shape, scratch_size, threads = _plan(
        weight.processor, acts.shape, acts_last, weight.kernel_size, steps, weight.padding, weight.out_channels,
        threads_for(MOST_THREADS),
    )  # fmt: skip
    if out is None:
        last = acts_last if channels_last is None else channels_last
        out = torch.empty(shape, memory_format=memory_format(last))
    else:
        last = _format_of(out, shape)
    scratch = torch.empty(threads * scratch_size, dtype=torch.uint8)
    scales, biases = _per_channel("scale", scale, weight, weight.ones), _per_channel("bias", bias, weight, weight.zeros)
    tensors = (scratch, acts, weight.words, weight.base, scales, biases, columns, out)
    now = [0, 0, *[tensor.data_ptr() for tensor in tensors], int(last)]
    return _entry(weight.processor), plan, now, threads, tensors


def _format_of(out: Tensor, shape: tuple[int, int, int, int]) -> bool:
    """Whether the caller's output is channels_last; ValueError if it cannot hold the result."""
    last = is_channels_last(out)
    if out.shape != shape or out.dtype != torch.float32 or not (last or out.is_contiguous()):
        raise ValueError(f"out must be a dense float32 tensor {shape}, not {out.dtype} {tuple(out.shape)}")
    return last


def _per_channel(name: str, given: Tensor | None, weight: PackedWeight, default: Tensor) -> Tensor:
    """One float32 for each output channel, as many as the blocks have lanes; ValueError if another count is given."""
    if given is None:
        return default
    if given.numel() != weight.out_channels:
        raise ValueError(
            f"{name} has {given.numel()} numbers; accepted: one for each of {weight.out_channels} channels"
        )
    if given.dtype != torch.float32 or not given.is_contiguous():
        given = given.to(torch.float32).contiguous()
    missing = default.numel() - given.numel()
    return F.pad(given.reshape(-1), (0, missing)) if missing else given


def binary_linear(
    x: Tensor, weight: PackedWeight, *, scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """linear(sign(x), sign(w)) * scale + bias: float32 (..., C) -> (..., O). The rows are the pixels of one image.

    Raises ValueError for the weight of a convolution whose window holds several of these pixels.
    """
    if weight.kernel_size != (1, 1) or weight.padding != (0, 0):
        raise ValueError(
            f"the weight has a kernel of {weight.kernel_size} and padding {weight.padding}; accepted: (O, C), no padding"
        )
    image = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
    out = binary_conv2d(image, weight, scale=scale, bias=bias, channels_last=True)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.out_channels)
