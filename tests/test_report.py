"""The results table: grouping, spread, paired differences, the round trip through CSV."""

import json
from pathlib import Path

import pytest

from runner.faults import ConfigError
from runner.pages.report import as_csv, as_markdown, collect, report


def make(root: Path, quant: str, seed: int, top1: float, *words: str) -> None:
    folder = root / "runs" / f"{quant}-{seed}-{len(words)}"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("epoch\n0\n")
    environment = {"cpu": "c", "threads": 1, "torch": "2", "code": "abc"}
    summary = {
        "model": "lenet5", "dataset": "mnist", "quant": quant, "seed": seed, "epochs": 10, "test_top1": top1,
        "best_val_top1": top1,
        "train_seconds": 20.0,
        "images_per_s": 1000.0, "saved_bytes_per_sample": 2048, "peak_memory_bytes": 3 * 2**20, "float_bytes": 4096,
        "packed_bytes": 1024, "environment": environment,
        "command": ["python", "-m", "runner", f"quant={quant}", f"seed={seed}", "outputs=/secret/place", *words],
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    for seed, (plain, low) in enumerate([(99.0, 98.0), (99.2, 98.4), (99.4, 98.2)]):
        make(tmp_path, "none", seed, plain)
        make(tmp_path, "lsq", seed, low, "quant.act_bits=2")
    make(tmp_path, "lsq", 0, 97.0)
    return tmp_path


def test_configurations_are_grouped_over_seeds_and_compared_with_float_by_seed(outputs: Path) -> None:
    lines = as_markdown(collect([outputs])).splitlines()
    assert len(lines) == 2 + 3
    assert "| none | 10 | 3 | 99.20 ± 0.20 |" in lines[2]
    assert "| lsq | 10 | 1 | 97.00 (one run) | -2.00 |" in lines[3]
    # differences -1.0, -0.8, -1.2: mean -1, deviation 0.2, t(0.975, 2) = 4.303
    assert "| lsq quant.act_bits=2 | 10 | 3 | 98.20 ± 0.20 | -1.00 [-1.50, -0.50] | 2.0 | 3 | 1 | 2.0 |" in lines[4]


def test_rows_survive_a_csv_and_name_no_place(outputs: Path, tmp_path: Path) -> None:
    rows = collect([outputs])
    path = tmp_path / "rows.csv"
    path.write_text(as_csv(rows))
    assert "secret" not in path.read_text()
    assert as_markdown(collect([path])) == as_markdown(rows)


def test_an_unfinished_run_is_left_out(outputs: Path) -> None:
    before = as_markdown(collect([outputs]))
    (outputs / "runs" / "broken").mkdir()
    (outputs / "runs" / "broken" / "metrics.csv").write_text("epoch\n")
    (outputs / "runs" / "torn").mkdir()
    (outputs / "runs" / "torn" / "metrics.csv").write_text("epoch\n")
    (outputs / "runs" / "torn" / "summary.json").write_text('{"model": "len')
    assert as_markdown(collect([outputs])) == before


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not there"):
        report([str(tmp_path / "nowhere")])
    with pytest.raises(ConfigError, match="no finished run"):
        report([str(tmp_path)])
    with pytest.raises(ConfigError, match="not accepted: md, html, latex, csv"):
        report(["--format", "doc"])
