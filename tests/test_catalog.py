"""What configs can name is read from source text: arguments, types, defaults, plugins."""

import sys
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields
from pathlib import Path
from textwrap import dedent
from typing import Annotated, Any, Literal

import pytest
import yaml
from annotated_types import Ge, Interval, Lt
from pydantic import TypeAdapter, ValidationError

from runner.catalog import MISSING, catalog
from runner.compose import conf_folder, config_from
from runner.environment import code_digest
from runner.faults import ConfigError


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes modules into a folder on the Python path and forgets them afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    catalog.cache_clear()

    def write(path: str, text: str) -> None:
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(dedent(text), encoding="utf-8")

    yield write
    catalog.cache_clear()
    from runner.catalog import _Source

    _Source.of.cache_clear()
    for name in [name for name in sys.modules if name.startswith("made_")]:
        del sys.modules[name]


QUANTIZER = """
    from dataclasses import dataclass
    from typing import Annotated, ClassVar, Literal

    import a_package_that_is_not_installed
    from annotated_types import Ge, Interval, Lt
    from quant.base import Quantizer, register

    Bits = Annotated[int, Interval(ge=1, le=8)]
    Mode = Literal["up", "down"]

    @register("made")
    @dataclass(frozen=True, kw_only=True)
    class Made(Quantizer):
        scheduled: ClassVar[tuple[str, ...]] = ("slope",)
        bits: Bits
        mode: Mode | None = None
        slope: Annotated[float, Ge(0), Lt(2)] = 0.5
        groups: list[Bits] = []
        table: dict[str, float] = {}
        loud: bool = False
"""


def test_arguments_types_and_defaults_of_a_class(plugin: Any) -> None:
    plugin("made_quantizer.py", QUANTIZER)
    made = catalog(("made_quantizer",))["quant"]["made"]
    bits = Annotated[int, Interval(ge=1, le=8)]
    expected = {
        "bits": (bits, MISSING),
        "mode": (Literal["up", "down"] | None, None),
        "slope": (Annotated[float, Ge(0), Lt(2)], 0.5),
        "groups": (list[bits], []),
        "table": (dict[str, float], {}),
        "loud": (bool, False),
    }
    assert {name: (a.type, a.default) for name, a in made.arguments.items()} == expected
    assert made.module == "made_quantizer"
    assert made.scheduled == ("slope",)
    assert "a_package_that_is_not_installed" not in sys.modules
    assert "made_quantizer" not in sys.modules, "the source was read, not run"


def test_bounds_inside_a_type_bind(plugin: Any) -> None:
    plugin("made_quantizer.py", QUANTIZER)
    groups = TypeAdapter(catalog(("made_quantizer",))["quant"]["made"].arguments["groups"].type)
    assert groups.validate_python([1, 8]) == [1, 8]
    with pytest.raises(ValidationError):
        groups.validate_python([1, 9])


def test_a_plugin_is_composed_checked_and_named_in_errors(plugin: Any, tmp_path: Path) -> None:
    plugin("made_quantizer.py", QUANTIZER)
    plugin(
        "made_model.py",
        """
        from models.base import register
        from torch import nn

        @register("made_net")
        def made_net(*, in_channels: int, num_classes: int, image_size: int, depth: int = 3) -> nn.Module: ...
    """,
    )
    plugin("own/quant/made.yaml", "name: made\nbits: 4\n")
    plugin("own/model/made_net.yaml", "name: made_net\ndepth: 5\n")
    words, folders = ["plugins=[made_quantizer,made_model]", "quant=made", "model=made_net"], [str(tmp_path / "own")]
    config = config_from([*words, "quant.mode=up"], folders)
    assert config.quant.arguments["bits"] == 4
    assert config.quant.arguments["mode"] == "up"
    assert config.model.arguments == {"depth": 5}, "what the data set gives is no key of a model"
    with pytest.raises(ConfigError) as caught:
        config_from([*words, "quant.bits=9", "model.dept=2"], folders)
    message = str(caught.value)
    assert "quant.bits: value should be less than or equal to 8, not 9" in message
    assert "model.dept: unknown key. Did you mean 'depth'?" in message
    with pytest.raises(ConfigError, match="Did you mean 'made_net'"):
        config_from(["model=made_nett"], folders)
    with pytest.raises(ConfigError, match=r"quant\.name: 'made' is not known"):
        config_from(["quant=made"], folders)


def test_a_class_inherits_fields_and_schedules_of_its_bases(plugin: Any) -> None:
    plugin("made_pack/__init__.py", "")
    plugin(
        "made_pack/base.py",
        """
        from dataclasses import dataclass
        from quant.base import Quantizer

        class Steps(Quantizer):
            scheduled = ("slope",)
            slope: float = 1.0
            bits: int = 4
    """,
    )
    plugin(
        "made_pack/method.py",
        """
        from quant.base import register
        from .base import Steps as Ground

        @register("made_heir")
        class Heir(Ground):
            bits: int = 2
            own: bool = True
    """,
    )
    heir = catalog(("made_pack.method",))["quant"]["made_heir"]
    assert {name: a.default for name, a in heir.arguments.items()} == {"slope": 1.0, "bits": 2, "own": True}
    assert heir.scheduled == ("slope",)


def test_every_dataclass_reads_as_it_is() -> None:
    """The text and the class agree, for every quantizer, classifier and regularizer there is."""
    import quant.base
    import quant.regularizer

    for group, find in (("quant", quant.base.find), ("regularizer", quant.regularizer.find)):
        for name, component in catalog()[group].items():
            real = {f.name: f.default for f in fields(find(name))}
            read = {key: a.default for key, a in component.arguments.items()}
            assert list(read) == list(real), name
            assert all(read[k] == v for k, v in real.items() if v is not NO_DEFAULT), name
            assert component.scheduled == getattr(find(name), "scheduled", ())


def test_every_choice_in_conf_is_a_component_and_every_component_has_a_choice() -> None:
    """A YAML file without its class, or a class without its file, would be found out by a user only."""
    for group, components in catalog().items():
        named = {
            yaml.safe_load(path.read_text(encoding="utf-8"))["name"] for path in (conf_folder() / group).glob("*.yaml")
        }
        assert named == set(components), group


HEAD = """
from quant.base import register
@register("made")
class A:
"""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def broken(:", "made_bad.py"),
        ("\0", "made_bad"),
        (HEAD + "    x: Callable", "the type Callable is not known"),
        (HEAD + "    x: set[int]", "configs cannot carry a set"),
        (HEAD + "    x: int | 'str'", "configs cannot carry a"),
        (HEAD + "    x: Annotated[int, Odd(1)]", "not a constraint"),
        ("T = T\n" + HEAD + "    x: T", "recursion"),
        (HEAD.replace("made", "xnor") + "    x: int = 1", "'xnor' is taken by quant.xnor"),
    ],
)
def test_a_plugin_that_cannot_be_read_is_a_fault_of_the_config(plugin: Any, text: str, says: str) -> None:
    plugin("made_bad.py", text)
    with pytest.raises(ConfigError) as caught:
        config_from(["plugins=[made_bad]", "trainer.epochs=0"])
    assert "plugins: " in str(caught.value)
    assert says in str(caught.value)
    assert "trainer.epochs" in str(caught.value), "the other faults are told too"


@pytest.mark.parametrize(
    "name", ["nowhere_at_all", "nowhere.at.all", "made_raises.inner", "''", "'../evil'", "'.x'", "'a b'"]
)
def test_a_plugin_that_is_not_there_is_a_fault_of_the_config(plugin: Any, name: str) -> None:
    plugin("made_raises/__init__.py", "raise RuntimeError('no')")
    plugin("made_raises/inner.py", "")
    with pytest.raises(ConfigError, match="plugins: "):
        config_from([f"plugins=[{name}]"])


@pytest.mark.parametrize("value", ["5", "abc", "[5]", "[[made]]", "null", "[null]"])
def test_plugins_are_a_list_of_names(value: str) -> None:
    with pytest.raises(ConfigError, match=r"plugins(\.0)?: value should be a valid (list|string)"):
        config_from([f"plugins={value}"])


@pytest.mark.parametrize(
    ("name", "files"),
    {
        "made_alone": ["made_alone.py"],
        "made_pack": ["made_pack/__init__.py", "made_pack/helper.py"],
        "made_pack.inner.module": ["made_pack/__init__.py", "made_pack/inner/module.py", "made_pack/helper.py"],
        "made_bare.module": ["made_bare/module.py", "made_bare/helper.py"],
    }.items(),
)
def test_the_code_of_a_plugin_decides_whether_resume_is_exact(plugin: Any, name: str, files: list[str]) -> None:
    for path in (*files, "made_pack/inner/__init__.py", "made_other.py"):
        plugin(path, "a = 1")

    def digest() -> str:
        code_digest.cache_clear()
        return code_digest((name,))

    seen = [digest()]
    assert seen == [digest()] != [code_digest()]
    for path in files:
        plugin(path, "a = 2")
        seen.append(digest())
    assert len(set(seen)) == len(seen)
    plugin("made_other.py", "a = 2")
    assert digest() == seen[-1]
