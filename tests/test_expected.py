"""The course that is expected of a run: made from finished runs, drawn behind the accuracy of a new one."""

import json
from pathlib import Path

import pandas as pd
import pytest
from bokeh.models import VArea
from bokeh.models.renderers.glyph_renderer import GlyphRenderer
from run_samples import LENET, make_run

from runner.cli import run
from runner.columns import EXPECTED
from runner.pages.curves import curve_section
from runner.pages.records import read_run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for seed in range(3):
        make_run(tmp_path / "runs" / f"r{seed}", epochs=5, layers=LENET, drops=(3,), seed=seed)
    return tmp_path / "runs"


def curve(runs: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert run(["report", str(runs), "--format", "curve"]) == 0
    return capsys.readouterr().out


def test_a_curve_is_mean_and_band_epoch_by_epoch(
    runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "curve.csv").write_text(curve(runs, capsys))
    table = pd.read_csv(tmp_path / "curve.csv")
    assert tuple(table.columns) == EXPECTED
    reached = pd.concat([read_run(folder).metrics["val_top1"] for folder in sorted(runs.iterdir())], axis=1)
    assert table["epoch"].tolist() == list(range(5))
    assert table["val_top1"].tolist() == pytest.approx(reached.mean(axis=1).tolist(), abs=1e-3)
    assert (table["n"] == 3).all()
    assert (table["low"] < table["val_top1"]).all()
    assert (table["high"] > table["val_top1"]).all()
    assert table["high"].max() <= 100


def test_one_run_and_runs_of_two_kinds_make_no_curve(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(runs / "r0"), "--format", "curve"]) == 78
    assert "at least two runs" in capsys.readouterr().err
    make_run(runs / "other", epochs=4, layers=LENET, drops=(3,))
    assert run(["report", str(runs), "--format", "curve"]) == 78
    assert "runs of one configuration" in capsys.readouterr().err


def test_the_band_lies_behind_the_accuracy_as_far_as_the_run_has_come(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = curve(runs, capsys)
    folder = make_run(runs / "new", epochs=2, layers=LENET, drops=(1,), seed=9)
    (folder / "expected.csv").write_text(made)
    html, sheet = curve_section(read_run(folder))
    assert "of the recipe, n = 3" in html
    sheet.draw()
    drawn = [model for model in sheet.document.models if isinstance(model, GlyphRenderer)]
    (source,) = [renderer.data_source for renderer in drawn if isinstance(renderer.glyph, VArea)]
    assert list(source.data["x"]) == [1, 2]
    assert list(source.data["x_step"]) == read_run(folder).metrics["step"].tolist()
    assert list(source.data["low"]) == [float(line.split(",")[2]) for line in made.splitlines()[1:3]]


@pytest.mark.parametrize("content", ["", "epoch,val_top1,low,high,n\n", "epoch,val_top1\n0,1\n", "\0\0", "x" * 1000])
def test_without_a_curve_that_can_be_read_there_is_no_band(content: str, runs: Path) -> None:
    (runs / "r0" / "expected.csv").write_text(content)
    html, _ = curve_section(read_run(runs / "r0"))
    assert "of the recipe" not in html
    assert json.loads((runs / "r0" / "summary.json").read_text())
