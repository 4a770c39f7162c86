"""`bench model`: what it measures, what it writes, and how it refuses."""

import csv
import json
from pathlib import Path

import pytest
import torch

from runner.bench import bench
from runner.bench.footprint import footprint
from runner.bench.model import plan_of
from runner.faults import ConfigError, MissingInput

SMALL = ["model=lenet5", "dataset=digits", "n=1", "batch=1,2", "memory=false"]


def test_a_network_is_measured_layer_by_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    try:
        assert bench(["model", *SMALL, f"outputs={tmp_path}"]) == 0
    finally:
        torch.set_num_threads(before)
    stem = tmp_path / "bench" / "model-lenet5-xnor-threads1"
    stored = json.loads(stem.with_suffix(".json").read_text())
    assert [race["batch"] for race in stored["races"]] == [1, 2]
    for race in stored["races"]:
        assert race["speedup"]["median"] == pytest.approx(race["float_ms"] / race["packed_ms"])  # one turn
    assert stored["largest_difference"] < 1e-4
    whole = list(csv.DictReader(stem.with_suffix(".csv").open()))
    assert [float(row["times float32"]) for row in whole] == [
        round(race["speedup"]["median"], 2) for race in stored["races"]
    ]
    layers = list(csv.DictReader(stem.with_name(f"{stem.name}-layers.csv").open()))
    assert [row["kind"] for row in layers if row["kind"].startswith("sign_")] == ["sign_conv2d", "sign_linear"]
    assert all(float(row["packed, us"]) > 0 for row in layers)
    page, shown = stem.with_suffix(".html").read_text(), capsys.readouterr().out
    for sentence in stored["story"]:
        assert sentence in shown
    assert page.count('class="plot"') == 2


def test_memory_is_what_the_bits_need() -> None:
    """A float network is its own packed form, and double is twice that."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    found = footprint("a", model, torch.zeros(1, 3, 2, 2), None)
    assert (found.double, found.float32, found.packed) == (8 * 65, 4 * 65, 4 * 65)
    assert found.over_float == 1
    assert found.over_double == 2


def test_wrong_words_are_named_together() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(["n=0", "batch=1,x", "memory=no"])
    assert all(part in str(caught.value) for part in ("n: '0'", "batch: '1,x'", "memory: 'no'"))


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="no such file"):
        plan_of([f"checkpoint={tmp_path / 'nothing'}"])


def test_without_a_network_it_is_the_usual_one() -> None:
    usual, nin = plan_of([]).config, plan_of(["model=nin"]).config
    assert usual is not None
    assert nin is not None
    assert (usual.model.name, usual.quant.name, usual.dataset.name) == ("resnet18", "xnor", "synthetic")
    assert (nin.model.name, nin.quant.name, nin.dataset.name) == ("nin", "xnor", "synthetic")
