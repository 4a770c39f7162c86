"""Layer surgery: rules, shared modules, what is left alone and why."""

import pytest
import torch
from torch import Tensor, nn

from quant.base import Precision, QuantizedLayer, find
from quant.surgery import Rule, calibrate_, health, quantize_, quantized_layers


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 36, 3),
    )


def test_first_match_wins_and_every_matrix_layer_has_a_row() -> None:
    model = network()
    rules = [Rule(match=["first"], keep=True, why="few channels"), Rule(match=["*"], settings={"gradient": "ste"})]
    rows = quantize_(model, find("xnor")(), rules)
    assert [(r.layer, r.becomes) for r in rows] == [("0", "kept"), ("2", "BinaryConv2d"), ("5", "BinaryLinear")]
    assert rows[0].why == "few channels"
    assert all(layer.settings.gradient == "ste" for layer in quantized_layers(model).values())  # type: ignore[attr-defined]


@pytest.mark.parametrize("pattern", ["2", "Conv2d", "[2]"])
def test_a_rule_matches_by_name_class_or_pattern(pattern: str) -> None:
    rows = quantize_(network(), find("xnor")(), [Rule(match=[pattern], keep=True)])
    assert next(r for r in rows if r.layer == "2").becomes == "kept"


def test_a_word_is_one_pattern() -> None:
    rows = quantize_(network(), find("xnor")(), [Rule(match="first", keep=True), Rule(match="Linear", keep=True)])
    assert [(r.layer, r.why) for r in rows if r.becomes == "kept"] == [("0", "rule first"), ("5", "rule Linear")]
    with pytest.raises(ValueError, match=r"rule \['frist'\] matches no layer"):
        quantize_(network(), find("xnor")(), [Rule(match="frist", keep=True)])


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 3, 3), nn.Linear(2, 2)])
def test_a_bare_layer_is_refused(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match=rf"bare {type(layer).__name__} cannot be replaced in place; .*nn\.Sequential"):
        quantize_(layer, find("xnor")())


def test_a_rule_that_matches_nothing_is_an_error_unless_optional() -> None:
    with pytest.raises(ValueError, match=r"matches no layer.*Layers: 0, 2, 5"):
        quantize_(network(), find("xnor")(), [Rule(match=["conv9"], keep=True)])
    quantize_(network(), find("xnor")(), [Rule(match=["conv9"], keep=True, optional=True)])


def test_a_rule_that_says_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="says nothing"):
        quantize_(network(), find("xnor")(), [Rule(match=["first"])])


def test_a_module_under_two_names_is_replaced_in_both_places() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    rows = quantize_(model, find("xnor")())
    assert len(rows) == 1
    assert model["a"] is model["b"][0]  # type: ignore[index]
    assert isinstance(model["a"], QuantizedLayer)


def test_a_subclass_of_a_handled_layer_is_left_alone() -> None:
    """Attention hands its projections' weights to a function of its own; rewriting the layer would change nothing there."""
    rows = quantize_(nn.MultiheadAttention(8, 2), find("xnor")())
    assert [(r.becomes, r.kind) for r in rows] == [("kept", "NonDynamicallyQuantizableLinear")]


def test_the_replaced_layer_keeps_name_parameters_and_mode() -> None:
    model = network().eval()
    weight = model[2].weight
    quantize_(model, find("xnor")())
    assert torch.equal(model[2].weight, weight)  # type: ignore[arg-type]
    assert not any(m.training for m in model.modules())
    assert "2.weight" in model.state_dict()


class Recorder(QuantizedLayer, nn.Identity):
    """Remembers what it was calibrated with."""

    precision = Precision(weight=4)

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale, self.seen = scale, 0.0

    def calibrate_(self, x: Tensor) -> None:
        self.seen = float(x.max())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale

    def health(self, x: Tensor) -> dict[str, float]:
        return {"clip_ratio": float((x > 1).float().mean())}


def test_calibration_shows_every_layer_the_input_it_will_really_see() -> None:
    model = nn.Sequential(Recorder(2.0), Recorder(3.0), Recorder(1.0))
    calibrate_(model, torch.ones(1, 1))
    assert [layer.seen for layer in model] == [1.0, 2.0, 6.0]
    assert health(model, torch.ones(1, 1)) == {
        "0": {"clip_ratio": 0.0},
        "1": {"clip_ratio": 1.0},
        "2": {"clip_ratio": 1.0},
    }
    assert not any(m._forward_pre_hooks for m in model.modules())


class Twice(nn.Module):
    """Calls a layer with a signed input, then with one that is not; and never calls another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.idle = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(torch.relu(self.layer(x)))
        return nn.functional.linear(y.mean((2, 3)), self.idle.weight)


def test_a_layer_called_twice_is_calibrated_by_its_first_input() -> None:
    model = Twice()
    quantize_(model, find("lsq")(weight_bits=8, act_bits=8), [Rule(match=["idle"], keep=True)])
    calibrate_(model, torch.randn(4, 4, 6, 6))
    assert int(model.layer.act_quantizer.qn) == 128


def test_a_layer_that_is_never_called_is_not_taken_for_quantized() -> None:
    model = Twice()
    quantize_(model, find("lsq")(), [])
    with pytest.raises(ValueError, match=r"^idle: not called in a forward pass .* by a rule with keep: true"):
        calibrate_(model, torch.randn(4, 4, 6, 6))


def test_layers_that_are_calibrated_stay_as_they_are() -> None:
    model = network()
    quantize_(model, find("lsq")(), [])
    calibrate_(model, torch.rand(2, 1, 6, 6))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibrate_(model, 3 * torch.rand(2, 1, 6, 6), done=["0", "2"])
    after = model.state_dict()
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"5"}


def test_a_rule_for_a_part_of_the_network_says_how_to_name_its_layers() -> None:
    model = nn.Sequential()
    model.add_module("layer1", nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    with pytest.raises(ValueError, match=r"matches no layer. Did you mean layer1\.\*\?"):
        quantize_(model, find("xnor")(), [Rule(match=["layer1"], keep=True)])
