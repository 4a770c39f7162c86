"""`bench step`: who takes part, what is written, and whether the figures are those of the steps that a run takes."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from browser import Browser
from conftest import Runner

from quant.saved import saved_bytes_per_sample
from runner.bench.step import COMPILED, plan_of
from runner.bench.step_contest import Row, Step, measure, peak_on_cpu
from runner.bench.step_report import report
from runner.build import build
from runner.cli import run
from runner.compose import config_from
from runner.faults import ConfigError

TINY = ("model=lenet5", "dataset=digits", "batch=8", "n=2")


def names(*words: str) -> list[str]:
    return [contender.name for contender in plan_of(words).contenders]


def test_by_default_every_quantizer_takes_part_as_it_ships() -> None:
    found = names()
    assert found[0] == "float32"
    assert {"xnor", "bwn", "lsq", "8bit-rangebn", "actgrad", "dorefa", "ternary"} <= set(found)
    assert "actgrad bits=2 norm=quantized" in found
    assert ("lsq compile=true" in found) == any(map(shutil.which, ("g++", "clang++")))
    config = plan_of([]).contenders[0].config
    assert (config.model.name, config.data_regime.phases[0].batch_size, config.trainer.threads) == ("resnet18", 64, 1)


def test_commas_make_combinations_and_variants_are_rows_of_their_own() -> None:
    assert names(*TINY, "quant=lsq,xnor", "trainer.ema=null,0.9") == [
        "float32", "lsq ema=null", "lsq ema=0.9", "xnor ema=null", "xnor ema=0.9"
    ]  # fmt: skip
    assert names(*TINY, "variant=quant=xnor seed=1", "variant=quant=none trainer.amp=bf16") == [
        "seed=1", "xnor seed=1", "float32", "float32 amp=bf16"
    ]  # fmt: skip
    (plain, _) = plan_of([*TINY, "quant=xnor", "trainer.amp=bf16", "base=trainer.amp=bf16"]).contenders
    assert plain.config.trainer.amp == "bf16"
    rows = plan_of([*TINY, "trainer.amp=bf16", "variant=quant=xnor", "variant=quant=lsq trainer.amp=none"]).contenders
    assert [(row.name, row.config.trainer.amp) for row in rows] == [
        ("float32", "none"), ("xnor", "bf16"), ("lsq amp=none", "none")
    ]  # fmt: skip
    assert plan_of([*TINY, "quant=xnor", "trainer.amp=bf16"]).contenders[0].config.trainer.amp == "none"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quant=lqs"], "Did you mean 'lsq'"),
        (["variant=quant=lsq quant.weight_bit=2"], "quant.weight_bit"),
        (["quant=lsq", "n=0"], "n: '0'"),
        (["quant=lsq", "threads=1,2"], "trainer.threads: must be the same for all"),
        (["quant=lsq", "base=trainer.amp=fp8"], "trainer.amp"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_measured(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of([*TINY, *words])


def test_a_fault_is_answered_without_torch(runner: Runner, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    answer = runner("bench", "step", "quant=lqs")
    assert (answer.returncode, "Did you mean 'lsq'" in answer.stderr) == (78, True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("outputs")
    words = [*TINY, "quant=lsq", "variant=quant=actgrad quant.bits=2", f"outputs={outputs}"]
    assert run(["bench", "step", *words]) == 0
    return outputs / "bench"


def test_csv_json_and_page_hold_the_same_rows(folder: Path) -> None:
    rows = list(csv.DictReader((folder / "step-lenet5-8-cpu.csv").open(encoding="utf-8")))
    record = json.loads((folder / "step-lenet5-8-cpu.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in rows] == ["float32", "lsq", "actgrad bits=2"] == [r["name"] for r in record["rows"]]
    assert set(record["facts"]) >= {"torch", "threads", "cpu", "device", "batch", "model"}
    for row in rows:
        assert float(row["time"]) > 0 < float(row["cpu"])
        assert float(row["time_low"]) <= float(row["time"]) <= float(row["time_high"])
    plain, _, coded = rows
    assert (float(plain["time"]), float(plain["saved"]), float(plain["peak"])) == (1, 1, 1)
    assert float(coded["saved"]) == int(coded["saved_bytes"]) / int(plain["saved_bytes"]) < 0.4
    page = (folder / "step-lenet5-8-cpu.html").read_text(encoding="utf-8")
    assert "actgrad bits=2" in page
    assert "not measured here" in page.lower()
    assert all(peer["source"] in page for peer in record["literature"]["rows"])


def test_the_page_draws_itself_and_asks_for_nothing(browser: Browser, folder: Path) -> None:
    browser.open(folder / "step-lenet5-8-cpu.html")
    assert browser.complaints() == []
    assert len(browser.requests()) == 1
    assert browser.ask("[...document.querySelectorAll('.plot')].every(plot => plot.childElementCount > 0)")
    browser.ask("document.querySelector('.plot').dispatchEvent(new MouseEvent('dblclick', {bubbles: true}))")
    assert browser.complaints() == []


def test_a_measured_step_trains_and_saved_bytes_are_those_of_the_model() -> None:
    config = config_from(["model=lenet5", "dataset=digits", "quant=xnor", "batch_size=8"])
    model = build(config, in_channels=1, num_classes=10, image_size=28).model
    images, labels = torch.randn(8, 1, 28, 28), torch.arange(8)
    step = Step(config, torch.device("cpu"), model, images, labels)
    before = [parameter.clone() for parameter in model.parameters()]
    step.take()
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert step.saved_bytes() == round(8 * saved_bytes_per_sample(model, images, labels))


def test_the_peak_of_a_call_is_what_it_holds_at_once() -> None:
    def half_and_half() -> None:
        kept = torch.ones(2**20, dtype=torch.uint8)
        for _ in range(3):
            torch.ones(2**22, dtype=torch.uint8)
        del kept

    assert peak_on_cpu(half_and_half) == 2**20 + 2**22
    assert peak_on_cpu(lambda: None) == 0


def test_the_compiled_rows_name_real_settings() -> None:
    assert [c.config.trainer.compile for c in plan_of([f"variant={row}" for row in COMPILED]).contenders[1:]] == [
        True,
        True,
    ]


def test_ratios_are_taken_to_the_named_base(tmp_path: Path) -> None:
    plan = plan_of(["model=lenet5", "dataset=digits", "batch=4,8", "n=1", "quant=lsq", f"outputs={tmp_path}"])
    rows, facts = measure(plan)
    by_name: dict[str, Row] = {row.name: row for row in rows}
    assert by_name["lsq batch_size=8"].against == "batch_size=8"
    assert by_name["batch_size=8"].saved_bytes > by_name["batch_size=4"].saved_bytes
    report(plan, (rows, facts), ["bench", "step"])
