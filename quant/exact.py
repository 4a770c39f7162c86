"""What a product of bits or of codes takes: float32 on a CPU, and under autocast also what autocast has rounded.

Such a product is exact and faster than one of rounded floats, so autocast has nothing to win in it: it computes in float32, and
hands on float32.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Forward = TypeVar("Forward", bound=Callable[..., Any])

in_float32: Callable[[Forward], Forward] = torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
"""For `forward` of an autograd function: under autocast on the CPU its floats become float32, and autocast is off within."""


def obstacle_of_type(*tensors: Tensor) -> str | None:
    """What other type, or device, one of them is of; None if all can be taken.

    >>> obstacle_of_type(torch.ones(1), torch.ones(1).bfloat16())
    'tensors of torch.bfloat16 on cpu'
    """
    taken = {torch.float32} | ({torch.get_autocast_dtype("cpu")} if torch.is_autocast_enabled("cpu") else set())
    for tensor in tensors:
        if tensor.dtype not in taken or tensor.device.type != "cpu":
            return f"tensors of {tensor.dtype} on {tensor.device.type}"
    return None
