"""Where the one-pass kernels of quant/kernels/elementwise.py may stand in for a chain of torch operations."""

import torch
from torch import Tensor, nn

from quant import kernels

SMALL = 2048  # values below which torch is as fast, and nothing need be compiled


def usable(x: Tensor, size: int | None = None) -> bool:
    """Whether x is dense float32 on the CPU, has enough values (`size`: what is made of it has), and no graph is being traced."""
    if torch.compiler.is_compiling() or (x.numel() if size is None else size) < SMALL:
        return False
    return _plain(x) and kernels.why_not() is None


def _plain(x: Tensor) -> bool:
    if type(x) not in (Tensor, nn.Parameter) or x.dtype != torch.float32 or x.device.type != "cpu":
        return False
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
