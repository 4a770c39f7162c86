"""What configs can ask for, read from source text: names, arguments, types and defaults of everything that is registered.

Nothing is imported: a wrong config is answered before torch is loaded. A component is a class or a function under a
`@register("name")`; which kind it is follows from where that `register` was imported from.
"""

import ast
import importlib.util
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import annotated_types

ROOT = Path(__file__).resolve().parent.parent
REGISTERS = {
    "models.base.register": "model",
    "quant.base.register": "quant",
    "quant.classifier.register": "classifier",
    "quant.regularizer.register": "regularizer",
    "runner.data.datasets.register": "dataset",
}
GIVEN = {"in_channels", "num_classes", "image_size"}  # arguments of models that come from the data set
MISSING = object()
Annotation = Any  # what typing gives: a class, a Literal, an Annotated, a union


@dataclass(frozen=True)
class Argument:
    """One key of a component's YAML: its type, and its default (MISSING where there is none)."""

    type: Annotation
    default: Any = MISSING


@dataclass(frozen=True)
class Component:
    """Something that configs name."""

    group: str
    name: str
    module: str
    arguments: Mapping[str, Argument] = field(default_factory=dict)
    scheduled: tuple[str, ...] = ()  # arguments that a phase of a regime may drive


@cache
def catalog(plugins: tuple[str, ...] = ()) -> dict[str, dict[str, Component]]:
    """Every component by group and name, those of the plugins included. Raises ValueError for a plugin that cannot be read."""
    found: dict[str, dict[str, Component]] = {group: {} for group in REGISTERS.values()}
    for module in _own_modules():
        _add(found, module)
    for plugin in plugins:
        try:
            _add(found, plugin)
        except (TypeError, SyntaxError, OSError, RecursionError) as error:
            raise ValueError(f"plugin {plugin!r} cannot be read: {error}") from error
    return found


def _add(found: dict[str, dict[str, Component]], module: str) -> None:
    for component in _components(_Source.of(module)):
        owner = found[component.group].setdefault(component.name, component)
        if owner is not component:
            raise ValueError(f"{module}: the {component.group} name {component.name!r} is taken by {owner.module}")


def _own_modules() -> Iterable[str]:
    for folder in ("models", "quant"):
        for path in sorted((ROOT / folder).glob("*.py")):
            yield f"{folder}.{path.stem}"
    yield "runner.data.datasets"


@dataclass(frozen=True)
class _Source:
    """The parsed text of a module, with what its names stand for."""

    module: str
    tree: ast.Module

    @staticmethod
    @cache
    def of(module: str) -> "_Source":
        if not all(part.isidentifier() for part in module.split(".")):
            raise ValueError(f"plugin {module!r} is not the name of a module: write package.module")
        own = ROOT / Path(*module.split(".")).with_suffix(".py")
        path = own if own.is_file() else _find(module)
        return _Source(module, ast.parse(path.read_text(encoding="utf-8"), filename=str(path)))

    def imported(self, name: str) -> tuple[str, str] | None:
        """Where a `from module import name` brings a name from."""
        for node in self.tree.body:
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self._absolute(node), alias.name
        return None

    def _absolute(self, node: ast.ImportFrom) -> str:
        """The full name of the module that is imported from, dots at its front resolved."""
        above = self.module.split(".")[: -node.level] if node.level else []
        return ".".join([*above, *([node.module] if node.module else [])])

    def assigned(self, name: str) -> ast.expr | None:
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                return node.value
        return None

    def classdef(self, name: str) -> "tuple[_Source, ast.ClassDef] | None":
        """The class of that name, here or in the module that it is imported from: ours, or of the same package as this one."""
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return self, node
        origin = self.imported(name)
        readable = {"models", "quant", "runner", self.module.split(".")[0]}
        ours = origin is not None and origin[0].split(".")[0] in readable
        return _Source.of(origin[0]).classdef(origin[1]) if origin and ours else None


def source_of(plugin: str) -> Path:
    """Where the code of a plugin lies: its file, or the folder of the whole package that it belongs to."""
    path = _find(plugin)
    module = path.parent if path.name == "__init__.py" else path
    return [module, *module.parents][plugin.count(".")]


def _find(module: str) -> Path:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        raise ValueError(f"plugin {module!r} cannot be found: {error}") from error
    except Exception as error:  # the package around it is imported to find it, and may raise anything
        raise ValueError(f"plugin {module!r} cannot be found: its package fails with {error!r}") from error
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ValueError(f"plugin {module!r} cannot be found: no such module on the Python path")
    return Path(spec.origin)


def _components(source: _Source) -> Iterable[Component]:
    for node in source.tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            for decorator in node.decorator_list:
                registered = _registered(source, decorator)
                if registered:
                    group, name = registered
                    if isinstance(node, ast.ClassDef):
                        yield Component(group, name, source.module, _fields(source, node), _scheduled(source, node))
                    else:
                        yield Component(group, name, source.module, _parameters(source, node))


def _registered(source: _Source, decorator: ast.expr) -> tuple[str, str] | None:
    """(group, name) of a `@register("name")`."""
    match decorator:
        case ast.Call(func=ast.Name(id=function), args=[ast.Constant(value=str(name)), *_]):
            module, original = source.imported(function) or (source.module, function)
            group = REGISTERS.get(f"{module}.{original}")
            return (group, name) if group else None
    return None


def _fields(source: _Source, node: ast.ClassDef) -> dict[str, Argument]:
    """Fields of a dataclass, those of its bases first."""
    fields: dict[str, Argument] = {}
    for base in node.bases:
        found = source.classdef(base.id) if isinstance(base, ast.Name) else None
        fields |= _fields(*found) if found else {}
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and not _is_classvar(item.annotation):
            fields[item.target.id] = _argument(source, item.annotation, item.value)
    return fields


def _scheduled(source: _Source, node: ast.ClassDef) -> tuple[str, ...]:
    """The value of the class attribute `scheduled`, its own or the nearest base's."""
    for item in node.body:
        match item:
            case (
                ast.Assign(targets=[ast.Name(id="scheduled")], value=value)
                | ast.AnnAssign(target=ast.Name(id="scheduled"), value=ast.expr() as value)
            ):
                return tuple(ast.literal_eval(value))
    bases = [source.classdef(base.id) for base in node.bases if isinstance(base, ast.Name)]
    return next((names for base in bases if base and (names := _scheduled(*base))), ())


def _parameters(source: _Source, node: ast.FunctionDef) -> dict[str, Argument]:
    """Keyword-only parameters of a function, without those that the runner itself gives."""
    pairs = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    return {a.arg: _argument(source, a.annotation, d) for a, d in pairs if a.arg not in GIVEN}


def _is_classvar(annotation: ast.expr) -> bool:
    return ast.unparse(annotation).startswith(("ClassVar", "typing.ClassVar"))


def _argument(source: _Source, annotation: ast.expr | None, default: ast.expr | None) -> Argument:
    kind = _annotation(source, annotation) if annotation is not None else Any
    if default is None:
        return Argument(kind)
    try:
        return Argument(kind, ast.literal_eval(default))
    except ValueError:
        return Argument(kind, None)  # a computed default: any config file states the key


TYPES: dict[str, Annotation] = {t.__name__: t for t in (int, float, bool, str, list, dict, tuple)} | {
    "Any": Any,
    "Sequence": list,
    "Mapping": dict,
}


def _annotation(source: _Source, node: ast.expr) -> Annotation:
    """The type that an annotation names. Only data types are understood; anything else is a mistake of the component's author."""
    match node:
        case ast.Constant(value=None):
            return type(None)
        case ast.Name(id=name) if name in TYPES:
            return TYPES[name]
        case ast.Name(id=name):
            return _alias(source, name)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _annotation(source, left) | _annotation(source, right)
        case ast.Subscript(value=ast.Name(id=outer), slice=inner):
            return _subscript(source, outer, inner.elts if isinstance(inner, ast.Tuple) else [inner])
    raise TypeError(f"{source.module}: configs cannot carry a {ast.unparse(node)}")


def _subscript(source: _Source, outer: str, inner: list[ast.expr]) -> Annotation:
    if outer == "Literal":
        return Literal[tuple(ast.literal_eval(item) for item in inner)]
    if outer == "Annotated":
        constraints = tuple(_constraint(item) for item in inner[1:])
        return Annotated[(_annotation(source, inner[0]), *constraints)]
    if outer not in {*TYPES, "Optional"}:
        raise TypeError(f"{source.module}: configs cannot carry a {outer}[…]")
    arguments = tuple(_annotation(source, item) for item in inner)
    if outer == "Optional":
        return Optional[arguments[0]]  # noqa: UP045  (built at run time)
    return types.GenericAlias(TYPES[outer], arguments)


def _alias(source: _Source, name: str) -> Annotation:
    node = source.assigned(name)
    if node is not None:
        return _annotation(source, node)
    origin = source.imported(name)
    if origin is None:
        raise TypeError(f"{source.module}: the type {name} is not known")
    return _alias(_Source.of(origin[0]), origin[1])


def _constraint(node: ast.expr) -> Any:
    match node:
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            positional = [ast.literal_eval(item) for item in args]
            make = getattr(annotated_types, name, None)
            if make is not None:
                return make(*positional, **{k.arg: ast.literal_eval(k.value) for k in keywords if k.arg})
    raise TypeError(f"not a constraint: {ast.unparse(node)}")
