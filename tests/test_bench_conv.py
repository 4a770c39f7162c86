"""`bench conv`: the formula of the paper, its options, what it writes, and that its sentences follow from the numbers."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quant import kernels
from runner.bench import bench
from runner.bench.conv import CHANNELS, FILTERS, Shape, formula, plan_of, shapes_of
from runner.bench.conv_contest import Row
from runner.bench.conv_report import as_csv, sentences
from runner.bench.peers import peers
from runner.faults import ConfigError

PAPER = {  # (input channels, filter): arXiv 1603.05279, section 3.3, recomputed
    (1, 3): 7.89, (3, 3): 18.99, (32, 3): 52.36, (256, 3): 62.27, (1024, 3): 63.56, (256, 1): 51.20, (256, 20): 63.96,
    (20, 1): 15.24, (20, 5): 56.74, (20, 8): 60.95,
}  # fmt: skip


@pytest.mark.parametrize(("shape", "speedup"), PAPER.items())
def test_formula_of_the_paper(shape: tuple[int, int], speedup: float) -> None:
    assert formula(*shape) == pytest.approx(speedup, abs=0.005)


def test_every_figure_has_its_shapes() -> None:
    shapes = shapes_of(plan_of([]))
    assert [s.in_channels for s in shapes if s.figure == "channels"] == list(CHANNELS) == [2**i for i in range(11)]
    assert [s.kernel for s in shapes if s.figure == "filter"] == list(FILTERS) == list(range(1, 21))
    lenet = {(s.out_channels, s.kernel) for s in shapes if s.figure == "lenet5"}
    assert lenet == {(o, k) for o in (10, 30, 50, 128, 512, 1024) for k in range(1, 9)}


@pytest.mark.parametrize("kernel", [1, 2, 3, 8])
@pytest.mark.parametrize("padding", [0, 1, 4])
def test_products_inside_the_image_are_counted(kernel: int, padding: int) -> None:
    shape = Shape("", 3, 5, 9, kernel, padding, batch=2)
    ones, weight = torch.ones(2, 3, 9, 9), torch.ones(5, 3, kernel, kernel)
    assert shape.macs_inside == torch.nn.functional.conv2d(ones, weight, padding=padding).sum()
    assert shape.macs_inside <= shape.macs


def test_wrong_options_are_named_together() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(["thread=1", "n=0", "path=mmx", "quick=yes"])
    message = str(caught.value)
    for part in ("thread", "Did you mean 'threads'?", "n: '0'", "'mmx'", "give true or false"):
        assert part in message


@pytest.mark.skipif(kernels.why_not() is not None, reason="needs the packed kernels")
def test_a_quick_run_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    try:
        assert bench(["conv", "quick=true", "peers=true", f"outputs={tmp_path}"]) == 0
    finally:
        torch.set_num_threads(before)
    folder = tmp_path / "bench"
    stored = json.loads((folder / "conv-batch1-threads1.json").read_text())
    rows = list(csv.DictReader((folder / "conv-batch1-threads1.csv").open()))
    assert {row["figure"] for row in rows} == {"channels", "filter", "lenet5"}
    assert len(rows) == len(stored["rows"]) == 5
    for row in stored["rows"]:
        assert row["kernel_us"] > 0
        assert row["kernel_speedup"] == pytest.approx(row["torch_us"] / row["kernel_us"])  # one turn
        assert row["machine"] == pytest.approx(
            formula(row["in_channels"], row["kernel"], stored["facts"]["limit_ratio"])
        )
    assert stored["command"][:5] == ["python", "-m", "runner", "bench", "conv"]
    page, shown = (folder / "conv-batch1-threads1.html").read_text(), capsys.readouterr().out
    for sentence in stored["story"]:
        assert sentence in shown
    assert "62.27" in page
    assert "Other packed kernels" in page
    assert page.count('class="plot"') == 3


ROW = Row(
    figure="quoted", in_channels=256, out_channels=256, size=14, kernel=3, batch=1, layout="channels_last", path="avx512",
    macs=115605504, paper=62.27, machine=20.0, torch_us=1000.0, best_float="onnxruntime", best_float_us=800.0, kernel_us=50.0,
    call_us=55.0, alpha_us=60.0, alpha_k_us=80.0, torch_rate=100.0, kernel_rate=2000.0, limit_rate=2500.0, share_of_limit=0.9,
    share_inside=0.8, kernel_speedup=20.5, kernel_low=20.0, kernel_high=21.0, call_speedup=18.5, alpha_speedup=17.5,
    alpha_low=17.0, alpha_high=18.0, alpha_k_speedup=12.5, kernel_over_best=16.5, alpha_over_best=13.5,
)  # fmt: skip


def test_sentences_are_made_of_the_numbers() -> None:
    facts = {"sign_limit": 2500.0, "float_limit": 125.0, "limit_ratio": 20.0}
    few, many = (
        replace(ROW, figure="channels", in_channels=1, kernel_speedup=0.7),
        replace(ROW, figure="channels", in_channels=512),
    )
    story = " ".join(sentences([few, replace(ROW, figure="channels"), many, ROW], facts))
    for figure in (
        "20.0 times as many, not 64",
        "62.27",
        "20.5",
        "18.5",
        "17.5",
        "12.5",
        "90%",
        "80%",
        "16.5",
        "13.5",
        "0.7",
    ):
        assert figure in story
    other = " ".join(sentences([replace(ROW, path="portable")], facts | {"limit_ratio": 3.0}))
    assert "3.0 times as many" in other
    assert "512 signs" not in other


def test_csv_keeps_five_digits() -> None:
    head, line = as_csv([replace(ROW, torch_us=1234.5678)]).splitlines()
    assert dict(zip(head.split(","), line.split(","), strict=True))["torch_us"] == "1234.6"


def test_a_missing_peer_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(__import__("sys").modules, "bnn", None)
    found = peers(1, 1)
    assert [row["name"] for row in found] == ["bnn-lab", "larq-compute-engine"]
    assert all("not installed (pip install" in row["note"] for row in found)
