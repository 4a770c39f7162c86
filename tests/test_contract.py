"""What every quantizer must stand, found by its YAML: a new one is tested here without an edit."""

import copy
import dataclasses
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from models.base import build
from quant.base import find
from quant.surgery import LayerRow, Rule, calibrate_, health, quantize_, quantized_layers
from runner.build import phases_of, quantizer_of, rules_of
from runner.compose import CONF, config_from
from runner.faults import ConfigError

METHODS = sorted(path.stem for path in (CONF / "quant").glob("*.yaml"))
MODELS: dict[str, tuple[dict[str, Any], tuple[int, int, int, int]]] = {
    "lenet5": ({}, (4, 1, 28, 28)),
    "resnet18": ({}, (2, 3, 16, 16)),
    "vgg6": ({}, (2, 3, 8, 8)),
    "nin": ({}, (2, 3, 32, 32)),
    "torchvision": ({"arch": "mobilenet_v2"}, (8, 3, 64, 64)),
}
SMALL = (6, 3, 9, 9)
OWN = [m for m in METHODS if yaml.safe_load((CONF / "quant" / f"{m}.yaml").read_text(encoding="utf-8"))["name"] == m]
PAIRS = [(method, model) for method in METHODS for model in MODELS if method in OWN or model == "lenet5"]


def seeded(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@cache
def settings(method: str) -> Any:
    """The checked config section that a command line with quant=METHOD has."""
    return config_from([f"quant={method}"]).quant


def rewritten(method: str, model: nn.Module, x: Tensor) -> list[LayerRow]:
    """Quantize and calibrate, as a run does."""
    rows = quantize_(model, quantizer_of(settings(method)), rules_of(settings(method)))
    calibrate_(model, x)
    return rows


def small(method: str, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Every kind of layer that methods rewrite, behind one another."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(4, 8, 3, padding=1, groups=2, bias=False), nn.ReLU(), nn.Flatten()]
    layers += [nn.Linear(72, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 5)]
    model = nn.Sequential(*layers).to(dtype)
    rewritten(method, model, seeded(*SMALL, dtype=dtype))
    return model


def step_(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer | None = None) -> Tensor:
    """One step of training as the trainer takes it; the loss."""
    model.zero_grad()
    loss = F.cross_entropy(model.train()(x), torch.arange(len(x)) % 5)
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        for layer in quantized_layers(model).values():
            layer.project_()
    return loss.detach()


def evaluated(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = model.eval()(x)
    return y


# ---- settings


@pytest.mark.parametrize("method", METHODS)
def test_the_yaml_has_every_field_and_nothing_else(method: str) -> None:
    keys = yaml.safe_load((CONF / "quant" / f"{method}.yaml").read_text(encoding="utf-8"))
    name, _ = keys.pop("name"), keys.pop("rules")
    fields = {field.name: field.default for field in dataclasses.fields(find(name))}
    assert keys.keys() == fields.keys()
    if name == method:  # another file may be the same class with other settings
        assert keys == fields


# ---- networks


@pytest.mark.parametrize(("method", "model"), PAIRS)
def test_networks_are_rewritten_and_train(method: str, model: str) -> None:
    torch.manual_seed(0)
    arguments, shape = MODELS[model]
    net = build(model, in_channels=shape[1], num_classes=10, image_size=shape[2], **arguments)
    x = seeded(*shape)
    rows = rewritten(method, net, x)
    assert {row.layer for row in rows} >= {n for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    if method != "none":
        assert any(row.becomes != "kept" for row in rows)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    before = [p.detach().clone() for p in net.parameters()]
    assert all(torch.isfinite(step_(net, x, optimizer)) for _ in range(2))
    assert any(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    first = evaluated(net, x)
    assert first.isfinite().all()
    assert torch.equal(first, evaluated(net, x))


@pytest.mark.parametrize("method", METHODS)
def test_a_state_gives_back_the_same_bits(method: str) -> None:
    x = seeded(*SMALL)
    trained = small(method)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    for _ in range(2):
        step_(trained, x, optimizer)
    expected = evaluated(trained, x)
    other = small(method)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    other.load_state_dict(trained.state_dict())
    assert torch.equal(evaluated(other, x), expected)
    twin = copy.deepcopy(trained)
    step_(trained, x, optimizer)
    assert torch.equal(evaluated(twin, x), expected)


@pytest.mark.parametrize("method", METHODS)
def test_codes_and_health(method: str) -> None:
    model = small(method)
    figures = health(model.eval(), seeded(*SMALL))
    for name, layer in quantized_layers(model).items():
        codes = layer.weight_codes()
        if codes is not None:
            assert codes.shape == layer.weight.shape  # type: ignore[attr-defined]
            assert codes.dtype in {torch.int8, torch.int16}
            assert len(codes.unique()) <= 2**layer.precision.weight
        assert all(isinstance(value, float) and abs(value) < float("inf") for value in figures[name].values())


# ---- inputs


def hostile() -> Iterator[Any]:
    x = seeded(*SMALL)
    yield "zero", torch.zeros(SMALL)
    yield "constant", torch.full(SMALL, 3.0)
    yield "huge", x * 1e30
    yield "tiny", x * 1e-30
    yield "strided", seeded(6, 3, 18, 9)[:, :, ::2]
    yield "transposed", seeded(6, 3, 9, 9).transpose(2, 3)
    yield "channels_last", x.to(memory_format=torch.channels_last)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        yield str(dtype), x.to(dtype)


@pytest.mark.parametrize(("kind", "x"), list(hostile()), ids=[kind for kind, _ in hostile()])
@pytest.mark.parametrize("method", METHODS)
def test_inputs_of_every_kind_stay_finite(method: str, kind: str, x: Tensor) -> None:
    for module, shape in ((nn.Conv2d(3, 4, 3), x), (nn.Linear(9, 4), x), (nn.BatchNorm2d(3), x)):
        layer = quantized(method, module.to(x.dtype))
        leaf = shape.clone(memory_format=torch.preserve_format).requires_grad_()
        y = layer(leaf)
        assert y.dtype == x.dtype
        (y.float() * 1e-3).mean().backward()
        assert leaf.grad is not None
        values = [y, leaf.grad, *(p.grad for p in layer.parameters() if p.grad is not None), layer.eval()(x)]
        assert all(value.isfinite().all() for value in values), [value.isfinite().all().item() for value in values]


def quantized(method: str, module: nn.Module) -> nn.Module:
    quantizer = quantizer_of(settings(method))
    new = quantizer.layer(module) if type(module) in quantizer.handles else None
    return module if new is None else new


@pytest.mark.parametrize("method", METHODS)
def test_memory_order_changes_no_value(method: str) -> None:
    model, x = small(method), seeded(*SMALL)
    last = x.to(memory_format=torch.channels_last)
    assert torch.allclose(evaluated(model, x), evaluated(model, last), atol=1e-5)


# ---- conduct


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that Python code could have changed: attributes, and which tensors there are."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        tensors = {key: id(value) for key, value in [*module._parameters.items(), *module._buffers.items()]}
        seen[name] = (own, tensors, list(module._modules))
    return seen


@pytest.mark.parametrize("method", METHODS)
def test_forward_has_no_side_effects_in_python(method: str) -> None:
    model, x = small(method), seeded(*SMALL)
    before, keys = state_of(model), list(model.state_dict())
    model.train()(x)
    assert state_of(model) == {n: ({**own, "training": True}, *rest) for n, (own, *rest) in before.items()}
    values = {key: value.clone() for key, value in model.eval().state_dict().items()}
    random = torch.get_rng_state()
    with torch.no_grad():
        model(x)
    assert torch.equal(torch.get_rng_state(), random)
    assert list(model.state_dict()) == keys
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_compiles_to_one_graph(method: str) -> None:
    model, x = small(method), seeded(*SMALL)
    expected = evaluated(model, x)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert torch.allclose(evaluated(compiled, x), expected, atol=1e-6)
    assert counter.frame_count == 1
    assert torch.isfinite(step_(compiled, x))
    assert counter.frame_count == 2
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "file"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method", METHODS)
def test_distributes(method: str, process_group: None) -> None:
    """Every parameter takes part in every step: a second one would not start otherwise."""
    plain, x = small(method), seeded(*SMALL)
    together = DistributedDataParallel(copy.deepcopy(plain))
    for _ in range(2):
        for model in (plain, together):
            torch.manual_seed(0)
            step_(model, x)
    for a, b in zip(plain.parameters(), together.module.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def test_a_schedule_that_drives_nothing_is_refused() -> None:
    model = small("xnor")
    phases = "regime.phases=[{epoch: 0, optimizer: Adam, lr: 0.01, quant: {sharpness: 2.0}}]"
    with pytest.raises(ConfigError, match=r"regime\.phases\.0\.quant\.sharpness"):
        phases_of(config_from([phases]), model)
    curved = nn.Sequential(nn.Linear(3, 4))
    quantize_(curved, find("xnor")(ste="ede"))
    assert phases_of(config_from([phases, "quant.ste=ede"]), curved)[0][0].quant == {"sharpness": 2.0}


# ---- settings that are made in Python


@pytest.mark.parametrize(
    ("method", "wrong", "said"),
    [
        ("xnor", {"gradient": "exakt"}, r"xnor: gradient is 'exakt'; accepted: exact, .*\. Did you mean 'exact'\?"),
        (
            "xnor",
            {"centre": "projekt"},
            r"centre is 'projekt'; accepted: none, project, graph\. Did you mean 'project'\?",
        ),
        ("xnor", {"clamp": 1}, "clamp is 1; accepted: bool"),
        ("xnor", {"tau": 1.0}, r"tau is 1\.0; accepted: float at least 0\.5 and below 1, or None"),
        ("dorefa", {"weight_bits": 99}, "dorefa: weight_bits is 99; accepted: int at least 1 and at most 8"),
        ("dorefa", {"act_bits": True}, "act_bits is True"),
        ("dorefa", {"act_bits": 4.0}, r"act_bits is 4\.0"),
        ("8bit-rangebn", {"act_bits": 0}, "8bit-rangebn: act_bits is 0; accepted: int at least 2 and at most 16"),
        ("8bit-rangebn", {"grad_weight_bits": 12}, "grad_weight_bits is 12; accepted: 8, 16, 32"),
        ("ternary", {"threshold": -1}, "threshold is -1; accepted: float above 0"),
        ("ternary", {"threshold": float("nan")}, "threshold is nan"),
        ("lsq", {"weight_bits": "4"}, "lsq: weight_bits is '4'; accepted: 2 to 8"),
        ("lsq", {"weight_bits": 4.0}, r"weight_bits is 4\.0; accepted: int"),
        ("lsq", {"placement": "post_akt"}, "Did you mean 'post_act'"),
        ("actgrad", {"group": 0}, "group is 0; accepted: int at least 1, or None"),
    ],
)
def test_a_value_that_is_not_accepted_is_refused(method: str, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        find(method)(**wrong)


def test_the_settings_of_a_rule_are_checked_too() -> None:
    with pytest.raises(ValueError, match="ste is 'klip'"):
        quantize_(small("none"), find("xnor")(), [Rule(match=["first"], settings={"ste": "klip"})])


# ---- a new one


PLUGIN = """
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Interval
from torch import Tensor, nn

from quant.base import Precision, QuantizedLayer, Quantizer, register
from quant.functional import straight_through
from quant.layers import Conv2d, Linear, Matrix, rewrite


class _Rounded(QuantizedLayer, Matrix):
    def prepare(self) -> None:
        self.precision = Precision(weight=self.settings.bits)

    def forward(self, x: Tensor) -> Tensor:
        step = self.weight.detach().abs().amax() / (2 ** (self.settings.bits - 1) - 1)
        return self.product(x, straight_through(self.weight, (self.weight.detach() / step).round() * step), self.bias)


class RoundedConv2d(_Rounded, Conv2d): ...


class RoundedLinear(_Rounded, Linear): ...


@register("rounded")
@dataclass(frozen=True, kw_only=True)
class Rounded(Quantizer):
    bits: Annotated[int, Interval(ge=2, le=8)] = 3

    def layer(self, module: nn.Module) -> nn.Module:
        return rewrite(module, self, RoundedConv2d, RoundedLinear)
"""


def test_a_quantizer_comes_from_anywhere_without_an_edit(tmp_path: Path, runner: Any) -> None:
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "__init__.py").touch()
    (tmp_path / "lab" / "rounded.py").write_text(PLUGIN)
    (tmp_path / "conf" / "quant").mkdir(parents=True)
    (tmp_path / "conf" / "quant" / "rounded.yaml").write_text(
        "name: rounded\nbits: 3\nrules: [{match: first, keep: true}]\n"
    )
    words = ["--config-dir", "conf", "quant=rounded", "plugins=[lab.rounded]"]
    done = runner("train", *words, "quant.bits=4", "trainer.max_steps=3", timeout=240)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "outputs" / "runs").iterdir()
    assert "conv2,Conv2d,RoundedConv2d,4,32,32" in (run / "layers.csv").read_text()
    refused = runner("train", *words, "quant.bits=9", timeout=240)
    assert (refused.returncode, "quant.bits" in refused.stderr) == (78, True)
    proved = runner("verify", *words, timeout=240)
    assert proved.returncode == 0, proved.stderr
    assert "no claims: nothing proved" in proved.stdout
