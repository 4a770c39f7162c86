"""Components by the name that configs use. Every module of this folder is imported when a name is looked up: none is listed."""

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")
C = TypeVar("C", bound=type[Any])


class Registry(Generic[T]):
    """Classes of one kind, under `@register("name")`; `find` gives them back."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.known: dict[str, T] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Make a class known under `name`, and tell the class. Raises ValueError for a name that another module has taken."""

        def add(cls: C) -> C:
            owner: Any = self.known.get(name)
            if owner is not None and owner.__module__ != cls.__module__:
                raise ValueError(f"the {self.kind} name {name!r} is already taken by {owner.__module__}")
            cls.name = name
            self.known[name] = cls  # type: ignore[assignment]
            return cls

        return add

    def find(self, name: str) -> T:
        """The class of that name. Raises ValueError with the known names and the nearest one."""
        for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
            importlib.import_module(f"{__package__}.{module.name}")
        if name not in self.known:
            near = difflib.get_close_matches(name, self.known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown {self.kind} {name!r}; known: {', '.join(sorted(self.known))}.{hint}")
        return self.known[name]
