"""Checks of attributes that come from a file: each says what is accepted, or None where the value is fine."""

from collections.abc import Callable
from typing import Any

Check = Callable[[Any], str | None]
LARGEST, LARGEST_SIDE = 1 << 20, 256  # numbers of channels and the like; kernels, strides and paddings
LARGEST_NUMBER, LEAST_NUMBER = (2 - 2**-23) * 2.0**127, 2.0**-149  # what float32 holds, in which all is computed


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def whole(low: int, high: int = LARGEST) -> Check:
    """A whole number from `low` to `high`.

    >>> whole(1)(0), whole(1)(3)
    ('a whole number from 1 to 1048576', None)
    """
    return lambda value: None if _is_whole(value, low, high) else f"a whole number from {low} to {high}"


def pair(low: int) -> Check:
    """Two whole numbers, for height and width."""

    def check(value: Any) -> str | None:
        fits = isinstance(value, list) and len(value) == 2 and all(_is_whole(v, low, LARGEST_SIDE) for v in value)
        return None if fits else f"two whole numbers from {low} to {LARGEST_SIDE}"

    return check


def shape(value: Any) -> str | None:
    """The shape of a weight: two numbers of channels, and the two sides of a kernel where it has one.

    >>> shape([20, 3, 5, 5]), shape([20, 3, 5, 257])
    (None, 'two whole numbers from 1 to 1048576, of a kernel two more up to 256')
    """
    fits = isinstance(value, list) and len(value) in (2, 4) and all(_is_whole(v, 1, LARGEST) for v in value)
    fits = fits and all(side <= LARGEST_SIDE for side in value[2:])
    return None if fits else f"two whole numbers from 1 to {LARGEST}, of a kernel two more up to {LARGEST_SIDE}"


def number(value: Any) -> str | None:
    """A number of float32; NaN is none.

    >>> number(-0.5), number(1e39)
    (None, 'a finite number of float32')
    """
    fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_NUMBER
    return None if fits else "a finite number of float32"


def positive(value: Any) -> str | None:
    return number(value) or (None if value >= LEAST_NUMBER else "a number above 0 of float32")


def flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"
