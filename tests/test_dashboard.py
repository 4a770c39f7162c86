"""The page of a run: whole, self-contained, readable, and deaf to whatever a run's strings try to make it do."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
import yaml
from browser import Browser
from run_samples import LENET, make_run

from runner.faults import StorageError
from runner.pages.curves import short_labels, timeline_section
from runner.pages.dashboard import write_dashboard, write_timeline
from runner.pages.page import amount, duration, embedded_json, size, write_page
from runner.pages.scales import colours, round_powers
from runner.pages.settings import flatten, usual_settings

HOSTILE = (
    '</script><img src=//x.example/i onerror="window.hit=1"><script>window.hit=1</script>\'"&{{7*7}}$$x^2$$\u2028=1'
)
LARGEST = 3_000_000
OUR_TAGS = set(
    "html head meta title link style body header main footer h1 h2 h3 p span strong ul li dl div dt dd fieldset legend "
    "label input button figure figcaption b svg path circle rect details summary table caption thead tbody tr th td "
    "select option section pre code noscript script".split()
)


class Page(HTMLParser):
    """What a browser would make of a page: its elements with their attributes, its texts, its scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dashboard(make_run(tmp_path_factory.mktemp("runs") / "whole"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "hostile", epochs=6, layers=LENET, drops=(3,), words=HOSTILE)
    return write_dashboard(folder, defaults={"seed": 1, HOSTILE: HOSTILE})


def test_the_page_says_what_the_run_reached_and_cost(whole: Path) -> None:
    summary = json.loads((whole.parent / "summary.json").read_text())
    text = Page(whole).text
    assert f"Best validation accuracy {summary['best_val_top1']:.2f} %" in text
    assert f"Test accuracy {summary['test_top1']:.2f} % top-5 99.31 %, best checkpoint" in text
    assert "Speed 1,443 images/s" in text
    assert "Peak memory 1.32 GiB" in text
    assert "Saved for backward 1.37 MiB per sample" in text
    assert "Packed size 1.46 MiB 29.2 times smaller than 42.7 MiB in float; 11.2 M parameters" in text
    assert "MACs per image 555 M 1.78 M float, 554 M binary" in text
    assert "python -m runner model=resnet18 'name=a b'" in text


def test_the_page_needs_nothing_else(whole: Path) -> None:
    page = Page(whole)
    assert whole.stat().st_size < LARGEST
    references = [value for _, attributes in page.elements for key, value in attributes.items()
                  if key in ("src", "href", "srcset", "action", "data", "poster")]  # fmt: skip
    assert references == ["data:,"]
    style = whole.read_text().split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_only_the_scripts_it_was_written_with_may_run(hostile: Path) -> None:
    page = Page(hostile)
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    data, *scripts = page.scripts
    assert len(scripts) == 2
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "unsafe-eval" not in policy
    assert set(json.loads(data)) == {"axes", "hosts", "document"}


def test_strings_of_a_run_are_text_wherever_they_appear(hostile: Path) -> None:
    page = Page(hostile)
    assert {tag for tag, _ in page.elements} <= OUR_TAGS
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
    shown = "".join(page.texts).count(HOSTILE)
    assert shown > 30, "title, state, layers, config, command and environment all show the string"
    assert page.texts[page.texts.index(HOSTILE)] == HOSTILE


def test_screen_readers_get_names_and_tables(whole: Path) -> None:
    page = Page(whole)
    plots = [attributes for attributes in page.all("div") if attributes.get("class") == "plot"]
    assert len(plots) == 10
    assert all(plot["role"] == "img" and len(plot["aria-label"]) > 40 for plot in plots)
    assert len(page.all("caption")) == len(page.all("table")) >= 4
    assert all(head.get("scope") in ("col", "row") for head in page.all("th"))
    assert "train loss from" not in page.text
    assert "All values are in the table" in plots[0]["aria-label"]
    rows = page.text.split("Every epoch, as in metrics.csv")[1].split("Clipped values")[0]
    last = (whole.parent / "metrics.csv").read_text().splitlines()[-1].split(",")
    assert f"{float(last[9]):.6g}" in rows


def test_config_keys_that_differ_from_the_defaults_come_first(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", epochs=2, layers=LENET, drops=())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(flatten(config), sort_keys=False))  # as the trainer writes it
    assert "0 of 19 keys differ" in Page(write_dashboard(folder, defaults=config)).text
    config["trainer"]["epochs"] = 100
    del config["seed"]
    text = Page(write_dashboard(folder, defaults=config)).text
    assert "2 of 19 keys differ from the defaults key value default trainer.epochs 2 100 seed 0 —" in text


def test_a_page_finds_out_by_itself_what_the_defaults_are(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", epochs=2, layers=LENET, drops=())
    config = flatten(usual_settings({"model.name": "lenet5", "quant.name": "xnor", "dataset.name": "digits"}))
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"seed": 7}, sort_keys=False))
    assert (
        f"1 of {len(config)} keys differ from the defaults key value default seed 7 0"
        in Page(write_dashboard(folder)).text
    )


@pytest.mark.parametrize("missing", ["metrics.csv", "timing.csv", "layers.csv", "quant.csv", "config.yaml"])
def test_a_page_is_drawn_from_whatever_is_there(tmp_path: Path, missing: str) -> None:
    folder = make_run(tmp_path / "run", epochs=3, layers=LENET, drops=(1,))
    (folder / missing).unlink()
    text = Page(write_dashboard(folder)).text
    assert (f"{missing} is missing" in text) == (missing != "quant.csv")
    assert "Best validation accuracy" in text


def test_a_folder_of_rubbish_gets_a_page_that_says_so(tmp_path: Path) -> None:
    for name in ("metrics.csv", "timing.csv", "layers.csv", "quant.csv", "config.yaml", "summary.json", "status.json"):
        (tmp_path / name).write_bytes(b"\xff\xfe,\0\n" * 3)
    text = Page(write_dashboard(tmp_path)).text
    assert "No epoch has ended yet" in text
    assert "summary.json cannot be read" in text


def test_values_no_axis_can_show_and_odd_shapes_of_summaries(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", epochs=3, layers=LENET, drops=())
    path = folder / "metrics.csv"
    path.write_text(re.sub(r"(?m)^(2,.*,).*(,.*,.*,.*)$", r"\1inf\2", path.read_text()).replace("0.1,", "-inf,"))
    summary = json.loads((folder / "summary.json").read_text())
    odd = {"macs": [1], "environment": "here", "command": "one line", "packed_bytes": True, "best_val_top1": 10**400}
    (folder / "summary.json").write_text(json.dumps(summary | odd | {"model": {"name": "x"}}))
    text = Page(write_dashboard(folder)).text
    assert "Packed size — not measured" in text
    assert "one line" in text


@pytest.mark.parametrize(("bytes_left", "epochs_left"), [(200, 0), (500, 2)])
def test_a_finished_run_that_lost_epochs_says_so(tmp_path: Path, bytes_left: int, epochs_left: int) -> None:
    folder = make_run(tmp_path / "run", epochs=3, layers=LENET, drops=())
    torn = (folder / "metrics.csv").read_bytes()[:bytes_left]
    (folder / "metrics.csv").write_bytes(torn)
    text = Page(write_dashboard(folder)).text
    assert f"metrics.csv has {epochs_left} of 3 epochs" in text
    assert "No epoch has ended yet" not in text
    assert ("The run is over, but none of its epochs can be read." in text) == (epochs_left == 0)


def test_a_float_run_is_not_said_to_be_smaller_than_itself(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", epochs=1, layers=LENET, drops=(), quant="none")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"packed_bytes": summary["float_bytes"]}))
    text = Page(write_dashboard(folder)).text
    assert "Packed size 42.7 MiB 11.2 M parameters" in text
    assert "times smaller" not in text


def test_steps_that_were_skipped_stand_in_the_table_of_epochs(tmp_path: Path, whole: Path) -> None:
    assert "skipped steps" not in Page(whole).text
    folder = make_run(tmp_path / "run", epochs=2, layers=LENET, drops=())
    metrics = pd.read_csv(folder / "metrics.csv").assign(skipped_steps=[0, 3])
    metrics.to_csv(folder / "metrics.csv", index=False, lineterminator="\n")
    page = write_dashboard(folder)
    assert "images/s skipped steps" in Page(page).text
    rows = page.read_text().partition(">skipped steps<")[2].partition("</table>")[0]
    assert re.findall(r">([^<]*)</td></tr>", rows) == ["0", "3"]


def test_a_run_that_goes_on_shows_what_it_has_so_far(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", epochs=1, layers=LENET, drops=(), state="running")
    text = Page(write_dashboard(folder)).text
    assert "Best validation accuracy" in text
    assert "running , epoch 1 of 1" in text
    assert "summary.json" not in text


@pytest.mark.parametrize("state", ["running", "preempted", "failed"])
def test_a_run_without_an_end_says_what_it_costs_how_to_repeat_it_and_where_it_runs(tmp_path: Path, state: str) -> None:
    text = Page(write_dashboard(make_run(tmp_path / "run", epochs=1, layers=LENET, drops=(), state=state))).text
    assert "python -m runner model=resnet18 'name=a b'" in text
    assert "AMD EPYC 9554" in text
    assert "Packed size 1.46 MiB" in text
    assert "MACs per image 555 M" in text
    assert "Not recorded" not in text


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    page = write_dashboard(make_run(tmp_path / "run", epochs=4_000, layers=LENET, drops=(1_000, 3_000)))
    assert page.stat().st_size < LARGEST
    assert "500 of 4000 epochs" in Page(page).text


def test_a_page_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "dashboard.html"
    path.write_text("old")

    def full_disk(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("os.write", full_disk)
        with pytest.raises(StorageError, match="No space left"):
            write_page(path, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["dashboard.html"]
    assert path.read_text() == "old"
    assert write_page(path, "new \ud800").read_text() == "new ?"


def test_a_link_in_place_of_the_page_is_refused(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", epochs=1, layers=LENET, drops=())
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (folder / "dashboard.html").symlink_to(victim)
    with pytest.raises(StorageError, match="symbolic link"):
        write_dashboard(folder)
    assert victim.read_text() == "precious"


def test_a_timeline_shows_every_column_that_has_numbers(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"epoch": epoch, "step": epoch * 100, "phase": int(epoch > 3), "optimizer": HOSTILE, "lr": 0.1 * 0.5**epoch,
         "momentum": "", "weight_decay": 1e-4, "batch_size": 64 << (epoch > 5), "input_size": 32, "quant.tau": epoch / 10}
        for epoch in range(10)
    ]  # fmt: skip
    page = Page(write_timeline(rows, {"epoch": 10, "step": 950}, tmp_path / "timeline.html", HOSTILE))
    drawn = [div["id"] for div in page.all("div") if div.get("class") == "plot"]
    assert drawn == ["plot-lr", "plot-batch_size", "plot-quant_tau"]
    assert "The same throughout: weight decay 0.0001 , input size 32 px ." in page.text, (
        "what never changes needs no chart"
    )
    assert {tag for tag, _ in page.elements} <= OUR_TAGS
    assert HOSTILE in page.texts
    axes = json.loads(page.scripts[0])["axes"]
    ends = [axes[name]["end"][1] for name in ("epoch", "step")]
    assert ends == pytest.approx([10 * 1.03, 950 * 1.03]), "the last row holds up to the end"
    assert Page(write_timeline([], {"epoch": 0, "step": 0}, tmp_path / "empty.html", "nothing")).all("figure") == []


def test_a_setting_that_only_later_phases_have_is_not_said_to_hold_throughout(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"epoch": epoch, "step": epoch, "phase": epoch // 2, "lr": 0.1, "weight_decay": 1e-4 if epoch > 3 else None,
         "momentum": None} for epoch in range(6)
    ]  # fmt: skip
    page = Page(write_timeline(rows, {"epoch": 6, "step": 6}, tmp_path / "timeline.html", "a regime"))
    assert [div["id"] for div in page.all("div") if div.get("class") == "plot"] == ["plot-lr", "plot-weight_decay"]
    assert "The same throughout" not in page.text
    assert "momentum" not in page.text, "a column of nothing"


def test_a_setting_is_drawn_up_to_where_it_is_no_more(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"epoch": epoch, "step": 10 * epoch, "phase": epoch, "lr": 0.1, "momentum": 0.9 if epoch in (0, 2, 3) else None}
        for epoch in range(6)
    ]  # fmt: skip
    sheet = timeline_section(pd.DataFrame(rows), {"epoch": 6, "step": 60})[1]
    points = pd.DataFrame(sheet.moving["points"]["data"])
    drawn = points[points["momentum"].notna()]
    assert drawn["x_epoch"].to_list() == [0, 1, 2, 3, 4]
    assert drawn["x_step"].to_list() == [0, 10, 20, 30, 40]
    phases = pd.DataFrame(sheet.moving["phases"]["data"])
    assert phases["left_epoch"].to_list() == [0, 1, 2, 3, 4, 5]
    assert phases["right_epoch"].to_list() == [1, 2, 3, 4, 5, 6]


def test_in_a_browser_the_names_of_phases_move_no_axis(browser: Browser, tmp_path: Path) -> None:
    """They stand at 0 or 1 of a range of their own, where curves reach from 0.01 to 0.02."""
    rows: list[dict[str, object]] = [{"epoch": e, "step": e, "phase": e // 2, "lr": 0.01 + e / 500} for e in range(6)]
    browser.open(write_timeline(rows, {"epoch": 6, "step": 6}, tmp_path / "timeline.html", "a regime"))
    end = "[...Bokeh.documents[0].all_models].find(model => model.type === 'Figure').y_range.end"
    browser.wait_for(f"({end}) > 0.02")
    assert browser.ask(end) < 0.03


def test_numbers_come_with_units() -> None:
    assert [amount(value) for value in (0, 999, 12_345, 2.5e6, 3e9, float("nan"), "x", True)] == [
        ("0", ""), ("999", ""), ("12.3", "k"), ("2.5", "M"), ("3", "G"), ("—", ""), ("—", ""), ("—", "")]  # fmt: skip
    assert [size(value) for value in (0, 1023, 1024, 5 * 2**30, 2**60)] == [
        ("0", "B"), ("1,023", "B"), ("1", "KiB"), ("5", "GiB"), ("1,048,576", "TiB")]  # fmt: skip
    assert [duration(value) for value in (0, 119, 3600, 100_000, 400_000)] == [
        ("0", "s"), ("119", "s"), ("60", "min"), ("27 h 47", "min"), ("4 d 15", "h")]  # fmt: skip


def test_a_scale_of_colours_has_round_values_along_it() -> None:
    for low, high in ((0.0, 1.0), (0.9931, 0.9952), (-3.0, 250.0), (2e-6, 3e-6), (1e-4, 5.0)):
        _, start, end, landmarks = colours([low, high])
        assert (start, end) == (low, high)
        assert 2 <= len(landmarks) <= 6
        assert all(low < landmark < high for landmark in landmarks)
    assert colours([0.9931, 0.9952])[3] == [0.9935, 0.994, 0.9945, 0.995]
    assert colours([7.0, 7.0])[1:3] == (3.5, 10.5)


def test_a_logarithmic_axis_has_a_few_round_values_along_it() -> None:
    for low, high in ((0.001, 0.05), (0.02, 1.0), (0.003, 0.4), (1e-5, 0.1), (1e-30, 1e9), (7.0, 160.0)):
        for most in (5, 6):
            ticks = round_powers([high, low], most)
            assert 3 <= len(ticks) <= most
            assert all(low <= tick * 1.01 and tick <= high * 1.01 for tick in ticks)
            assert {f"{tick:.0e}"[0] for tick in ticks} <= set("1235")
    assert round_powers([0.05, 0.001]) == [0.001, 0.002, 0.005, 0.01, 0.02, 0.05]


def test_labels_stay_different_when_cut() -> None:
    labels = short_labels([f"features.{i}.a.very.long.common.name" for i in range(3)], 10)
    assert len(set(labels.values())) == 3


def test_embedded_json_cannot_end_its_script() -> None:
    embedded = embedded_json({"a": "</script><!--&"})
    assert not set("<>&") & set(embedded)
    assert json.loads(embedded) == {"a": "</script><!--&"}


MODELS = "[...Bokeh.documents[0].all_models]"
RANGE = f"(({{start, end}}) => [start, end])({MODELS}.find(m => m.name === 'x' && m.type === 'Range1d'))"
LABELS = f"{MODELS}.filter(m => m.name === 'x' && m.type === 'LinearAxis').map(m => m.axis_label)"
MUTED = f"{MODELS}.filter(m => (m.tags ?? [])[1] === 'loss:train_loss').map(m => m.muted)"
INK = f"{MODELS}.find(m => m.type === 'LinearAxis').major_label_text_color"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1280, 2560])
def test_in_a_browser_it_opens_without_a_request_or_a_complaint(
    browser: Browser, whole: Path, tmp_path: Path, scheme: str, width: int
) -> None:
    browser.open(whole, scheme=scheme, width=width)
    browser.picture(tmp_path / f"run-{scheme}-{width}.png")
    assert browser.ask("document.documentElement.scrollWidth") <= width
    colours = browser.ask("[getComputedStyle(document.body).backgroundColor, " + INK + "]")
    assert colours == {"light": ["rgb(244, 245, 247)", "#555d68"], "dark": ["rgb(15, 18, 22)", "#a3acb8"]}[scheme]
    assert browser.requests() == [whole.as_uri()]
    assert browser.complaints() == []


def test_in_a_browser_the_controls_do_what_they_say(browser: Browser, whole: Path) -> None:
    browser.open(whole)
    assert browser.ask(RANGE) == [0, pytest.approx(120 * 1.03)]
    browser.ask("document.querySelector('input[value=step]').click()")
    steps = int((whole.parent / "metrics.csv").read_text().splitlines()[-1].split(",")[1])
    assert browser.ask(RANGE) == [0, pytest.approx(steps * 1.03)]
    assert set(browser.ask(LABELS)) == {"optimizer steps"}
    browser.ask("document.querySelector('[data-move=closer]').click()")
    start, end = browser.ask(RANGE)
    assert end - start == pytest.approx(steps * 1.03 / 2)
    browser.ask("document.querySelector('[data-move=reset]').click()")
    assert browser.ask(RANGE)[0] == 0
    assert set(browser.ask(MUTED)) == {False}
    browser.ask("document.querySelector('[data-series=\"loss:train_loss\"]').click()")
    assert set(browser.ask(MUTED)) == {True}
    browser.ask(
        "document.querySelector('select').selectedIndex = 1; "
        "document.querySelector('select').dispatchEvent(new Event('change', {bubbles: true}))"
    )
    assert browser.ask("[...document.querySelectorAll('.heat figure')].map(f => f.hidden)") == [True, False, True, True]
    column = "[...document.querySelectorAll('table')].find(t => t.caption.textContent.includes('layers;'))"
    browser.ask(f"{column}.tHead.rows[0].cells[6].querySelector('button').click()")
    parameters = browser.ask(f"[...{column}.tBodies[0].rows].map(r => Number(r.cells[6].dataset.sort))")
    assert parameters == sorted(parameters)
    assert browser.complaints() == []


def test_in_a_browser_a_window_at_an_edge_keeps_its_width(browser: Browser, whole: Path) -> None:
    browser.open(whole)
    everything = browser.ask(RANGE)
    browser.ask("document.querySelector('[data-move=closer]').click()")
    start, end = browser.ask(RANGE)
    for way, edge in (("later", everything[1]), ("earlier", 0)):
        for _ in range(5):
            browser.ask(f"document.querySelector('[data-move={way}]').click()")
        left, right = browser.ask(RANGE)
        assert right - left == pytest.approx(end - start)
        assert edge in (left, pytest.approx(right))
    browser.ask("document.querySelector('[data-move=wider]').click()")
    assert browser.ask(RANGE) == everything


def test_in_a_browser_tooltips_count_epochs_as_the_axis_does(browser: Browser, whole: Path) -> None:
    browser.open(whole)
    box = browser.box("#plot-accuracy")
    browser.hover(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    said = "document.querySelector('.bk-Tooltip')?.shadowRoot.querySelector('.bk-tooltip-content')?.innerText"
    browser.wait_for(said)
    told = re.search(r"epochs completed:\s*(\d+)\s*step:\s*([\d,]+).*val top-1:\s*([\d.]+)", browser.ask(said), re.S)
    assert told
    epochs, step, top1 = (float(part.replace(",", "")) for part in told.groups())
    row = (whole.parent / "metrics.csv").read_text().splitlines()[int(epochs)].split(",")
    assert int(row[0]) == epochs - 1
    assert int(row[1]) == step
    assert any(float(cell or "nan") == pytest.approx(top1, rel=1e-7) for cell in row[2:])


TOLD = "document.querySelector('.bk-Tooltip')?.shadowRoot.querySelector('.bk-tooltip-content')?.innerText"


def told_at(browser: Browser, chart: str, share: float) -> str:
    """What the tooltip of a chart says at a share of its width."""
    box = browser.box(f"#plot-{chart}")
    view = f"Bokeh.index.find_one_by_id({MODELS}.find(m => m.type === 'Figure' && m.y_range.renderers?.some("
    view += f"r => r.tags?.[1]?.startsWith('{chart}:'))).id)"
    inner = browser.ask(f"(({{x0, x1}}) => [x0, x1])({view}.frame.bbox)")
    browser.hover(box["x"] + inner[0] + (inner[1] - inner[0]) * share, box["y"] + box["height"] / 2)
    browser.wait_for(TOLD)
    return re.sub(r"\s+", " ", str(browser.ask(TOLD)))


def test_in_a_browser_charts_of_steps_say_what_holds_under_the_mouse(browser: Browser, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"epoch": epoch, "step": 10 * epoch, "phase": epoch, "lr": 0.1 * 0.5**epoch} for epoch in range(4)
    ]
    browser.open(write_timeline(rows, {"epoch": 4, "step": 40}, tmp_path / "timeline.html", "a regime"))
    assert told_at(browser, "lr", 1.9 / 4.12) == "epoch: 1 step: 10 phase: 1 learning rate: 0.05", "up to the next"
    browser.open(write_dashboard(make_run(tmp_path / "run", epochs=4, layers=LENET, drops=(2,))))
    text = told_at(browser, "lr", 2.1 / 4.12)
    assert re.fullmatch(r"epochs completed: 3 step: [\d,]+ phase: 1 learning rate: 0.01", text), "of the third epoch"


def test_in_a_browser_a_logarithmic_axis_of_less_than_two_decades_is_labelled_all_along(
    browser: Browser, tmp_path: Path
) -> None:
    rows: list[dict[str, object]] = [{"epoch": e, "step": e, "phase": e, "lr": (0.05, 0.001)[e]} for e in range(2)]
    browser.open(write_timeline(rows, {"epoch": 2, "step": 2}, tmp_path / "timeline.html", "a regime"))
    written = "(axis => axis.formatter.doFormat([...axis.ticker.ticks], {loc: 0}))"
    labels = browser.ask(f"{written}({MODELS}.find(m => m.type === 'LogAxis'))")
    assert labels == ["0.001", "0.002", "0.005", "0.01", "0.02", "0.05"]


def test_in_a_browser_axes_write_numbers_as_the_cards_do(browser: Browser, whole: Path) -> None:
    browser.open(whole)
    formatter = f"{MODELS}.find(m => m.type === 'NumeralTickFormatter').doFormat"
    for numbers, labels in (
        ("[0, 0.8, 0.25, 1e-4, 2000]", ["0", "0.8", "0.25", "0.0001", "2,000"]),
        ("[0, 500, 2500, 1e4]", ["0", "500", "2.5k", "10k"]),
        ("[1.5e6, 2e9]", ["1.5M", "2G"]),
        ("[2e19, -3e12, 5e-7]", ["2e19", "-3e12", "5e-7"]),
    ):
        assert browser.ask(f"{formatter}({numbers}, {{loc: 0}})") == labels


def test_in_a_browser_keys_move_the_charts_when_one_has_the_focus(browser: Browser, whole: Path) -> None:
    def press(key: str, modifiers: int = 0) -> None:
        for kind in ("keyDown", "keyUp"):
            browser.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, modifiers=modifiers)

    browser.open(whole)
    everything = browser.ask(RANGE)
    press("+")
    assert browser.ask(RANGE) == everything, "the page has the focus, no chart"
    for _ in range(20):
        if browser.ask("document.activeElement.closest('.plot') !== null"):
            break
        press("Tab")
    press("+")
    start, end = browser.ask(RANGE)
    assert end - start == pytest.approx(everything[1] / 2)
    press("ArrowLeft")
    assert browser.ask(RANGE)[0] == pytest.approx(start - (end - start) / 4)
    ctrl = 2
    press("-", ctrl)
    assert browser.ask(RANGE)[0] == pytest.approx(start - (end - start) / 4), "that is the browser's"
    press("Escape")
    assert browser.ask(RANGE) == everything


def test_in_a_browser_a_drag_zooms_all_charts_and_a_double_click_shows_everything(
    browser: Browser, whole: Path
) -> None:
    browser.open(whole)
    box = browser.box("#plot-accuracy")
    y = box["y"] + box["height"] / 2
    for kind, share in (("mousePressed", 0.4), ("mouseMoved", 0.5), ("mouseMoved", 0.6), ("mouseReleased", 0.6)):
        x = box["x"] + box["width"] * share
        browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)
    browser.wait_for(f"{RANGE}[0] > 20")
    start, end = browser.ask(RANGE)
    assert 20 < start < end < 90
    browser.ask("document.querySelector('[data-move=later]').click()")
    assert browser.ask(RANGE) == [pytest.approx(start + (end - start) / 4), pytest.approx(end + (end - start) / 4)]
    shared = f"new Set({MODELS}.filter(m => m.type === 'Figure').map(m => m.x_range.id)).size"
    assert browser.ask(shared) == 1, "all charts move together"
    browser.ask("document.getElementById('plot-loss').dispatchEvent(new Event('dblclick'))")
    assert browser.ask(RANGE) == [0, pytest.approx(120 * 1.03)]


def test_in_a_browser_hostile_strings_do_nothing(browser: Browser, hostile: Path) -> None:
    browser.open(hostile)
    browser.ask("document.getElementById('plot-loss').scrollIntoView({block: 'center'})")
    box = browser.ask("document.getElementById('plot-loss').getBoundingClientRect().toJSON()")
    middle = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", **middle)
    browser.wait_for("document.querySelector('.bk-Tooltip')?.shadowRoot.textContent.includes('window.hit')")
    assert browser.ask("window.hit") is None
    assert browser.ask("document.querySelector('h1').textContent") == HOSTILE
    assert browser.ask("document.querySelector('.bk-Tooltip').shadowRoot.querySelector('img, script')") is None
    assert browser.requests() == [hostile.as_uri()]
    assert browser.complaints() == []


def test_in_a_browser_the_timeline_and_a_broken_run_open_too(browser: Browser, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"epoch": 0, "step": 0, "phase": 0, "lr": 0.1}]
    for path in (
        write_timeline(rows, {"epoch": 1, "step": 1}, tmp_path / "timeline.html", "one point"),
        write_dashboard(tmp_path),
    ):
        browser.open(path)
        assert browser.requests() == [path.as_uri()]
        assert browser.complaints() == []


def test_the_float_run_beside_it_is_what_a_run_is_compared_with(tmp_path: Path) -> None:
    mine = make_run(tmp_path / "lsq", epochs=2, layers=LENET, drops=())
    base = make_run(tmp_path / "none", epochs=2, layers=LENET, drops=(), quant="none")
    other = make_run(tmp_path / "none-other-seed", epochs=2, layers=LENET, drops=(), quant="none")
    wider = make_run(tmp_path / "a-wider-network", epochs=2, layers=LENET, drops=(), quant="none")
    slower = make_run(tmp_path / "another-rate", epochs=2, layers=LENET, drops=(), quant="none")
    for folder, key in ((wider, "model"), (slower, "regime")):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config[key] = {**config.get(key, {}), "made_up": 3}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for folder, seed, top1 in ((mine, 0, 98.5), (base, 0, 99.0), (other, 1, 10.0), (wider, 0, 20.0), (slower, 0, 30.0)):
        path = folder / "summary.json"
        told = {"seed": seed, "test_top1": top1, "best_val_top1": top1 + 0.25 * (folder == mine)}
        path.write_text(json.dumps(json.loads(path.read_text()) | told))
    text = Page(write_dashboard(mine)).text
    assert "Test accuracy 98.50 % \N{MINUS SIGN}0.50 points to float (99.00 %, none)" in text
    assert "Best validation accuracy 98.75 % \N{MINUS SIGN}0.25 points to float (99.00 %); after epoch" in text
    assert "points to float" not in Page(write_dashboard(base)).text
    for folder in (base, slower):
        folder.rename(tmp_path.parent / f"{tmp_path.name}-{folder.name}")
    assert "points to float" not in Page(write_dashboard(mine)).text
