"""Several ranks of one training as forks of one process that has loaded torch once: what torchrun does, in a tenth of the time.

    python -m tests.rank_launcher '[{"place": …, "ranks": 3, "words": […], "signal": 9, "to": [1], "patience": 3}, …]'

Every launch runs to its end, or until `signal` was sent to the ranks `to` after the first checkpoint. Prints a JSON list with
the exit codes, and the seconds from the signal to the end of the last rank.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import runner.distributed
from runner.compose import config_from, split_options
from runner.faults import exit_code
from runner.folder import run_path
from runner.job import train

LIMIT = 240.0  # seconds for one launch


def rank(launch: dict[str, Any], number: int, port: int) -> int:
    """The life of one rank."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(launch["ranks"])}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    runner.distributed.PATIENCE = launch.get("patience", runner.distributed.PATIENCE)
    log = os.open(f"rank-{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        train(config_from(*split_options(launch["words"])))
    except BaseException as error:
        traceback.print_exc()
        return int(exit_code(error))
    return 0


def run(launch: dict[str, Any]) -> dict[str, Any]:
    """Fork the ranks, disturb them where that is asked for, and wait for all."""
    Path(launch["place"]).mkdir(parents=True, exist_ok=True)
    os.chdir(launch["place"])
    port, children = free_port(), list[int]()
    for number in range(launch["ranks"]):
        child = os.fork()
        if not child:
            code = 70
            try:
                code = rank(launch, number, port)
            finally:
                os._exit(code)
        children.append(child)
    sent = disturb(launch, children) if "signal" in launch else time.monotonic()
    codes = [finished(child) for child in children]
    return {"codes": codes, "seconds": time.monotonic() - sent}


def disturb(launch: dict[str, Any], children: list[int]) -> float:
    """Send the signal once there is a checkpoint; when that was."""
    folder = run_path(config_from(*split_options(launch["words"])))
    deadline = time.monotonic() + LIMIT
    while not list(folder.glob("checkpoints/step-*.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    for number in launch["to"]:
        os.kill(children[number], launch["signal"])
    return time.monotonic()


def finished(child: int) -> int:
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -99


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


if __name__ == "__main__":
    print(json.dumps([run(launch) for launch in json.loads(sys.argv[1])]))
