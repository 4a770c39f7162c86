"""The comparison: what a row says of a run, and what the page does with the rows, in a real browser."""

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from browser import Browser
from run_samples import LENET, make_run

from runner.faults import ConfigError
from runner.pages.command import dashboard
from runner.pages.compare import SCRIPTS, add_rows, comparison_body, costs_in_words, entries_of, write_comparison
from runner.pages.dashboard import write_dashboard
from runner.pages.entries import Entry, base_of, encoded, entry_of, points_for
from runner.pages.figures import Sheet
from runner.pages.page import page, write_page
from runner.pages.records import find_runs, read_run
from runner.pages.settings import settings_of

HOSTILE = '</script><img src=//x.example/i onerror="window.hit=1"><script>window.hit=1</script>\'"&{{7*7}}$$x^2$$=1'
BITS = {"none": 32, "lsq": 4, "xnor": 1}


def make_runs(root: Path, quants: tuple[str, ...] = ("none", "lsq", "xnor"), seeds: int = 3, epochs: int = 12) -> Path:
    """Runs of some quantizers and seeds, whose accuracy and packed size are known."""
    for q, quant in enumerate(quants):
        for seed in range(seeds):
            folder = make_run(root / "runs" / f"{quant}-s{seed}", epochs=epochs, layers=LENET, quant=quant, drops=(8,))
            change(folder / "config.yaml", seed=seed, quant={"name": quant, "bits": BITS[quant]})
            change(
                folder / "summary.json",
                seed=seed, name=folder.name, test_top1=90.0 + q + 0.1 * seed, packed_bytes=1000 * BITS[quant],
            )  # fmt: skip
    return root


def change(path: Path, **values: object) -> None:
    content = yaml.safe_load(path.read_text()) | values  # JSON is YAML
    path.write_text(yaml.safe_dump(content) if path.suffix == ".yaml" else json.dumps(content))


def cut_short(folder: Path, epochs: int) -> None:
    """Make of a finished run one that was killed after some epochs."""
    (folder / "summary.json").unlink()
    change(folder / "status.json", state="interrupted")
    for name in ("metrics.csv", "timing.csv"):
        lines = (folder / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(lines[: epochs + 1]))


def takes(folder: Path, seconds: float) -> None:
    """Say that every epoch of a run took so long, and its evaluation no time."""
    header, *rows = [line.split(",") for line in (folder / "timing.csv").read_text().splitlines()]
    spent = {"seconds": str(seconds), "eval_seconds": "0"}
    told = [header, *([spent.get(name, cell) for name, cell in zip(header, row, strict=True)] for row in rows)]
    (folder / "timing.csv").write_text("".join(",".join(row) + "\n" for row in told))


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_runs(tmp_path_factory.mktemp("outputs"))
    (root / "runs" / "broken").mkdir()
    (root / "runs" / "broken" / "metrics.csv").write_bytes(b"\xff\0")
    assert dashboard([str(root), "--compare"]) == 0
    return root / "comparison.html"


def test_a_row_tells_settings_as_differences_from_the_most_common_ones(tmp_path: Path) -> None:
    runs = [read_run(folder) for folder in find_runs(make_runs(tmp_path, ("lsq", "xnor"), 2))]
    settings = [settings_of(run.config, run.summary) for run in runs]
    base = base_of(settings)
    assert not {"name", "outputs", "trainer.progress"} & set(base)
    rows = [json.loads(encoded(entry_of(run, "x", 50), base)) for run in runs]
    for row, own in zip(rows, settings, strict=True):
        told = {key: value for key, value in (base | row["settings"]).items() if value is not None}
        assert told == own
        assert len(row["settings"]) <= 4
    xnor = rows[-1]
    assert xnor["costs"]["packed_bytes"] == 1000
    assert xnor["reached"]["test"] == 91.1
    layers = runs[-1].layers
    assert xnor["costs"]["weight_bits"] == pytest.approx(
        (layers["weight_bits"] * layers["parameters"]).sum() / layers["parameters"].sum(), rel=1e-5
    )


def test_many_runs_are_read_by_several_processes_to_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = find_runs(make_runs(tmp_path, ("lsq", "xnor"), 2))
    alone = entries_of(folders, str)
    monkeypatch.setattr("runner.pages.compare.MANY", 1)
    assert entries_of(folders, str) == alone
    assert len(alone) == 4


def test_a_run_that_goes_on_has_its_costs_in_its_row(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", epochs=2, layers=LENET, drops=(), state="running"))
    costs = entry_of(run, "x", 50)["costs"]
    assert not run.summary
    assert (costs["packed_bytes"], costs["saved_bytes"]) == (1_532_904, 1_433_600)
    assert costs["float_macs"] == 1_780_000


def test_curves_of_different_lengths_keep_epochs_in_common(tmp_path: Path) -> None:
    curves = []
    for epochs in (90, 200):
        run = read_run(make_run(tmp_path / str(epochs), epochs=epochs, layers=LENET, drops=()))
        curves.append(entry_of(run, "x", 40)["curve"])
        assert len(curves[-1]["epoch"]) <= 42
        assert curves[-1]["epoch"][-1] == epochs
    shared = set(curves[0]["epoch"]) & set(curves[1]["epoch"])
    assert len(shared) >= 11
    assert points_for(2) == 200
    assert points_for(500) == 80
    assert points_for(10_000) == 20


TABLE = "[...document.querySelectorAll('#results tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
CHANGED = "dispatchEvent(new Event('change', {bubbles: true}))"
SAID = (
    "[...document.querySelectorAll('.bk-Tooltip')].map(tip => tip.shadowRoot.querySelector('.bk-tooltip-content')?.innerText"
    ".trim().replace(/\\s+/g, ' ')).find(text => text)"
)
LINES = "Bokeh.documents[0].get_model_by_name('lines').data"


def choose(browser: Browser, name: str, value: str) -> None:
    select = f"document.getElementById({json.dumps(name)})"
    browser.ask(f"({select}.value = {json.dumps(value)}, {select}.{CHANGED})")


def fronts(browser: Browser) -> list[list[float]]:
    """The accuracies on each Pareto front of packed size; in the page a gap ends each."""
    told = "[...Bokeh.documents[0].get_model_by_name('front-packed_bytes').data.y].map(y => Number.isNaN(y) ? null : y)"
    gaps = [list(part) for _, part in itertools.groupby(browser.ask(told), lambda y: y is None)]
    return [part for part in gaps if part[0] is not None]


def test_means_deviations_and_the_pareto_front(browser: Browser, compared: Path) -> None:
    browser.open(compared)
    rows = browser.ask(TABLE)
    assert [row[0] for row in rows] == ["xnor", "lsq", "none"], "the best comes first"
    by_name = {row[0]: row for row in rows}
    assert by_name["xnor"][1] == "3"
    assert by_name["xnor"][2] == "92.10 ± 0.10"
    assert by_name["none"][2] == "90.10 ± 0.10"
    assert fronts(browser) == [[pytest.approx(92.1)]], "the smallest is the best, too"
    lines = browser.ask(f"(d => ({{label: [...d.label], n: [...d.n], xs: [...d.xs[0]]}}))({LINES})")
    assert sorted(lines["label"]) == ["lsq", "none", "xnor"]
    assert lines["n"] == [3, 3, 3]
    assert lines["xs"] == list(range(1, 13))
    assert "1 folder could not be read" in browser.ask("document.getElementById('broken').textContent")
    assert browser.requests() == [compared.as_uri()]
    assert browser.complaints() == []


def test_beside_finished_seeds_an_unfinished_one_does_not_count(browser: Browser, tmp_path: Path) -> None:
    cut_short(make_runs(tmp_path, ("xnor",)) / "runs" / "xnor-s1", 3)
    folders = find_runs(tmp_path)
    reached = [entry_of(read_run(folder), "x", 0)["reached"] for folder in (folders[0], folders[2])]
    browser.open(write_comparison(folders, tmp_path / "comparison.html"))
    ((_, n, *figures),) = (row[:5] for row in browser.ask(TABLE))
    assert n == "3"
    for figure, goal in zip(figures, ("test", "best", "last"), strict=True):
        mean = sum(one[goal] for one in reached) / 2
        assert figure.startswith(f"{mean:.2f} ± ")
        assert figure.endswith(" (2 of 3)")
    browser.open(write_comparison([folders[1]], tmp_path / "alone.html"))
    best = entry_of(read_run(folders[1]), "x", 0)["reached"]["best"]
    assert browser.ask(TABLE)[0][2] == f"{best:.2f}", "alone it says what it has"


def test_the_mean_curve_never_goes_back_in_time(browser: Browser, tmp_path: Path) -> None:
    """Where a slow seed ends, those that are left are faster than the mean was."""
    make_runs(tmp_path, ("xnor",))
    slow = tmp_path / "runs" / "xnor-s1"
    cut_short(slow, 3)
    for folder, seconds in zip(find_runs(tmp_path), (10, 40, 10), strict=True):
        takes(folder, seconds)
    browser.open(write_comparison(find_runs(tmp_path), tmp_path / "comparison.html"))
    browser.ask("document.querySelector('input[name=compared][value=time]').click()")
    times = browser.ask(f"[...{LINES}.xs[0]]")
    assert [60 * time for time in times] == pytest.approx([20, 40, 60, *range(70, 160, 10)])


def test_a_seed_that_was_run_again_under_another_name_counts_once(browser: Browser, tmp_path: Path) -> None:
    runs = make_runs(tmp_path, ("xnor",)) / "runs"
    for name, day, top1 in (("again", 25, 95.0), ("long-ago", 15, 10.0)):
        shutil.copytree(runs / "xnor-s0", runs / name)
        change(runs / name / "config.yaml", name=name)
        change(runs / name / "summary.json", name=name, test_top1=top1)
        change(runs / name / "status.json", updated=f"2026-11-{day}T00:00:00+00:00")
    shutil.copytree(runs / "xnor-s1", runs / "unfinished")
    cut_short(runs / "unfinished", 3)
    change(runs / "unfinished" / "status.json", updated="2026-12-01T00:00:00+00:00")
    browser.open(write_comparison(find_runs(tmp_path), tmp_path / "comparison.html"))
    (row,) = browser.ask(TABLE)
    assert row[1] == "3"
    assert row[2].startswith(f"{(95.0 + 90.1 + 90.2) / 3:.2f} ± "), "the newest that is finished"
    assert "6 runs of 6, 1 configuration, 3 runs left out" in browser.ask(
        "document.getElementById('count').textContent"
    )
    assert browser.complaints() == []


def test_every_network_and_every_set_of_images_has_its_own_pareto_front(browser: Browser, tmp_path: Path) -> None:
    runs = make_runs(tmp_path, ("none", "xnor"), 1) / "runs"
    for group, key, value, top1 in (
        ("dataset", "limit", 64, 10),
        ("model", "width", 2, 20),
        ("dataset", "augment", {"x": 1}, 9),
    ):
        for quant in ("none", "xnor"):
            folder = runs / f"{quant}-{key}"
            shutil.copytree(runs / f"{quant}-s0", folder)
            config = yaml.safe_load((folder / "config.yaml").read_text())
            change(folder / "config.yaml", **{group: config[group] | {key: value}})
            change(folder / "summary.json", name=folder.name, test_top1=top1 + BITS[quant] / 100)
    browser.open(write_comparison(find_runs(tmp_path), tmp_path / "comparison.html"))
    own = [[10.01, 10.32], [20.01, 20.32], [91.0]]
    assert sorted(fronts(browser)) == [[pytest.approx(y) for y in front] for front in own], "augmented: the same images"
    assert browser.complaints() == []


def test_the_same_seeds_have_the_same_colour_whatever_their_folders_are_called(
    browser: Browser, tmp_path: Path
) -> None:
    runs = make_runs(tmp_path, ("lsq", "xnor")) / "runs"
    (runs / "xnor-s2").rename(runs / "xnor-first")
    browser.open(write_comparison(find_runs(tmp_path), tmp_path / "comparison.html"))
    choose(browser, "colour-key", "seed")
    assert browser.ask("[...document.querySelectorAll('#legend-colour button')].map(b => b.textContent)") == ["0, 1, 2"]
    assert len(set(browser.ask(f"[...{LINES}.colour]"))) == 1


def test_a_run_without_a_config_stands_alone_under_its_name(browser: Browser, tmp_path: Path) -> None:
    runs = make_runs(tmp_path, ("xnor",)) / "runs"
    for folder in find_runs(runs):
        change(folder / "config.yaml", classifier={"name": "learned"}, regularizer={"name": "none"})
    (runs / "xnor-s2" / "config.yaml").unlink()
    browser.open(write_comparison(find_runs(tmp_path), tmp_path / "comparison.html"))
    rows = {row[0]: row for row in browser.ask(TABLE)}
    assert {name: row[1] for name, row in rows.items()} == {"xnor": "2", "run=xnor-s2": "1"}
    assert "2" in rows["run=xnor-s2"], "its seed stands in its summary"
    assert browser.ask("document.querySelectorAll('#settings tbody tr').length") <= 2, (
        "what nobody knows does not differ"
    )
    assert browser.complaints() == []


def test_a_choice_of_none_says_what_is_left_out(browser: Browser, tmp_path: Path) -> None:
    runs = make_runs(tmp_path, ("xnor",), 2) / "runs"
    for folder, name in zip(find_runs(runs), ("none", "kurtosis"), strict=True):
        change(folder / "config.yaml", regularizer={"name": name})
    browser.open(write_comparison(find_runs(tmp_path), tmp_path / "comparison.html"))
    assert sorted(row[0] for row in browser.ask(TABLE)) == ["kurtosis", "regularizer=none"]


def test_numbers_within_words_come_in_the_order_of_numbers(browser: Browser, compared: Path) -> None:
    browser.open(compared)
    words = ["lr=0.1", "lr=0.03", "lr=1e-05", "none", "10", "9", "-1", "-0.5"]
    ordered = browser.ask(f"[null, ...{json.dumps(words)}].sort(Comparison.inOrder)")
    assert ordered == ["-1", "-0.5", "9", "10", "lr=1e-05", "lr=0.03", "lr=0.1", "none", None]


def test_filter_colour_axis_sort_and_mute(browser: Browser, compared: Path) -> None:
    browser.open(compared)
    choose(browser, "filter-key", "quant.name")
    choose(browser, "filter-value", json.dumps("lsq"))
    choose(browser, "filter-value", json.dumps("none"))
    assert sorted(row[0] for row in browser.ask(TABLE)) == ["lsq", "none"]
    choose(browser, "filter-key", "seed")
    choose(browser, "filter-value", json.dumps("1"))
    assert [row[1] for row in browser.ask(TABLE)] == ["1", "1"]
    browser.ask(
        "[...document.querySelectorAll('[data-unfilter]')].forEach(() => document.querySelector('[data-unfilter]').click())"
    )
    assert len(browser.ask(TABLE)) == 3
    choose(browser, "colour-key", "quant.name")
    assert len(set(browser.ask(f"[...{LINES}.colour]"))) == 3
    browser.ask("document.querySelector('[data-category=\"colour:lsq\"]').click()")
    assert sorted(browser.ask(f"[...{LINES}.alpha]")) == [0.08, 1, 1]
    browser.ask("document.querySelector('input[name=compared][value=time]').click()")
    label = "[...Bokeh.documents[0].all_models].find(m => m.type === 'LinearAxis' && m.name === 'x').axis_label"
    assert browser.ask(label) == "time spent (min)"
    choose(browser, "metric", "train_loss")
    assert browser.ask("document.querySelector('.wide h3').textContent") == "Train loss"
    browser.ask("document.querySelector('[data-sort=\"results:2\"]').click()")
    means = [float(row[2].split()[0]) for row in browser.ask(TABLE)]
    assert means in (sorted(means), sorted(means, reverse=True))
    choose(browser, "goal", "last")
    assert "last validation" in browser.ask("document.getElementById('plot-cost-packed_bytes').ariaLabel")
    assert browser.complaints() == []


def test_tooltips_name_the_axes_and_give_the_numbers(browser: Browser, compared: Path) -> None:
    def said_at(chart: str, x: str, y: str) -> str:
        """What the tooltip says over a point of a chart, which stands in a data source."""
        box = browser.box(chart)
        scales = f"[...Bokeh.index].find(view => document.querySelector('{chart}').contains(view.el)).frame"
        left, top = browser.ask(f"(f => [f.x_scale.compute({x}), f.y_scale.compute({y})])({scales})")
        browser.hover(box["x"] + left + 1, box["y"] + top)
        browser.wait_for(SAID)
        return str(browser.ask(SAID))

    browser.open(compared)
    data = "Bokeh.documents[0].get_model_by_name"
    curve = said_at("#plot-curves", f"{data}('lines').data.xs[0][5]", f"{data}('lines').data.ys[0][5]")
    assert re.fullmatch(r"(none|lsq|xnor) n: 3 epochs completed: 6 mean: \d+\.\d+", curve)
    browser.hover(0, 0)
    browser.wait_for(f"!({SAID})")
    points = f"{data}('points-packed_bytes').data"
    point = said_at("#plot-cost-packed_bytes", f"{points}.x[0]", f"{points}.y[0]")
    assert re.fullmatch(r"(none|lsq|xnor) n: 3 test top-1 \(%\): \d+\.\d\d ± 0\.10 Packed size: \S+ \S*B", point)


def test_links_lead_to_the_pages_of_the_runs_or_to_their_folders(browser: Browser, tmp_path: Path) -> None:
    drawn, bare = (make_run(tmp_path / "runs" / f"<{n}#", epochs=1, layers=LENET, drops=(), seed=n) for n in range(2))
    page = write_dashboard(drawn)
    browser.open(write_comparison([drawn, bare], tmp_path / "comparison.html"))
    links = browser.ask("[...document.querySelectorAll('#results a')].map(a => a.href)")
    assert sorted(links) == sorted(place.resolve().as_uri() for place in (page, bare))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1280, 2560])
def test_it_fits_its_window(browser: Browser, compared: Path, tmp_path: Path, scheme: str, width: int) -> None:
    browser.open(compared, scheme=scheme, width=width)
    browser.picture(tmp_path / f"comparison-{scheme}-{width}.png")
    assert browser.ask("document.documentElement.scrollWidth") <= width
    assert browser.complaints() == []


def test_below_the_filters_nothing_else_stays_in_sight(browser: Browser, compared: Path) -> None:
    """Two rows of controls that stick to the same edge would lie over one another."""
    browser.open(compared, width=1280, height=500)
    browser.ask("window.scrollTo(0, 1000)")
    tops = browser.ask("[...document.querySelectorAll('.controls')].map(row => row.getBoundingClientRect().top)")
    assert tops[0] == 0
    assert all(top < -50 or top > 50 for top in tops[1:])


def test_on_paper_the_tables_are_no_wider_than_the_page(browser: Browser, compared: Path) -> None:
    """A table that sticks out makes the browser shrink the page, and charts keep the size they had on the screen."""
    browser.open(compared, width=900)
    wider = "((box) => box.scrollWidth - box.clientWidth)(document.getElementById('results-box'))"
    assert browser.ask(wider) > 0, "on the screen it is scrolled"
    browser.call("Emulation.setEmulatedMedia", media="print")
    try:
        assert browser.ask(wider) <= 0
        assert browser.ask("document.documentElement.scrollWidth - innerWidth") <= 0
    finally:
        browser.call("Emulation.setEmulatedMedia", media="")


def test_hostile_strings_are_text_wherever_they_appear(browser: Browser, tmp_path: Path) -> None:
    for index in range(2):
        folder = make_run(tmp_path / f"r{index}", epochs=3, layers=LENET, drops=(), words=HOSTILE)
        change(folder / "config.yaml", **{HOSTILE: f"{HOSTILE}{index}", "quant": {"name": f"{HOSTILE}{index}"}})
    page = write_comparison(find_runs(tmp_path), tmp_path / "comparison.html")
    browser.open(page)
    for key in (HOSTILE, "quant.name"):
        choose(browser, "colour-key", key)
        choose(browser, "dash-key", key)
        choose(browser, "filter-key", key)
        values = "document.getElementById('filter-value')"
        browser.ask(f"({values}.selectedIndex = 1, {values}.{CHANGED})")
    assert browser.ask("window.hit") is None
    assert browser.ask("document.querySelectorAll('img, script[src]').length") == 0
    assert HOSTILE in browser.ask("document.getElementById('settings').textContent")
    assert HOSTILE in browser.ask("document.getElementById('chips').textContent")
    box = browser.ask("(e => { e.scrollIntoView({block: 'center'}); return e.getBoundingClientRect().toJSON() })"
                      "(document.getElementById('plot-curves'))")  # fmt: skip
    for part in range(3, 18):
        browser.call(
            "Input.dispatchMouseEvent",
            type="mouseMoved",
            x=box["x"] + box["width"] / 2,
            y=box["y"] + box["height"] * part / 20,
        )
    assert (
        browser.ask(
            "[...document.querySelectorAll('.bk-Tooltip')].filter(t => t.shadowRoot.querySelector('img, script')).length"
        )
        == 0
    )
    assert browser.requests() == [page.as_uri()]
    assert browser.complaints() == []


def test_one_run_and_runs_that_differ_in_nothing(browser: Browser, tmp_path: Path) -> None:
    make_runs(tmp_path, ("lsq",), 1, epochs=1)
    browser.open(write_comparison(find_runs(tmp_path), tmp_path / "one.html"))
    assert len(browser.ask(TABLE)) == 1
    assert browser.ask("document.getElementById('settings-box').hidden")
    assert browser.complaints() == []


def page_of(path: Path, entry: Entry, rows: list[Entry]) -> Path:
    """The comparison of rows that differ from `entry` in a setting or two."""
    sheet = Sheet({})
    body = comparison_body(sheet, [entry["costs"]], "many")
    add_rows(sheet, [encoded(row, entry["settings"]) for row in rows], entry["settings"])
    return write_page(path, page("many", body, sheet.embed(costs=costs_in_words()), SCRIPTS))


def test_a_hundred_runs_of_two_hundred_epochs_make_a_page_of_a_few_megabytes(browser: Browser, tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "template", epochs=200, layers=LENET, drops=(80, 140)), health=False)
    entry = entry_of(run, "x", points_for(100))
    assert len(entry["curve"]["val_top1"]) == 200, "every epoch is in the page"
    settings = [entry["settings"] | {"lr": str(index // 5), "seed": str(index % 5)} for index in range(100)]
    path = page_of(
        tmp_path / "hundred.html", entry, [entry | {"settings": own, "seed": own["seed"]} for own in settings]
    )
    assert path.stat().st_size < 10_000_000
    browser.open(path)
    assert browser.ask(f"{LINES}.xs.map(xs => xs.length)") == [200] * 20
    assert [row[1] for row in browser.ask(TABLE)] == ["5"] * 20
    assert browser.complaints() == []


def test_thousands_of_configurations_are_listed_a_page_at_a_time(browser: Browser, tmp_path: Path) -> None:
    template = make_run(tmp_path / "template", epochs=2, layers=LENET, drops=())
    entry = entry_of(read_run(template), "x", 0)
    rows = [entry | {"settings": entry["settings"] | {"lr": str(index)}} for index in range(10_000)]
    path = page_of(tmp_path / "many.html", entry, rows)
    assert path.stat().st_size < 10_000_000
    browser.open(path)
    assert len(browser.ask(TABLE)) == 100
    assert browser.ask("document.getElementById('results-where').textContent") == "1 to 100 of 10,000"
    browser.ask("document.querySelector('[data-page=\"results:1\"]').click()")
    assert browser.ask("document.getElementById('results-where').textContent") == "101 to 200 of 10,000"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "is not there"),
        ([".", "--compare"], "no run folder"),
        ([".", "--compare", "--write"], "not allowed with"),
        (["--host", "0.0.0.0"], "name the one address"),
    ],
)
def test_mistakes_on_the_command_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        dashboard(words)
