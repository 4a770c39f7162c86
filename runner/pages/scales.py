"""How values are laid out on scales: which need a logarithmic one, and what stands along a scale of colours."""

import numpy as np


def finite(values: object) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    """The finite ones among some numbers."""
    array = np.asarray(values, dtype=np.float64)
    return array[np.isfinite(array)]


def largest(values: object) -> float:
    """The largest magnitude, 0 where there is nothing."""
    return float(np.abs(finite(values)).max(initial=0.0))


def spans_decades(values: object) -> bool:
    """Whether values are positive and range over a factor of 50, so that only a log axis shows them all."""
    array = finite(values)
    return bool(array.size and array.min() > 0 and array.max() / array.min() >= 50)


def colours(values: object) -> tuple[bool, float, float, list[float]]:
    """A scale that covers the values: whether it is logarithmic, from where to where, and four round values along it."""
    array = finite(values)
    low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 1.0)
    if low == high:
        low, high = low - abs(low or 1) / 2, high + abs(high or 1) / 2
    logarithmic = spans_decades(array)
    between = (np.geomspace if logarithmic else np.linspace)(low, high, 6)[1:-1]
    return logarithmic, low, high, sorted({float(f"{value:.2g}") for value in between})
