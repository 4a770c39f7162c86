"""Whether the fields of a dataclass hold what their annotations say: for settings that are made in Python, without a config."""

import difflib
import math
from collections.abc import Iterator
from dataclasses import fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Interval, Le, Lt

UNIONS = (Union, UnionType)


def check_fields(settings: Any, method: str) -> None:
    """Raises ValueError with the method, the key, its value and what is accepted, for the first field with a wrong value.

    Literals, bounds and plain types are checked; what is in a list or a mapping is not.
    """
    hints = get_type_hints(type(settings), include_extras=True)
    for field in fields(settings):
        value, annotation = getattr(settings, field.name), hints[field.name]
        if not _accepts(annotation, value):
            near = difflib.get_close_matches(str(value), _words(annotation), n=1)
            hint = f". Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{method}: {field.name} is {value!r}; accepted: {_described(annotation)}{hint}")


def _accepts(annotation: Any, value: Any) -> bool:
    """No silent conversion: True is no number, "4" is no 4, but 1 is a float."""
    origin = get_origin(annotation)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(annotation))
    if origin in UNIONS:
        return any(_accepts(branch, value) for branch in get_args(annotation))
    if origin is Annotated:
        kind, *bounds = get_args(annotation)
        return _accepts(kind, value) and all(_within(bound, value) for bound in bounds)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    checked = origin is None and annotation is not Any and isinstance(annotation, type)
    return isinstance(value, annotation) if checked else True


def _within(bound: Any, value: Any) -> bool:
    match bound:
        case Ge(limit):
            return bool(value >= limit)
        case Gt(limit):
            return bool(value > limit)
        case Le(limit):
            return bool(value <= limit)
        case Lt(limit):
            return bool(value < limit)
        case Interval():
            return all(_within(part, value) for part in bound)
    return True


def _described(annotation: Any) -> str:
    """What an annotation accepts, for people.

    >>> _described(Annotated[int, Interval(ge=1, le=8)] | None), _described(Literal["exact", "ste"])
    ('int at least 1 and at most 8, or None', 'exact, ste')
    """
    origin = get_origin(annotation)
    if origin is Literal:
        return ", ".join(str(choice) for choice in get_args(annotation))
    if origin in UNIONS:
        return ", or ".join(_described(branch) for branch in get_args(annotation))
    if origin is Annotated:
        kind, *bounds = get_args(annotation)
        limits = " and ".join(words for bound in bounds for words in _limits(bound))
        return f"{_described(kind)} {limits}".rstrip()
    return "None" if annotation is NoneType else getattr(annotation, "__name__", str(annotation))


def _limits(bound: Any) -> Iterator[str]:
    match bound:
        case Ge(limit):
            yield f"at least {limit}"
        case Gt(limit):
            yield f"above {limit}"
        case Le(limit):
            yield f"at most {limit}"
        case Lt(limit):
            yield f"below {limit}"
        case Interval():
            for part in bound:
                yield from _limits(part)


def _words(annotation: Any) -> list[str]:
    """Every word that an annotation lists."""
    if get_origin(annotation) is Literal:
        return [choice for choice in get_args(annotation) if isinstance(choice, str)]
    return [word for branch in get_args(annotation) for word in _words(branch)]
