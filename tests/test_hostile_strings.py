"""Whatever the strings of a run are, every page shows them as text: in a real browser, with every control and tooltip tried."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from browser import Browser
from run_samples import LENET, make_run
from test_live import LiveServer

from runner.bench.page import Bar, Charts, facts_table, write_bench_page
from runner.columns import METRICS
from runner.pages.compare import write_comparison
from runner.pages.dashboard import write_dashboard, write_timeline
from runner.pages.records import find_runs
from runner.pages.report import report
from runner.pages.search import write_search_page

BAIT = "<img src=//x.example/i onerror=window.hit=1>"
HOSTILE = (
    f"</script></title></style>{BAIT}<script>window.hit=1</script><svg/onload=window.hit=1>'\"&{{{{7*7}}}}$$x^2$$"
    "<%= window.hit=1 %>@epoch{safe}${window.hit=1}[a](javascript:window.hit=1)\u2028\u202e=1"
)
FOLDER = "&lt; '\"><img src=x onerror=window.hit=1><svg onload=window.hit=1> $$x$$ #?%2e@{x}"  # a name of a folder holds no slash
PAGES = ("run", "comparison", "timeline", "report", "search", "front", "bench")


def hostile_run(folder: Path, quant: str, seed: int) -> Path:
    """Every name, value, reason, layer, heading and cell of text of this run is bait."""
    make_run(folder, epochs=4, layers=LENET, drops=(2,), words=HOSTILE, seed=seed)
    for name in ("metrics.csv", "layers.csv", "quant.csv"):
        head, *rows = (folder / name).read_text(encoding="utf-8").split("\n")
        quoted = '"' + HOSTILE.replace('"', '""') + '"'
        lines = [f"{head},{quoted}", *(f"{row},{quoted}" for row in rows if row), ""]
        (folder / name).write_text("\n".join(lines), encoding="utf-8")
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text()) | {"quant": {"name": HOSTILE + quant, HOSTILE: quant}}
    path.write_text(yaml.safe_dump(config, allow_unicode=True))
    path = folder / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"reason": HOSTILE, "epochs": HOSTILE}))
    return folder


def search_page(folder: Path, *goals: str) -> Path:
    folder.mkdir()
    dimensions = [f"lr{BAIT}", "rate"]
    (folder / "search.json").write_text(json.dumps({"name": HOSTILE, "objectives": goals, "dimensions": dimensions}))
    columns = ["trial", "state", "best", *goals, *dimensions, "run", "reason"]
    lines = [
        [str(i), "complete", str(i == 1), *[str(90 + i)] * len(goals), BAIT, str(0.1 * i), BAIT, BAIT] for i in range(3)
    ]
    (folder / "trials.csv").write_text("\n".join(",".join(line) for line in [columns, *lines]) + "\n")
    return write_search_page(folder)


def bench_page(path: Path) -> Path:
    charts = Charts()
    drawn = charts.bars("time", HOSTILE, [Bar(HOSTILE, 1.0, 0.9, 1.1), Bar(BAIT, 2.0, foreign=True)])
    return write_bench_page(path, HOSTILE, HOSTILE, [drawn, facts_table({HOSTILE: HOSTILE})], charts)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile") / "runs"
    for seed, quant in enumerate(("a", "b")):
        hostile_run(root / f"{FOLDER}{quant}", quant, seed)
    hostile_run(root / "javascript:window.hit=1", "c", 2)
    (root / f"broken{FOLDER}").mkdir()
    (root / f"broken{FOLDER}" / "metrics.csv").write_bytes(b"\xff\0")
    return root


@pytest.fixture(scope="module")
def pages(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("pages")
    rows: list[dict[str, object]] = [
        dict.fromkeys(METRICS[:2], epoch) | {"phase": f"{epoch}{HOSTILE}", "optimizer": HOSTILE, "lr": 0.1, BAIT: 1}
        for epoch in range(3)
    ]
    assert report([str(runs), "--format", "html", "--out", str(place)]) == 0
    return {
        "run": write_dashboard(runs / f"{FOLDER}a"),
        "comparison": write_comparison(find_runs(runs), runs / "comparison.html"),
        "timeline": write_timeline(rows, {"epoch": 3, "step": 3}, place / "timeline.html", HOSTILE),
        "report": place / "report.html",
        "search": search_page(place / "one", "best_val_top1"),
        "front": search_page(place / "two", "best_val_top1", "packed_bytes"),
        "bench": bench_page(place / "bench.html"),
    }


TRY_EVERYTHING = """(() => {
  for (const details of document.querySelectorAll('details')) details.open = true;
  for (const choice of document.querySelectorAll('select, input[type=radio]')) {
    for (let index = 0; index < (choice.options?.length ?? 1); index++) {
      if (choice.options) choice.selectedIndex = index; else choice.click();
      choice.dispatchEvent(new Event('change', {bubbles: true}));
    }
  }
  for (const button of [...document.querySelectorAll('button')]) button.isConnected && button.click();
  return document.documentElement.textContent.length;
})()"""
FOREIGN = """(() => {
  const tags = ['IMG', 'IFRAME', 'OBJECT', 'EMBED', 'BASE', 'FORM', 'MATH', 'MJX-CONTAINER'];
  const active = ({name, value}) => name.startsWith('on') || /^\\s*javascript:/i.test(value);
  const everything = [...document.querySelectorAll('*')].flatMap(e => [e, ...(e.shadowRoot?.querySelectorAll('*') ?? [])]);
  return everything.filter(e => tags.includes(e.tagName) || e.tagName === 'SCRIPT' && e.src || [...e.attributes].some(active))
    .map(e => e.outerHTML.slice(0, 200));
})()"""


def touch_everything(browser: Browser) -> None:
    """Use every control, and let the pointer wander over every chart, so that every tooltip opens."""
    browser.ask(TRY_EVERYTHING)
    for place in browser.ask(
        "[...document.querySelectorAll('.plot')].filter(p => p.offsetParent).map(p => '#' + p.id)"
    ):
        box = browser.box(place)
        for step in range(6):
            browser.hover(box["x"] + box["width"] * (0.15 + 0.14 * step), box["y"] + box["height"] * (0.2 + 0.1 * step))


def assert_deaf(browser: Browser, requests: list[str]) -> None:
    assert browser.ask("window.hit") is None
    assert browser.ask(FOREIGN) == []
    assert sorted(set(browser.requests())) == requests
    assert browser.complaints() == []


@pytest.mark.parametrize("name", PAGES)
def test_a_page_shows_hostile_strings_as_text(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.open(pages[name], waits=name != "report")
    assert browser.ask("document.title").strip()
    assert BAIT in browser.ask("document.body.textContent")
    touch_everything(browser)
    assert_deaf(browser, [pages[name].resolve().as_uri()])


def test_live_pages_show_hostile_strings_as_text(browser: Browser, runs: Path) -> None:
    server = LiveServer(runs)
    try:
        links: list[Any] = [server.address]
        for address in links:
            browser.open(address)
            if address == server.address:
                browser.wait_for("document.getElementById('count').textContent.includes('3 runs of 4')")
                links += browser.ask("[...document.querySelectorAll('#results a, #broken a')].map(a => a.href)")
            touch_everything(browser)
            own = f"ws://127.0.0.1:{server.port}/live/ws"
            assert_deaf(browser, sorted({address, *[url for url in browser.requests() if url.startswith(own)]}))
        assert len(links) == 5
    finally:
        server.close()


def test_links_lead_to_run_pages_whatever_folders_are_called(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["comparison"])
    links = browser.ask("[...document.querySelectorAll('#results a, #broken a')].map(a => a.href)")
    folders = [folder.resolve() for folder in find_runs(pages["comparison"].parent)]
    places = [pages["run"].resolve() if folder == pages["run"].parent.resolve() else folder for folder in folders]
    assert sorted(links) == sorted(place.as_uri() for place in places), "to a folder where no page was drawn"
    assert len(links) == 4
