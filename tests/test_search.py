"""Searches: the space of every file is real, trials are told exactly once whatever is killed, and the front is drawn."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from runner.compose import config_from
from runner.faults import ConfigError
from runner.pages.search import write_search_page
from runner.sweeps.search_options import Options, options_of
from runner.sweeps.search_space import Search, _written, chosen, read_search, searches, words_of
from tests.conftest import ROOT
from tests.torture.commands import finished, start
from tests.torture.forks import tail
from tests.torture.scenarios import BASE

optuna = pytest.importorskip("optuna", reason="needs the extra 'search'")

from runner.sweeps.search_loop import Running, Study, _report, measured  # noqa: E402  (needs optuna)

SPACE: dict[str, Any] = {
    "words": [*BASE[: BASE.index("--config-dir")], "quant=lsq", "epochs=2", "dataset.samples=40"],
    "space": {"lr": {"from": 1e-4, "to": 1e-1, "log": True}, "seed": {"from": 0, "to": 5}},
    "rules": [{"match": "3", "weight_bits": {"choices": [2, 4, 8]}, "act_bits": 4}],
    "objectives": {"best_val_top1": "maximize", "weight_bits": "minimize"},
    "trials": 3,
}
DIRS = ["--config-dir", BASE[BASE.index("--config-dir") + 1]]


def own(place: Path, **changes: Any) -> list[str]:
    """The words of a search in a folder of its own."""
    (place / "conf" / "sweep").mkdir(parents=True, exist_ok=True)
    (place / "conf" / "sweep" / "mine.yaml").write_text(yaml.safe_dump(SPACE | changes))
    return ["search", "sweep=mine", "--config-dir", str(place / "conf"), *DIRS]


def trials(place: Path) -> list[dict[str, str]]:
    (table,) = place.glob("outputs/searches/*/trials.csv")
    return list(csv.DictReader(table.open(encoding="utf-8")))


@pytest.mark.parametrize("name", sorted(searches()))
def test_a_search_of_ours_takes_two_steps_of_a_trial(name: str, tmp_path: Path) -> None:
    trial = ["search.trials=1", "trainer.max_steps=2", "dataset.limit=64", "batch_size=8", "trainer.threads=1"]
    process = start(["search", f"sweep={name}", *trial], tmp_path / "run")
    assert finished(process) == 0, tail(tmp_path / "run")
    (row,) = trials(tmp_path / "run")
    assert row["state"] == "complete"
    assert (tmp_path / "run" / "outputs" / "runs" / row["run"] / "summary.json").is_file()
    text = searches()[name].read_text(encoding="utf-8")
    assert f"python -m runner search sweep={name}" in text


def test_a_killed_search_ends_with_as_many_trials_as_were_asked_for(tmp_path: Path) -> None:
    place = tmp_path / "run"
    words = own(tmp_path)
    killed = start([*words, "search.workers=2"], place)
    deadline = time.monotonic() + 120
    while not list(place.glob("outputs/runs/*/metrics.csv")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    finished(killed)
    along = [start(words, place), start(words, place)]  # two at once on one study
    assert [finished(one) for one in along] == [0, 0], tail(place)
    rows = trials(place)
    assert [row["trial"] for row in rows] == ["0", "1", "2"]
    assert {row["state"] for row in rows} == {"complete"}
    assert any(row["best"] == "True" for row in rows)
    for row in rows:
        config = yaml.safe_load((place / "outputs" / "runs" / row["run"] / "config.yaml").read_text())
        first = config["quant"]["rules"][0]
        assert (first["match"], first["weight_bits"]) == ("3", int(row["rules.3.weight_bits"]))
        assert config["seed"] == int(row["seed"])
        assert measured(place / "outputs" / "runs" / row["run"], "weight_bits") == float(row["weight_bits"])
    page = next(place.glob("outputs/searches/*/search.html")).read_text()
    assert "front-weight_bits" in page
    assert "2 trials" not in page.partition("</header>")[0]


def test_the_axis_of_a_learning_rate_has_round_values_along_it(tmp_path: Path) -> None:
    facts = {"name": "rates", "objectives": ["best_val_top1"], "dimensions": ["lr"]}
    (tmp_path / "search.json").write_text(json.dumps(facts))
    rows = [
        f"{trial},complete,{trial == 2},{90 + trial},{lr},r{trial}," for trial, lr in enumerate((0.001, 0.02, 0.05))
    ]
    (tmp_path / "trials.csv").write_text("\n".join(["trial,state,best,best_val_top1,lr,run,reason", *rows]) + "\n")
    page = write_search_page(tmp_path).read_text()
    figures = page.partition('id="figures">')[2].partition("</script>")[0]
    assert '"ticks":[0.001,0.003,0.01,0.03]' in figures


def study(tmp_path: Path, **changes: Any) -> Study:
    search = Search.model_validate(SPACE | {"rules": [], "space": {"lr": {"from": 0.1, "to": 0.2}}} | changes)
    options = Options("unit", search, [], [], root=tmp_path)
    options.folder.mkdir(parents=True)
    return Study.open(options)


def test_a_trial_that_is_worse_than_the_others_is_stopped(tmp_path: Path) -> None:
    pruner = {"after_trials": 2, "after_epochs": 1}
    known = study(tmp_path, objectives={"best_val_top1": "maximize"}, pruner=pruner, trials=9)
    for reached in (90.0, 91.0):
        good, _ = known.next() or pytest.fail("no trial")
        for epoch in range(4):
            good.report(reached, epoch)
        known.study.tell(good, reached)
    bad, claim = known.next() or pytest.fail("no trial")
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    one = Running(bad, claim, [], tmp_path, process, None)
    (tmp_path / "metrics.csv").write_text("epoch,best_val_top1\n0,10.0\n")
    _report(one, known)
    assert not one.pruned, "before `after_epochs` nothing is"
    (tmp_path / "metrics.csv").write_text("epoch,best_val_top1\n0,10.0\n1,11.0\n2,12.0\n")
    _report(one, known)
    assert one.pruned
    assert process.wait(timeout=10) == -signal.SIGTERM


def test_a_search_that_was_stopped_chooses_as_one_that_was_not(tmp_path: Path) -> None:
    def values(place: Path, stops: bool) -> list[float]:
        known, found = study(place, trials=14), []  # the first ten are chosen at random
        for number in range(20):
            if stops and number in (3, 12):
                known = Study.open(known.options)
            if (asked := known.next()) is None:
                break
            trial, _ = asked
            found.append(float(str(chosen(known.options.search, trial)["lr"])))
            known.study.tell(trial, [found[-1], 1.0])
        return found

    (tmp_path / "a").mkdir()
    assert len(values(tmp_path / "a", stops=False)) == 14
    assert values(tmp_path / "b", stops=True) == values(tmp_path / "c", stops=False)


def test_a_value_is_written_as_overrides_read_it() -> None:
    search = Search.model_validate(SPACE | {"rules": []})
    values = {"lr": 1e-05, "seed": 3}
    config = config_from(words_of(search, values, ["dataset.samples=48"], DIRS[1:]), DIRS[1:])
    assert config.seed == 3
    assert _written({"a": None, "b": [True, 2, 1e-05, "x y"]}) == "{a: null, b: [true, 2, 1e-05, 'x y']}"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"space": {"lr": {"from": 2, "to": 1}}}, "larger"),
        ({"space": {"lr": {"from": 0, "to": 1, "log": True}}}, "above 0"),
        ({"space": {"seed": {"from": 0, "to": 4, "step": 0}}}, "step"),
        ({"objectives": {"test_top1": "maximize"}}, "test_top1"),
        ({"pruner": {}}, "only objective"),
        ({"trails": 3}, "trails"),
        ({"rules": ["conv1"]}, "cannot be read"),
    ],
)
def test_a_file_that_means_nothing_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    own(tmp_path, **change)
    with pytest.raises(ConfigError, match=said):
        read_search("mine", [str(tmp_path / "conf")])


def test_a_file_of_other_bytes_is_refused(tmp_path: Path) -> None:
    own(tmp_path)
    (tmp_path / "conf/sweep/mine.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_search("mine", [str(tmp_path / "conf")])


@pytest.mark.parametrize("said", ["outputs=my", "outputs='my'", "++outputs=my"])
def test_a_search_lies_beside_its_runs(said: str) -> None:
    assert options_of(["sweep=lenet5_lr", said]).folder.parent == Path("my/searches")


@pytest.mark.parametrize(
    "words", [[], ["sweep=lenet5_lrr"], ["sweep=lenet5_lr", "search.trials=0"], ["sweep=lenet5_lr", "x"]]
)
def test_words_that_mean_nothing_are_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError):
        options_of(words)


def test_a_missing_optuna_names_its_extra() -> None:
    code = (
        "import sys; sys.modules['optuna'] = None; from runner.sweeps.search import search; search(['sweep=lenet5_lr'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ".[search]" in done.stderr


def test_the_figures_of_a_run_are_read_from_its_files(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"packed_bytes": 12}))
    (tmp_path / "layers.csv").write_text("layer,weight_bits,parameters\na,2,30\nb,8,10\n")
    assert measured(tmp_path, "packed_bytes") == 12
    assert measured(tmp_path, "weight_bits") == 3.5
