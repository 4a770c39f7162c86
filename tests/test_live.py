"""Live pages: they follow what is written, keep where one looks, and answer nobody else."""

import fcntl
import gc
import http.client
import json
import math
import os
import resource
import socket
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from browser import Browser
from conftest import Runner, environment
from run_samples import LENET, make_run

from runner.pages.dashboard import run_charts, run_parts
from runner.pages.entries import identity
from runner.pages.live_documents import news_of
from runner.pages.records import Memory, read_run
from runner.pages.watch import Watch

PATIENCE = 60.0


class LiveServer:
    """`python -m runner dashboard` as a process of its own, for one folder."""

    def __init__(self, folder: Path, *words: str) -> None:
        command = [sys.executable, "-m", "runner", "dashboard", str(folder), "--port", "0", *words]
        self.process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.address = self.process.stdout.readline().split()[1]
        self.port = int(self.address.split(":")[2].split("/")[0])

    def get(self, path: str, host: str = "", **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request("GET", path, headers={"Host": host or f"127.0.0.1:{self.port}", **headers})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    @property
    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    @property
    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A finished run, one that goes on, and a folder of rubbish."""
    make_run(tmp_path / "runs" / "whole", epochs=5, layers=LENET, drops=())
    growing(tmp_path / "runs" / "growing", tmp_path / "source", 4)
    (tmp_path / "runs" / "rubbish").mkdir()
    for name in ("metrics.csv", "summary.json", "status.json", "config.yaml"):
        (tmp_path / "runs" / "rubbish" / name).write_bytes(b"\xff\0{")
    return tmp_path / "runs"


@pytest.fixture
def server(runs: Path) -> Iterator[LiveServer]:
    instance = LiveServer(runs)
    yield instance
    instance.close()


def growing(folder: Path, source: Path, epochs: int) -> None:
    """A run that is known so far; `grow` writes what it does next."""
    make_run(source, epochs=60, layers=LENET, drops=(), state="running")
    folder.mkdir(parents=True)
    for name in ("layers.csv", "config.yaml", "status.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    grow(folder, source, epochs)


def grow(folder: Path, source: Path, epochs: int, tail: bytes = b"") -> None:
    for name, lines in (
        ("metrics.csv", epochs + 1),
        ("timing.csv", epochs + 1),
        ("quant.csv", epochs * len(LENET) + 1),
    ):
        rows = (source / name).read_bytes().splitlines(keepends=True)
        (folder / name).write_bytes(b"".join(rows[:lines]) + tail)


MODELS = "[...Bokeh.documents[0].all_models]"
POINTS = f"[...{MODELS}.find(m => m.type === 'ColumnDataSource' && m.data.val_top1).data.val_top1].length"
RANGE = f"(({{start, end}}) => [start, end])({MODELS}.find(m => m.name === 'x' && m.type === 'Range1d'))"


def test_a_run_is_followed_and_the_view_stays(browser: Browser, server: LiveServer, runs: Path) -> None:
    source = runs.parent / "source"
    watch = Watch([runs])
    watch.refresh(PATIENCE)
    number = next(key for key, run in watch.runs.items() if run.folder.name == "growing")
    browser.open(f"{server.address}run?id={number}")
    assert browser.ask(POINTS) == 5  # four epochs, and the start
    assert browser.ask(RANGE)[1] == pytest.approx(4 * 1.03)
    grow(runs / "growing", source, 6, tail=b"6,12")
    browser.wait_for(f"{POINTS} === 7")
    browser.wait_for("document.querySelector('[data-part=epochs] tbody').rows.length === 6")
    assert "epoch 6 of 60" in browser.ask("document.querySelector('header').textContent")
    assert browser.ask(RANGE)[1] == pytest.approx(6 * 1.03), "what is shown whole grows with the run"
    browser.ask("document.querySelector('[data-move=closer]').click()")
    browser.ask("document.querySelector('[data-part=epochs] details').open = true")
    before = browser.ask(RANGE)
    grow(runs / "growing", source, 9)
    browser.wait_for(f"{POINTS} === 10")
    assert browser.ask(RANGE) == before, "a part that somebody looks at stays"
    browser.wait_for("document.querySelector('[data-part=epochs] tbody').rows.length === 9")
    assert browser.ask("document.querySelector('[data-part=epochs] details').open")
    assert browser.complaints() == []


def test_a_followed_page_shows_what_one_that_is_opened_now_shows(tmp_path: Path) -> None:
    growing(tmp_path / "run", tmp_path / "source", 3)
    run = read_run(tmp_path / "run")
    *_, sheet = run_charts(run)
    sheet.draw()
    parts = run_parts(run)
    for epochs in (4, 4, 40):
        grow(tmp_path / "run", tmp_path / "source", epochs)
        run = read_run(tmp_path / "run")
        assert "reload" not in news_of(run, sheet, parts)["part"]
        *_, fresh = run_charts(run)
        models = {name: sheet.document.get_model_by_name(name) for name in fresh.moving}
        assert {"points", "best accuracy", "health", "colours clip_ratio"} <= {name for name in models if models[name]}
        for name, model in models.items():
            for key, value in fresh.moving[name].items() if model else ():
                np.testing.assert_equal(getattr(model, key), value)
        assert parts == run_parts(run)
    make_run(tmp_path / "other", epochs=9, layers=LENET, drops=(3,))
    assert news_of(read_run(tmp_path / "other"), sheet, parts)["part"] == ["reload"], "its phases are new to this page"


def test_a_regime_of_many_phases_is_followed_through_all_of_them(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / str(n), epochs=n, layers=LENET, drops=(2, 4, 6, 8)) for n in (6, 8, 10)]
    *_, sheet = run_charts(read_run(folders[0]))
    sheet.draw()
    names = [model.name for model in sheet.document.models if model.name in sheet.moving]
    assert sorted(names) == sorted(set(names)), "what moves is found by its name"
    assert {"phases", "shaded", "points", "marks accuracy:val_top1"} <= set(names)
    for phases, folder in enumerate(folders[1:], 4):
        run = read_run(folder)
        assert news_of(run, sheet, run_parts(run))["part"] == ["facts"]
        assert len(sheet.document.get_model_by_name("phases").data["left"]) == phases
        assert sheet.document.get_model_by_name("shaded").indices == list(range(1, phases, 2))


def test_the_list_of_runs_follows_too_and_names_what_is_broken(
    browser: Browser, server: LiveServer, runs: Path
) -> None:
    browser.open(server.address)
    browser.wait_for("document.getElementById('broken').textContent.includes('1 folder could not be read')")
    assert "rubbish" in browser.ask("document.getElementById('broken').textContent")
    browser.wait_for("document.getElementById('count').textContent.includes('2 runs of 3')")
    make_run(runs / "late", epochs=2, layers=LENET, drops=(), quant="xnor")
    browser.wait_for("document.getElementById('count').textContent.includes('3 runs of 4')")
    (runs / "late" / "config.yaml").write_bytes(b"\xff")
    link = browser.ask("document.querySelector('#results a').href")
    browser.open(link)
    assert browser.complaints() == []


def test_a_folder_without_a_run_is_followed_until_there_is_one(browser: Browser, tmp_path: Path) -> None:
    browser.open("about:blank", waits=False)  # the page before asks for a server that has ended
    server = LiveServer(tmp_path)
    try:
        browser.open(server.address)
        assert "No run yet" in browser.ask("document.getElementById('count').textContent")
        growing(tmp_path / "runs" / "growing", tmp_path / ".source", 3)
        browser.wait_for("document.getElementById('count').textContent.includes('1 run of 1')")
        browser.wait_for("document.querySelector('#results tbody').textContent.includes('3 of 60')")
        assert not browser.ask("document.getElementById('costs-none').hidden")
        assert browser.complaints() == []
    finally:
        server.close()


def test_settings_of_runs_that_come_to_an_empty_folder_are_shown(browser: Browser, tmp_path: Path) -> None:
    browser.open("about:blank", waits=False)  # the page before asks for a server that has ended
    server = LiveServer(tmp_path)
    try:
        browser.open(server.address)
        for count, quant in enumerate(("xnor", "lsq"), 1):
            make_run(tmp_path / "runs" / quant, epochs=2, layers=LENET, drops=(), quant=quant)
            browser.wait_for(f"document.getElementById('count').textContent.startsWith('{count} run')")
        labels = "[...document.querySelectorAll('#results tbody th')].map(cell => cell.textContent).sort().join()"
        browser.wait_for(f"{labels} === 'lsq,xnor'")
        assert "—" not in browser.ask("document.getElementById('settings').textContent")
        assert browser.complaints() == []
    finally:
        server.close()


def test_rows_are_told_again_when_the_first_config_says_what_is_usual(tmp_path: Path) -> None:
    (make_run(tmp_path / "bare", epochs=2, layers=LENET, drops=()) / "config.yaml").unlink()
    watch = Watch([tmp_path])
    watch.refresh(PATIENCE)
    assert not watch.base
    make_run(tmp_path / "whole", epochs=2, layers=LENET, drops=())
    watch._next_search = 0.0
    watch.refresh(PATIENCE)
    bare = next(json.loads(run.row) for run in watch.runs.values() if run.folder.name == "bare")
    assert bare["settings"]["regime.phases.0.lr"] is None


def test_a_run_opens_its_live_page_which_ends_after_it(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`trainer.dashboard=open`, with a browser that writes down what it is asked to open."""
    browser, opened = tmp_path / "browser", tmp_path / "opened"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}.part && mv {opened}.part {opened}\n')
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", str(browser))
    done = runner("trainer.dashboard=open", "dataset.limit=64", "epochs=1", "name=followed", timeout=110)
    assert done.returncode == 0, done.stderr
    wait_until(opened.exists)
    address = urlsplit(opened.read_text().strip())
    assert address.hostname == "127.0.0.1"
    (folder,) = (tmp_path / "outputs" / "runs").iterdir()
    assert address.query == f"id={identity(folder)}", "the page of this run, not the list"
    wait_until(lambda: not answers(address.port or 0))
    assert (folder / "dashboard.html").is_file(), "the page to keep is written besides"


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_nobody_else_is_answered(server: LiveServer) -> None:
    assert server.get("/")[0] == 200
    assert server.get("/", host="evil.example")[0] == 403
    assert server.get("/", host=f"127.0.0.1:{server.port}.evil.example")[0] == 403
    for path in ("/run?id=../../etc/passwd", "/run?id=..%2F..%2Fetc%2Fpasswd", "/run", "/static/../../../etc/passwd",
                 "/static/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "/run?id=%00"):  # fmt: skip
        status, body = server.get(path)
        assert status in (400, 403, 404), path
        assert "root:" not in body
    assert server.get("/live")[0] == 403, "a session is opened by our pages only"
    assert server.get("/live/autoload.js?bokeh-autoload-element=1")[0] == 403


def websocket(server: LiveServer, origin: str | None, token: str) -> int:
    """The status with which a websocket is answered: 101 is a connection."""
    headers = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
               "Sec-WebSocket-Version": "13", "Sec-WebSocket-Protocol": f"bokeh, {token}"}  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    connection.request("GET", "/live/ws", headers=headers | ({"Origin": origin} if origin else {}))
    answer = connection.getresponse()
    first = answer.status
    if first != 101:
        return first
    connection.sock.settimeout(PATIENCE)
    return 101 if len(connection.sock.recv(200)) > 20 else 403  # a refused session is closed before it says anything


def test_another_site_gets_no_websocket(server: LiveServer) -> None:
    page = server.get("/")[1]
    token = json.loads(page.split('id="figures">')[1].split("</script>")[0])["token"]
    here = f"http://127.0.0.1:{server.port}"
    assert websocket(server, here, token) == 101
    assert websocket(server, "http://evil.example", token) == 403
    assert websocket(server, f"{here}.evil.example", token) == 403
    body, _, signature = token.rpartition(".")
    assert websocket(server, here, f"{body}.{signature[::-1]}") != 101
    assert websocket(server, None, body) != 101


def test_another_address_asks_for_the_secret(runs: Path) -> None:
    address = "127.0.0.2"
    server = LiveServer(runs, "--host", address)
    try:
        assert "?secret=" in server.address
        secret = server.address.split("secret=")[1]
        for query, cookie, status in (("", "", 403), ("?secret=wrong", "", 403), (f"?secret={secret}", "", 200),
                                      ("", f"runner-secret={secret}", 200), ("", "runner-secret=x", 403)):  # fmt: skip
            connection = http.client.HTTPConnection(address, server.port, timeout=PATIENCE)
            connection.request("GET", f"/{query}", headers={"Cookie": cookie} if cookie else {})
            assert connection.getresponse().status == status, (query, cookie)
    finally:
        server.close()


def test_memory_and_time_stay_bounded(browser: Browser, server: LiveServer, runs: Path) -> None:
    """Many epochs in a short time: what a day of a slow run would bring."""
    source = runs.parent / "source"
    browser.open(server.address)
    browser.wait_for("document.getElementById('count').textContent.includes('2 runs')")
    grow(runs / "growing", source, 10)
    time.sleep(3)
    before, heap = server.resident_bytes, _heap(browser)
    for epochs in [*range(11, 60), *range(11, 60)]:
        grow(runs / "growing", source, epochs)
        time.sleep(0.05)
    time.sleep(3)
    assert server.resident_bytes - before < 40_000_000
    assert _heap(browser) - heap < 40_000_000
    idle = server.cpu_seconds
    time.sleep(3)
    assert server.cpu_seconds - idle < 0.5, "who follows nothing new does next to nothing"


def test_what_follows_a_run_keeps_nothing_of_looks_that_are_over(tmp_path: Path) -> None:
    """Many looks, without the waiting in between, at a run that grows and is cut back, as one that is resumed."""
    growing(tmp_path / "runs" / "run", tmp_path / "source", 5)
    watch, memory = Watch([tmp_path / "runs"]), Memory()
    run = read_run(tmp_path / "runs" / "run", memory=memory)
    *_, sheet = run_charts(run)
    sheet.draw()
    parts = run_parts(run)

    def look(times: int) -> int:
        for turn in range(times):
            grow(tmp_path / "runs" / "run", tmp_path / "source", 20 + turn % 30)
            watch.refresh(PATIENCE)
            news_of(read_run(tmp_path / "runs" / "run", memory=memory), sheet, parts)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = look(31)
        assert look(90) - before < 300_000
    finally:
        tracemalloc.stop()


def _heap(browser: Browser) -> int:
    browser.call("HeapProfiler.collectGarbage")
    return int(browser.call("Runtime.getHeapUsage")["usedSize"])


def test_ten_thousand_folders_are_found_at_once_and_read_bit_by_bit(tmp_path: Path) -> None:
    for index in range(10_000):
        (tmp_path / f"r{index:05}").mkdir()
        (tmp_path / f"r{index:05}" / "metrics.csv").touch()
    watch = Watch([tmp_path])
    for read in range(1, 4):  # a look without any patience goes one folder further
        watch.refresh(0)
        assert len(watch.runs) == 10_000
        watch._next_search = math.inf
        assert sum(bool(run.row) for run in watch.runs.values()) == read


def test_finished_runs_are_listed_by_their_summaries_before_they_are_read(tmp_path: Path) -> None:
    for index in range(6):
        make_run(tmp_path / f"r{index}", epochs=2, layers=LENET, drops=())
    watch = Watch([tmp_path])
    watch.refresh(0)
    first = [json.loads(run.row) for run in watch.runs.values()]
    assert sum(bool(run.stamp) for run in watch.runs.values()) == 1, "one was read"
    assert [row["name"] for row in first] == [read_run(run.folder).name for run in watch.runs.values()]
    assert sum("run" in row["settings"] for row in first) == 5, "the others stand alone until they are"
    watch.refresh(PATIENCE)
    last = [json.loads(run.row) for run in watch.runs.values()]
    assert not any("run" in row["settings"] for row in last)
    assert [row["reached"] for row in first] == [row["reached"] for row in last]


def test_a_run_whose_process_was_killed_is_not_shown_as_running(tmp_path: Path) -> None:
    """Such a process cannot write that it has ended; its lock, which is free then, tells."""
    folder = make_run(tmp_path / "run", epochs=2, layers=LENET, drops=(), state="running")
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        watch = Watch([tmp_path])
        watch.refresh(PATIENCE)
        assert [run.state for run in watch.runs.values()] == ["running"]
        version = watch.version
        watch.refresh(PATIENCE)
        assert watch.version == version
    watch.refresh(PATIENCE)
    assert [run.state for run in watch.runs.values()] == ["interrupted"]
    assert watch.version > version
    parts = run_parts(read_run(folder))
    assert "interrupted" in parts["header"]
    assert "run the same command again" in parts["problems"]


def test_what_vanishes_and_what_changes(tmp_path: Path) -> None:
    make_run(tmp_path / "a", epochs=2, layers=LENET, drops=())
    make_run(tmp_path / "b", epochs=2, layers=LENET, drops=())
    watch = Watch([tmp_path])
    watch.refresh(PATIENCE)
    version, places = watch.version, watch.places
    (tmp_path / "link").symlink_to("/etc")
    for entry in (tmp_path / "a").iterdir():
        entry.unlink()
    (tmp_path / "a").rmdir()
    grow(tmp_path / "b", tmp_path / "b", 1)
    watch._next_search = 0.0
    watch.refresh(PATIENCE)
    assert [run.folder.name for run in watch.runs.values()] == ["b"]
    assert watch.places > places
    assert [place for place, _ in watch.since(version)] == [0]
