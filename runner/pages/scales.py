"""How values are laid out on scales: which need a logarithmic one, and what stands along a scale of colours."""

import numpy as np

from runner.pages import svg


def finite(values: object) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    """The finite ones among some numbers."""
    array = np.asarray(values, dtype=np.float64)
    return array[np.isfinite(array)]


def spans_decades(values: object) -> bool:
    """Whether values are positive and range over a factor of 50, so that only a log axis shows them all."""
    array = finite(values)
    return bool(array.size and array.min() > 0 and array.max() / array.min() >= 50)


def round_powers(values: object, most: int = 6) -> list[float]:
    """What stands along a logarithmic axis: 1, 2, 5 or 1, 3 times powers of ten, over many decades some of the powers.

    >>> round_powers([0.05, 0.001]), round_powers([0.1, 0.002], most=5)
    ([0.001, 0.002, 0.005, 0.01, 0.02, 0.05], [0.003, 0.01, 0.03, 0.1])
    >>> round_powers([1e-9, 1.0])
    [1e-09, 1e-07, 1e-05, 0.001, 0.1]
    """
    array = finite(values)
    return svg.round_powers(float(array.min()), float(array.max()), most, ((1, 2, 5), (1, 3), (1,)))


def colours(values: object) -> tuple[bool, float, float, list[float]]:
    """A scale that covers the values: whether it is logarithmic, from where to where, and a few round values along it.

    >>> colours([0.9931, 0.9952]), colours([0.001, 1.0])[3]
    ((False, 0.9931, 0.9952, [0.9935, 0.994, 0.9945, 0.995]), [0.004, 0.016, 0.063, 0.25])
    """
    array = finite(values)
    low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 1.0)
    if low == high:
        low, high = low - abs(low or 1) / 2, high + abs(high or 1) / 2
    logarithmic = spans_decades(array)
    if logarithmic:
        return logarithmic, low, high, sorted({float(f"{value:.2g}") for value in np.geomspace(low, high, 6)[1:-1]})
    margin = (high - low) / 30  # a number on the very edge would be cut off
    return logarithmic, low, high, [x for x in svg.round_values(low, high, 6) if low + margin < x < high - margin]
