"""The results table: grouping, spread, paired differences, the round trip through CSV."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from browser import Browser

from runner.faults import ConfigError
from runner.pages.report import as_markdown, report
from runner.pages.report_pages import with_tables
from runner.pages.report_parts import make_report
from runner.pages.report_pictures import pareto
from runner.pages.results import as_csv, collect, groups_of
from runner.pages.svg import Chart, Series


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


def test_a_difference_is_to_float_that_was_trained_alike_or_else_to_float_as_it_is() -> None:
    def rows(quant: str, settings: str, reached: float) -> list[dict[str, object]]:
        common = {"model": "lenet5", "dataset": "digits", "epochs": 2, "quant": quant, "settings": settings}
        return [common | {"seed": seed, "test_top1": reached + seed} for seed in range(3)]

    runs = [
        *rows("none", "", 90.0),
        *rows("none", "trainer.ema=0.9", 95.0),
        *rows("xnor", "quant.tau=0.9 trainer.ema=0.9", 94.0),
        *rows("xnor", "quant.tau=0.9 lr=0.1", 89.0),
    ]

    def gaps(some: list[dict[str, object]]) -> list[float | None]:
        return [gap and gap.mean for gap in (group.difference() for group in groups_of(some))]

    assert gaps(runs) == [None, 5.0, -1.0, -1.0]
    assert gaps(runs[3:]) == [None, -1.0, -6.0]  # the only float runs
    assert gaps([*runs[3:], *rows("none", "trainer.ema=0.5", 90.0)]) == [None, -1.0, None, None]


def test_what_is_set_of_the_model_makes_another_network(tmp_path: Path) -> None:
    for depth, plain in (("model.depth=20", 92.0), ("+model.depth=56", 94.0)):
        make(tmp_path / depth, "none", 0, plain, depth)
        make(tmp_path / depth, "xnor", 0, plain - 10, "quant.tau=0.9", depth)
    folders = sorted(tmp_path.iterdir())
    lines = as_markdown(collect(folders)).splitlines()
    assert [line.split(" | ")[:3] for line in lines[2:]] == [
        ["| lenet5 depth=20", "mnist", "none"], ["| lenet5 depth=20", "mnist", "xnor quant.tau=0.9"],
        ["| lenet5 depth=56", "mnist", "none"], ["| lenet5 depth=56", "mnist", "xnor quant.tau=0.9"],
    ]  # fmt: skip
    assert [str(group.difference()) for group in groups_of(collect(folders))] == ["None", "-10.00"] * 2
    report, _ = make_report(folders)
    assert "lenet5-depth-20-mnist-10-packed" in {picture.name for picture in report.pictures}


def test_a_config_with_a_name_of_its_own_is_not_the_method_that_it_sets(tmp_path: Path) -> None:
    make(tmp_path, "xnor", 0, 99.0)
    make(tmp_path, "xnor", 0, 98.0, "quant=bwn")
    assert [(row["quant"], row["settings"], row["test_top1"]) for row in collect([tmp_path])] == [
        ("bwn", "", 98.0),
        ("xnor", "", 99.0),
    ]


def test_networks_and_data_go_by_the_config_that_was_chosen(tmp_path: Path) -> None:
    own = [["--config-dir", "my", "model=wide"], ["--config-dir=my", "model=wide"], ["model=lenet5", "curve=x.csv"], []]
    for seed, words in enumerate(own):
        make(tmp_path / "a", "none", seed, 90.0, *words, *["trainer.recompute=blocks"] * (seed == 3))
    for seed, root in enumerate(("/data/cats", "/data/x-ray", "/elsewhere/cats/")):
        make(tmp_path / "b", "none", seed, 50.0, "dataset=folder", f"dataset.root={root}")
    groups = groups_of(collect([tmp_path]))
    assert [(g.network, g.dataset, g.settings, len(g.rows)) for g in groups] == [
        ("lenet5", "cats", "", 1), ("lenet5", "cats (2)", "", 1), ("lenet5", "mnist", "", 1),
        ("lenet5", "mnist", "trainer.recompute=blocks", 1), ("wide", "mnist", "", 2), ("lenet5", "x-ray", "", 1),
    ]  # fmt: skip
    assert "/data" not in as_csv(collect([tmp_path]))


def test_what_changes_the_images_is_another_task_and_what_has_blanks_is_one_word(tmp_path: Path) -> None:
    make(tmp_path, "none", 0, 90.0)
    make(tmp_path, "none", 0, 91.0, "model.channels=[1, 2]", "dataset.augment.crop=1")
    make(tmp_path, "xnor", 0, 80.0, "dataset.limit=1000")
    make(tmp_path, "xnor", 0, 81.0, "dataset.augment.crop=1", "x=1", "trainer.ema=0.9")
    rows = collect([tmp_path])
    (tmp_path / "rows.csv").write_text(as_csv(rows))
    for groups in (groups_of(rows), groups_of(collect([tmp_path / "rows.csv"]))):
        assert [(g.network, g.dataset, g.quant, g.settings, str(g.difference())) for g in groups] == [
            ("lenet5", "mnist", "none", "", "None"),
            ("lenet5", "mnist", "xnor", "dataset.augment.crop=1 trainer.ema=0.9 x=1", "-9.00"),
            ("lenet5 channels=[1, 2]", "mnist", "none", "dataset.augment.crop=1", "None"),
            ("lenet5", "mnist limit=1000", "xnor", "", "None"),
        ]


def test_a_recipe_that_sets_a_depth_has_another_network(tmp_path: Path) -> None:
    for name, seed, words in (("a", 0, ["experiment=deep"]), ("b", 1, ["experiment=deep", "model.depth=20"])):
        make(tmp_path / name, "lsq", seed, 93.0, "model=resnet", *words)
        for folder in (tmp_path / name / "runs").iterdir():
            (folder / "config.yaml").write_text(
                "model: {name: resnet, depth: 56}\ndataset: {name: mnist}\nquant: {name: lsq}\n"
            )
    assert [group.network for group in groups_of(collect([tmp_path]))] == ["resnet depth=20", "resnet depth=56"]


def test_a_recipe_that_sets_a_width_has_another_network_and_one_of_a_plugin_says_all(tmp_path: Path) -> None:
    stored = {
        "a": "model: {name: lenet5, channels: [20, 50], hidden: 20, kernel: 5}\n",
        "b": "model: {name: lenet5, channels: [20, 50], hidden: 500, kernel: 5}\n",
        "c": "model: {name: mine, width: 16}\n",
        "d": "model: {name: mine, width: 16}\n",
    }
    words = {"a": ["experiment=a"], "b": ["experiment=b"], "d": ["experiment=d"]}
    for seed, (name, config) in enumerate(stored.items()):
        own = ["model=mine", "plugins=[my.net]"] if name in "cd" else []
        make(tmp_path / name, "lsq", seed, 93.0, *own, *words.get(name, []))
        (folder,) = (tmp_path / name / "runs").iterdir()
        (folder / "config.yaml").write_text(f"{config}dataset: {{name: mnist}}\nquant: {{name: lsq}}\n")
    networks = {group.network for group in groups_of(collect([tmp_path]))}
    assert networks == {"lenet5 hidden=20", "lenet5", "mine width=16"}


def test_a_failed_float_run_makes_no_run_the_best(tmp_path: Path) -> None:
    for quant, plain, fast in (("none", 97.8, 10.0), ("xnor", 96.9, 10.1)):
        make(tmp_path, quant, 0, plain)
        make(tmp_path, quant, 0, fast, "regime.phases.0.lr=0.2")
    found, _ = make_report([tmp_path])
    (said,) = found.discussion
    assert "Of the others the best is xnor (96.90 (one run) %; -0.90 points, n = 1)." in said
    assert "The last is xnor regime.phases.0.lr=0.2 (10.10 (one run) %; +0.10 points, n = 1)." in said


def test_more_epochs_than_were_run_are_a_setting(tmp_path: Path) -> None:
    for epochs in (4, 40):
        make(tmp_path / str(epochs), "xnor", 0, 90 + epochs / 10, f"trainer.epochs={epochs}", "trainer.max_steps=80")
    make(tmp_path / "whole", "xnor", 0, 99.0, "trainer.epochs=10")
    assert [row["settings"] for row in collect([tmp_path])] == [
        "", "trainer.epochs=4 trainer.max_steps=80", "trainer.epochs=40 trainer.max_steps=80",
    ]  # fmt: skip


def test_hyper_parameters_are_those_of_every_group(tmp_path: Path) -> None:
    make(tmp_path, "xnor", 0, 99.0, "lr=0.1", "batch_size=64")
    make(tmp_path, "xnor", 0, 98.0, "experiment=best")
    rows = [row | {"epochs": epochs} for row in collect([tmp_path]) for epochs in (1, 3)]
    (tmp_path / "rows.csv").write_text(as_csv(rows))
    found, _ = make_report([tmp_path / "rows.csv"])
    tables = {table.caption: table.rows for table in found.tables}
    assert tables["Hyper-parameters of all runs"] == [["quant", "xnor"]]
    assert sorted(tables["Hyper-parameters that differ"]) == [
        ["batch_size", "64", "—", "64", "—"],
        ["epochs", "1", "1", "3", "3"],
        ["experiment", "—", "best", "—", "best"],
        ["lr", "0.1", "—", "0.1", "—"],
    ]


@pytest.mark.parametrize(
    ("column", "value"), [("test_top1", "abc"), ("test_top1", ""), ("test_top1", "nan"), ("seed", "x"), ("epochs", "")]
)
def test_a_cell_that_is_no_number_is_named(outputs: Path, tmp_path: Path, column: str, value: str) -> None:
    head, first, *rest = as_csv(collect([outputs])).splitlines()
    cells = first.split(",")
    cells[head.split(",").index(column)] = value
    path = tmp_path / "rows.csv"
    path.write_text("\r\n".join([head, ",".join(cells), *rest]), encoding="utf-8-sig")
    with pytest.raises(ConfigError, match=rf"rows\.csv: line 2, {column}: '{value}' is no"):
        collect([path])


def test_what_is_not_whole_is_named_or_left_out(outputs: Path, tmp_path: Path) -> None:
    torn, whole = tmp_path / "torn.csv", as_csv(collect([outputs]))
    torn.write_text(whole[: whole.rindex(",lsq,") + 20])
    with pytest.raises(ConfigError, match=r"torn\.csv: line 8 has not as many cells"):
        collect([torn])
    path = next(outputs.glob("runs/lsq-0-1/summary.json"))
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "epochs"}))
    assert len(collect([outputs])) == 6


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
    with pytest.raises(ConfigError, match="Accepted: md, html, latex, csv, curve, svg"):
        report(["--format", "doc"])
    with pytest.raises(ConfigError, match="say where the figures go"):
        report(["--format", "svg"])
    with pytest.raises(ConfigError, match="say which pages"):
        report(["--pages"])


def test_in_a_browser_a_long_name_of_what_was_not_run_makes_no_page_wider(browser: Browser, outputs: Path) -> None:
    make(outputs, f"lsq{'_and_more' * 12}", 1, 97.0)
    assert report([str(outputs), "--format", "html", "--out", str(outputs / "out")]) == 0
    browser.open(outputs / "out" / "report.html", width=380, waits=False)
    assert "_and_more" in browser.ask("[...document.querySelectorAll('li')].map(li => li.textContent).join()")
    assert browser.ask("document.documentElement.scrollWidth") <= 380


SCAN = """quant,figure,title,x_label,y_label,logarithmic,level,series,x,y
lsq,rate,How <fast>,weights,R,xy,1.0,none,100,5
lsq,rate,How <fast>,weights,R,xy,1.0,none,1000,0.05
lsq,rate,How <fast>,weights,R,xy,1.0,scaled,1000,0.5
lsq,zero,Zero,weights,R,xyz,,none,0,-1
lsq,rate,How <fast>,weights,R,xy,1.0,scaled,10"""
STEP = """name,against,time,time_low,time_high,saved,peak
float32,float32,1.0,1.0,1.0,1.0,1.0
lsq,float32,0.75,0.5,0.8,0.1234,2.0
"""


def test_figures_alone_are_written_for_every_kind_of_file(outputs: Path, tmp_path: Path) -> None:
    runs, scan, step = (tmp_path / f"{name}.csv" for name in ("rows", "scan", "step"))
    runs.write_text(as_csv(collect([outputs])))
    scan.write_text(SCAN)
    step.write_text(STEP)
    assert report([*map(str, (runs, scan, step)), "--format", "svg", "--out", str(tmp_path / "figures")]) == 0
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {"lenet5-mnist-10-packed.svg", "lenet5-mnist-10-saved.svg", "lsq-rate.svg", "lsq-zero.svg"} | {
        f"step-{part}.svg" for part in ("time", "saved")
    }
    drawn = ElementTree.parse(tmp_path / "figures" / "lsq-rate.svg")
    texts = [element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[:3] == ["How <fast>", "none", "scaled"]
    assert {"0.1", "1", "100", "1,000"} <= set(texts)  # both axes are logarithmic


def test_settings_of_a_quantizer_are_drawn_beside_float(outputs: Path, tmp_path: Path) -> None:
    for seed, top1 in enumerate([98.4, 98.8, 98.9]):
        make(outputs, "lsq", seed, top1, "quant.act_bits=3", "quant.grad_weight_bits=16")
    assert report([str(outputs), "--format", "svg", "--out", str(tmp_path / "figures")]) == 0
    drawn = (tmp_path / "figures" / "lenet5-mnist-10-lsq.svg").read_text()
    for words in (
        "lsq A2",
        "lsq A3 grad_weight_bits=16",
        "-1.00 [-1.50, -0.50]",
        "-0.50 [-0.75, -0.25]",
        "n = 3",
    ):
        assert words in drawn


def test_in_a_crowd_only_the_front_is_named() -> None:
    def drawn(count: int) -> str:
        points = [(float(cost), float(cost * 37 % 101)) for cost in range(1, count + 1)]
        series = [Series(f"run {cost:.0f}.", [cost], [reached], lines=False) for cost, reached in points]
        return Chart("accuracy and cost", "KiB", "%", series, front=pareto(points)).svg()

    assert drawn(8).count('class="label"') == 8
    assert "more" not in drawn(8)
    crowd = drawn(400)
    named = [place for place in range(1, 401) if f"run {place}.:" in crowd]
    assert named == [cost for cost, _ in pareto([(cost, cost * 37 % 101) for cost in range(1, 401)])]
    assert len(named) < 40
    assert f"and {400 - len(named)} more" in crowd


def test_a_marked_table_in_a_page_is_made_anew(tmp_path: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("step.csv").write_text(STEP)
    Path("scan.csv").write_text(SCAN)
    Path("rows.csv").write_text(as_csv(collect([outputs])))
    parts = ("step.csv", "scan.csv lsq-rate", "rows.csv lsq")
    Path("page.md").write_text("".join(f"text\n<!-- table: {part} -->\nold\n<!-- end -->\n" for part in parts))
    assert report(["--pages", "page.md"]) == 0
    page = Path("page.md").read_text()
    assert "old" not in page
    assert page.count("text\n") == 3
    assert "| lsq | 0.75 [0.50, 0.80] | 0.123 | 2.00 |" in page
    assert "| 1,000 | 0.05 | 0.5 |" in page
    assert as_markdown(collect([Path("rows.csv")])) in page
    assert with_tables(page) == page
    for lost in ("nowhere.csv", "scan.csv lsq-other", "rows.csv xnor"):
        with pytest.raises(ConfigError, match=lost.split()[-1]):
            with_tables(f"<!-- table: {lost} -->\n<!-- end -->\n")
