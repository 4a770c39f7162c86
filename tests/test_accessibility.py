"""axe-core finds nothing serious on any page, in light and dark."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from run_samples import LENET, make_run
from test_hostile_strings import bench_page, search_page
from test_live import LiveServer

from runner.pages.compare import write_comparison
from runner.pages.dashboard import write_dashboard, write_timeline
from runner.pages.records import find_runs
from runner.pages.report import report

SERIOUS = {"serious", "critical"}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("outputs")
    for quant, seed in (("none", 0), ("lsq", 0), ("lsq", 1)):
        make_run(root / "runs" / f"{quant}{seed}", epochs=6, layers=LENET, drops=(3,), quant=quant, seed=seed)
    rows: list[dict[str, object]] = [{"epoch": epoch, "step": epoch, "phase": 0, "lr": 0.1} for epoch in range(3)]
    assert report([str(root / "runs"), "--format", "html", "--out", str(root / "report")]) == 0
    return {
        "run": write_dashboard(root / "runs" / "lsq0"),
        "comparison": write_comparison(find_runs(root / "runs"), root / "comparison.html"),
        "timeline": write_timeline(rows, {"epoch": 3, "step": 3}, root / "timeline.html", "a regime"),
        "report": root / "report" / "report.html",
        "search": search_page(root / "search", "best_val_top1", "packed_bytes"),
        "bench": bench_page(root / "bench.html"),
    }


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["run", "comparison", "timeline", "report", "search", "bench"])
def test_axe_finds_nothing_serious(
    browser: Browser, pages: dict[str, Path], tmp_path: Path, name: str, scheme: str
) -> None:
    browser.open(pages[name], scheme=scheme, waits=name != "report")
    browser.picture(tmp_path / f"{name}-{scheme}.png")
    assert serious_faults(browser) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_on_live_pages(browser: Browser, pages: dict[str, Path], scheme: str) -> None:
    server = LiveServer(pages["run"].parent.parent)
    try:
        browser.open(server.address, scheme=scheme)
        browser.wait_for("document.getElementById('count').textContent.includes('3 runs of 3')")
        assert serious_faults(browser) == []
        browser.open(browser.ask("document.querySelector('#results a').href"), scheme=scheme)
        assert serious_faults(browser) == []
    finally:
        server.close()


def serious_faults(browser: Browser) -> list[dict[str, Any]]:
    browser.ask((files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8") + ";0")
    found: list[dict[str, Any]] = browser.ask(
        "axe.run(document, {resultTypes: ['violations']}).then(r => r.violations.map(v => "
        "({id: v.id, impact: v.impact, where: v.nodes.slice(0, 3).map(n => n.html.slice(0, 150))})))"
    )
    return [violation for violation in found if violation["impact"] in SERIOUS]
