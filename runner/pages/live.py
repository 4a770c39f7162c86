"""Live pages: a Bokeh server for one machine, which follows run folders.

It listens on 127.0.0.1. Every page is made by this module and carries a signed token for one websocket; no other session is
accepted, so that another site cannot open one. Requests must name this server as their host (a foreign name that resolves to
127.0.0.1 gets nothing), a run is named by an id from the search, never by a path, and where another address is given on the
command line, everything asks for the secret that was printed at the start. What a browser sends back is ignored: data flow
one way.
"""

import hmac
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bokeh.application import Application
from bokeh.application.handlers.function import FunctionHandler
from bokeh.document import Document
from bokeh.server.contexts import BokehSessionContext
from bokeh.server.server import Server
from bokeh.util.token import generate_jwt_token, generate_session_id
from tornado.ioloop import IOLoop, PeriodicCallback
from tornado.web import HTTPError, RequestHandler

from runner.pages import live_documents
from runner.pages.compare import SCRIPTS, comparison_body, costs_in_words
from runner.pages.dashboard import run_body
from runner.pages.figures import Sheet
from runner.pages.page import embedded_json, page
from runner.pages.records import read_run
from runner.pages.watch import Watch

LOOPBACK = ("127.0.0.1", "localhost")
COOKIE = "runner-secret"
TOKEN_SECONDS = 120  # from a page to its websocket
FORGET_MS = 15_000  # a session that nobody looks at


@dataclass
class Live:
    """What the pages of one server share."""

    watch: Watch
    hosts: frozenset[str]  # names under which this server may be asked for
    secret: str = ""  # empty: whoever reaches the address may look
    key: bytes = field(default_factory=lambda: secrets.token_bytes(32))

    def token(self, run: str) -> str:
        """A ticket for one websocket, and for nothing but this run (empty: the comparison)."""
        session = generate_session_id(self.key, signed=True)
        return generate_jwt_token(session, self.key, True, {"run": run}, TOKEN_SECONDS)

    def fill(self, document: Document) -> None:
        """The document of a new session."""
        context = document.session_context
        assert isinstance(context, BokehSessionContext)
        run = str(context.token_payload.get("run", ""))
        if not run:
            live_documents.follow_comparison(document, self.watch)
        elif run in self.watch.runs:
            live_documents.follow_run(document, self.watch.runs[run])


class Page(RequestHandler):
    """What all pages have in common: who may ask, and what a browser may do with the answer."""

    def initialize(self, live: Live) -> None:
        self.live = live

    def prepare(self) -> None:
        if self.request.host.lower() not in self.live.hosts:
            raise HTTPError(403, reason="This server is not known by that name")
        if self.live.secret and not self._knows_secret():
            raise HTTPError(403, reason="Open the address that was printed when the server was started")

    def _knows_secret(self) -> bool:
        given = self.get_query_argument("secret", "")
        if given and hmac.compare_digest(given.encode(), self.live.secret.encode()):
            self.set_cookie(COOKIE, self.live.secret, httponly=True, samesite="Strict")
            return True
        return hmac.compare_digest(self.get_cookie(COOKIE, "").encode(), self.live.secret.encode())

    def set_default_headers(self) -> None:
        self.set_header("Cache-Control", "no-store")
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("X-Frame-Options", "DENY")
        self.set_header("Cross-Origin-Resource-Policy", "same-origin")
        self.set_header("Referrer-Policy", "no-referrer")

    def write_error(self, status_code: int, **_: Any) -> None:
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(f"{status_code}: {self._reason}\n")

    def send(self, title: str, body: str, sheet: Sheet, run: str, scripts: Sequence[str], **facts: object) -> None:
        """A page that will ask for its document through a websocket."""
        known = sheet.facts() | facts | {"token": self.live.token(run)}
        here = f"'self' ws://{self.request.host}"
        self.finish(page(title, body, embedded_json(known), ("page.js", "live.js", *scripts), here))


class ComparisonPage(Page):
    """All runs."""

    def get(self) -> None:
        watch, sheet = self.live.watch, Sheet({})
        places = ", ".join(str(root) for root in watch.roots)
        body = comparison_body(sheet, live_documents.known_costs(watch), f"Live: runs below {places}")
        self.send("Runs", body, sheet, "", SCRIPTS[1:], costs=costs_in_words())


class RunPage(Page):
    """One run."""

    def get(self) -> None:
        followed = self.live.watch.runs.get(self.get_query_argument("id", ""))
        if followed is None:
            raise HTTPError(404, reason="No such run; go back to the list of runs")
        run = read_run(followed.folder)
        body, sheet = run_body(run)
        self.send(run.name, f'<nav><a href="./">All runs</a></nav>{body}', sheet, self.get_query_argument("id"), ())


def make_server(roots: Iterable[Path], address: str, port: int, loop: IOLoop | None = None) -> tuple[Server, Live]:
    """A server that is ready to run. Raises OSError where the port is taken; 0 takes a free one."""
    live = Live(Watch(list(roots)), frozenset(), "" if address in LOOPBACK else secrets.token_urlsafe(24))
    live.watch.refresh()
    names = LOOPBACK if address in LOOPBACK else (address,)
    server = Server(
        {"/live": Application(FunctionHandler(live.fill))},
        io_loop=loop or IOLoop.current(), address=address, port=port, extra_patterns=[
            (r"/", ComparisonPage, {"live": live}), (r"/run", RunPage, {"live": live}),
        ],
        sign_sessions=True, secret_key=live.key, generate_session_ids=False, use_index=False, use_xheaders=False,
        session_token_expiration=TOKEN_SECONDS, unused_session_lifetime_milliseconds=FORGET_MS,
        check_unused_sessions_milliseconds=5_000, allow_websocket_origin=list(names),
    )  # fmt: skip
    live.hosts = frozenset(f"{name}:{server.port}" for name in names)
    PeriodicCallback(live.watch.refresh, 1000).start()
    return server, live


def address_of(server: Server, live: Live) -> str:
    """What to open."""
    return f"http://{server.address}:{server.port}/" + (f"?secret={live.secret}" if live.secret else "")


def only_run(address: str, live: Live) -> str:
    """The page of the run, where there is but one, else the comparison."""
    runs = list(live.watch.runs)
    return f"{address}run?id={runs[0]}" if len(runs) == 1 and not live.secret else address
