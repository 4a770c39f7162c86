"""Binary convolution on packed bits, on the CPU: Numba compiles it here, once; README.md tells how it works.

Importing this package does not import Numba. `why_not()` says why the kernels cannot run, if so; all else then stays float.

    packed = pack_weight(w, padding=1)
    y = binary_conv2d(x, packed, scale=alpha, bias=b, stride=1)      conv2d(sign(x), sign(w)) alpha + b, exactly

    signs, inside = pack_with_mask(x)                                 what a training layer keeps of x: 2 bits
    y = conv2d_of_packed(signs, packed)
    unpack_signs(signs, x.shape), masked(grad, inside)                and what its backward makes of them
    input_gradient(g, w, alpha, x.shape, stride, padding)             gradients without a multiplication
    weight_gradient(g, signs, x.shape, kernel, stride, padding)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quant.kernels.gradients import input_gradient, weight_gradient
    from quant.kernels.layers import binary_conv2d, binary_linear, conv2d_of_packed
    from quant.kernels.machine import Processor
    from quant.kernels.packing import masked, pack_activations, pack_with_mask, unpack_signs
    from quant.kernels.weights import PackedWeight, pack_weight

_MODULE_OF = {
    "binary_conv2d": "layers",
    "binary_linear": "layers",
    "input_gradient": "gradients",
    "weight_gradient": "gradients",
    "conv2d_of_packed": "layers",
    "masked": "packing",
    "pack_activations": "packing",
    "pack_with_mask": "packing",
    "unpack_signs": "packing",
    "PackedWeight": "weights",
    "pack_weight": "weights",
}
__all__ = [
    "PackedWeight", "available", "binary_conv2d", "binary_linear", "conv2d_of_packed", "input_gradient", "masked",
    "pack_activations", "pack_weight", "pack_with_mask", "unpack_signs", "weight_gradient", "why_no_lookup", "why_not",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)  # asked once
    return found


def why_not() -> str | None:
    """Why the packed kernels cannot run here, in one line; None if they can."""
    try:
        available()
    except ImportError as error:
        return f"the packed kernels need Numba, which cannot be imported: {error}"
    except ValueError as error:
        return str(error)
    return None


def why_no_lookup() -> str | None:
    """Why gradients cannot be looked up here, in one line; None if they can."""
    return why_not() or (None if available() == "avx512" else "lookup products need AVX-512")


def available() -> "Processor":
    """The code path in use: avx512, avx2 or portable. Raises ImportError without Numba (see `why_not`)."""
    from quant.kernels.machine import processor

    return processor()
