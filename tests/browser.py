"""Headless Chromium, spoken to over a pipe: enough of the DevTools protocol to open a page and ask it things."""

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync --remote-debugging-pipe"
)


class Browser:
    """One browser with a fresh profile; `log` collects what the page says and fetches."""

    def __init__(self) -> None:
        assert CHROMIUM
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        command = f'exec "{CHROMIUM}" {FLAGS} --user-data-dir="{self._profile.name}" 3<&{to_read} 4>&{to_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", command], pass_fds=(to_read, to_write), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(to_write)
        self._count, self._buffer = 0, b""
        self._session: str | None = None
        self.log: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its answer; events that come in between go to the log."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self.log.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = os.read(self._read, 1 << 20)
            assert piece, "the browser has ended"
            self._buffer += piece
        message, self._buffer = self._buffer.split(b"\0", 1)
        return dict(json.loads(message))

    def open(
        self, page: Path | str, *, scheme: str = "light", width: int = 1280, height: int = 900, waits: bool = True
    ) -> None:
        """Open a file or an address and wait until its script says that it is ready, or where it has none, until it is loaded."""
        url = page if isinstance(page, str) else page.resolve().as_uri()
        self.log.clear()
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=url)
        here = f"location.href === {json.dumps(url)}"
        ready = (
            "'ready' in (document.documentElement?.dataset ?? {})" if waits else "document.readyState === 'complete'"
        )
        self.wait_for(f"{here} && {ready}")

    def picture(self, path: Path) -> None:
        """A PNG of what the window shows."""
        self.wait_for("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def hover(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def box(self, selector: str) -> dict[str, float]:
        """Where an element is, brought into sight."""
        found = f"document.querySelector({json.dumps(selector)})"
        place = f"(e => (e.scrollIntoView({{block: 'center'}}), e.getBoundingClientRect().toJSON()))({found})"
        return dict(self.ask(place))

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, expression: str, patience: float = 180.0) -> None:
        deadline = time.monotonic() + patience
        while not self.ask(expression):
            assert time.monotonic() < deadline, f"never came true: {expression}; {self.complaints()}"
            time.sleep(0.05)

    def complaints(self) -> list[str]:
        """Warnings and errors of the console, exceptions, and dialogs."""
        bad = []
        for event in self.log:
            method, params = event.get("method"), event.get("params", {})
            loud = method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert")
            logged = method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning")
            if loud or logged or method in ("Runtime.exceptionThrown", "Page.javascriptDialogOpening"):
                bad.append(json.dumps(params)[:500])
        return bad

    def requests(self) -> list[str]:
        """Everything the page asked for, the page itself too."""
        sent = [event["params"] for event in self.log if event.get("method") == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent if not params["request"]["url"].startswith("data:")]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)
        self._profile.cleanup()


def picture(page: Path, path: Path, *, scheme: str = "light", width: int = 1280, height: int = 900) -> None:
    """A PNG of what a window of that size shows of a page."""
    browser = Browser()
    try:
        browser.call("Emulation.setScrollbarsHidden", hidden=True)
        browser.open(page, scheme=scheme, width=width, height=height)
        time.sleep(1)  # the canvases are drawn in the frames after the page says that it is ready
        browser.picture(path)
    finally:
        browser.close()


if __name__ == "__main__":  # python tests/browser.py PAGE.html PICTURE.png [light|dark [WIDTH [HEIGHT]]]
    page, to, *choices = sys.argv[1:]
    scheme, width, height = [*choices, *["light", "1280", "900"][len(choices) :]]
    picture(Path(page), Path(to), scheme=scheme, width=int(width), height=int(height))
