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
