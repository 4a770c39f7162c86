"""The verb `dashboard`: serve live pages, or write pages to keep.

python -m runner dashboard                       follow all runs below outputs/ in a browser, until Ctrl-C
python -m runner dashboard outputs/runs --open   and open the browser
python -m runner dashboard outputs --compare     write outputs/comparison.html
python -m runner dashboard outputs --write       write the dashboard.html of every run again
python -m runner dashboard --host NAME --port 80  for browsers on other machines, which reach this one by that name
"""

import argparse
import os
import subprocess
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from runner.faults import ConfigError, Exit, Fault
from runner.pages.records import RUN_FILES, find_runs

if TYPE_CHECKING:
    from bokeh.server.server import Server

    from runner.pages.live import Live

PORT = 5006
PORTS = 20  # tried one after the other, unless one was named
ANYWHERE = {"0.0.0.0", "::", "*", ""}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError([Fault("dashboard", message)])


def dashboard(words: Sequence[str]) -> int:
    """The verb."""
    options = _options(words)
    lost = [Fault(str(path), "is not there") for path in options.folders if not path.is_dir()]
    if lost:
        raise ConfigError(lost)
    if options.write or options.compare:
        return _write(options.folders, compare=options.compare)
    return _serve(options)


def _options(words: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="dashboard", add_help=False, allow_abbrev=False)
    parser.add_argument("folders", nargs="*", type=Path)
    what = parser.add_mutually_exclusive_group()
    for name in ("--live", "--compare", "--write"):
        what.add_argument(name, action="store_true")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int)
    parser.add_argument("--open", action="store_true")
    parser.add_argument("--until", type=int)  # ends when this process has ended and nobody looks any more
    options = parser.parse_args(list(words))
    options.folders = options.folders or [Path("outputs")]
    if options.port is not None and not 0 <= options.port < 2**16:
        raise ConfigError([Fault("--port", f"{options.port} is no port: give 0 to 65535")])
    if options.host in ANYWHERE:
        message = "name the one address by which browsers reach this machine; 'all of them' is not accepted"
        raise ConfigError([Fault("--host", message)])
    return options


def _write(roots: Sequence[Path], *, compare: bool) -> int:
    folders = [folder for root in roots for folder in find_runs(root)]
    if not folders:
        message = f"no run folder in {', '.join(map(str, roots))}; a run folder holds a metrics.csv"
        raise ConfigError([Fault("", message)])
    from runner.pages.compare import write_comparison
    from runner.pages.dashboard import write_dashboard

    if compare:
        first = roots[0].parent if any((roots[0] / name).exists() for name in RUN_FILES) else roots[0]
        print(write_comparison(folders, first / "comparison.html").resolve())
        return int(Exit.DONE)
    for folder in folders:
        print(write_dashboard(folder).resolve())
    return int(Exit.DONE)


def _serve(options: argparse.Namespace) -> int:
    from runner.pages.live import address_of, only_run

    server, live = _on_some_port(options)
    address = address_of(server, live)
    print(f"live: {address}  (Ctrl-C ends it)", flush=True)
    if options.open:
        webbrowser.open(only_run(address, live))
    if options.until:
        from tornado.ioloop import PeriodicCallback

        PeriodicCallback(lambda: _end_after(server, options.until), 10_000).start()
    server.run_until_shutdown()
    return int(Exit.DONE)


def _on_some_port(options: argparse.Namespace) -> "tuple[Server, Live]":
    from runner.pages.live import make_server

    ports = [options.port] if options.port is not None else list(range(PORT, PORT + PORTS))
    for port in ports:
        try:
            return make_server(options.folders, options.host, port)
        except OSError as error:
            fault = error
    raise ConfigError(
        [Fault("--port", f"cannot listen on {options.host}, port {ports[0]} to {ports[-1]}: {fault.strerror}")]
    )


def _end_after(server: "Server", process: int) -> None:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        if not server.get_sessions():
            server.io_loop.stop()


def open_live(folder: Path) -> None:
    """Open the live page of a run that starts, from a process of its own: nothing that happens to it touches the run."""
    command = [sys.executable, "-m", "runner", "dashboard", str(folder), "--open", "--until", str(os.getpid())]
    quiet = subprocess.DEVNULL
    subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
