"""Convolution of codes: whole numbers, summed exactly; in int8 where the processor can, else in floats. The same bits either way.

    y = (codes_x - zero) * codes_w scale           codes_x bytes, codes_w -128 .. 127; zero padding is zero

The sum of products is a whole number. Below 2^24 float32 holds it exactly in whatever order it is summed, so that one rounding
is left, that of the multiplication by `scale`, and it is the same in both kernels. oneDNN's int8 convolution is four to five
times as fast as its float32 one on processors with VNNI.
"""

from functools import cache
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from quant.matmul import Conv

EXACT = 1 << 24  # whole numbers up to here are float32 numbers


def fits(weight: Tensor, most_x: int, most_w: int) -> bool:
    """Whether no sum of products can leave the whole numbers of float32."""
    return weight[0].numel() * most_x * most_w < EXACT


def conv2d(codes: Tensor, zero: int, weight: Tensor, scale: Tensor, shape: Conv, kernel: str = "auto") -> Tensor:
    """codes uint8 (B, C, H, W), weight int8 (O, C/groups, h, w), scale of one element -> (B, O, H', W')."""
    if kernel == "float" or why_not() is not None:
        x = codes.float().sub_(zero) if zero else codes.float()
        return shape.forward(x, weight.float(), None).mul_(scale)
    last = codes.is_contiguous(memory_format=torch.channels_last) and not codes.is_contiguous()
    y = _conv2d(codes, zero, weight, scale, shape)
    return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _conv2d(codes: Tensor, zero: int, weight: Tensor, scale: Tensor, shape: Conv) -> Tensor:
    stride, padding, dilation = list(shape.stride), list(shape.padding), list(shape.dilation)
    scales = scale.reshape(1)
    library = torch.ops.onednn
    packed = library.qconv_prepack(
        weight, scales, 1.0, zero, stride, padding, dilation, shape.groups, list(codes.shape)
    )
    no_zero = torch.zeros(1, dtype=torch.int64)
    y: Tensor = library.qconv_pointwise(
        codes, 1.0, zero, packed, scales, no_zero, None, stride, padding, dilation, shape.groups,
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return y


@cache
def why_not() -> str | None:
    """Why the int8 kernel cannot be used here, in a few words; None if it can.

    Asked of the kernel itself: without VNNI it saturates at 16 bits, and extreme codes then give wrong sums.
    """
    try:
        for zero, stride, channels in product((0, 128), (1, 2), (3, 64)):
            codes = torch.full((1, channels, 6, 6), 255, dtype=torch.uint8)
            codes[..., ::3] = 1
            weight = torch.full((16, channels, 3, 3), -128, dtype=torch.int8)
            weight[::2] = 127
            shape, scale = Conv(stride=(stride, stride), padding=(1, 1)), torch.tensor(0.37)
            want = F.conv2d(codes.double() - zero, weight.double(), stride=stride, padding=1).float() * scale
            if not torch.equal(_conv2d(codes, zero, weight, scale, shape), want):
                return "its sums are not exact on this processor"
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return f"torch cannot: {str(error).splitlines()[0]}"
    return None
