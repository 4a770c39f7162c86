"""Several ranks of one training as forks of one process that has loaded torch once: what torchrun does, in a tenth of the time.

    echo '{"place": …, "ranks": 3, "words": […], "signal": 9, "to": [1], "patience": 3}' | python -m tests.rank_launcher

Every line of the standard input is a launch. It runs to its end, or until `signal` was sent to the ranks `to` after the first
checkpoint, or, with `at`, until these ranks stop as by SIGSTOP where they come to that method of World. The answer is a line
of JSON: the exit codes, and the seconds from the disturbance to the end of the last rank.
"""

import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from contextlib import chdir
from pathlib import Path
from typing import Any

import runner.ranks.watchdog
from runner.compose import config_from, split_options
from runner.faults import exit_code
from runner.folder import run_path
from runner.job import train
from runner.ranks.distributed import World
from runner.sweeps.parent import end_with_parent

LIMIT = 90.0  # seconds for one launch


def warm_up(words: list[str]) -> None:
    """One step of a training in this process: what its forks would all load, they have."""
    with tempfile.TemporaryDirectory() as place, chdir(place):
        train(config_from(*split_options([*words, "trainer.max_steps=1", "trainer.progress=none"])))


def rank(launch: dict[str, Any], number: int, port: int) -> int:
    """The life of one rank."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(launch["ranks"])}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    runner.ranks.watchdog.PATIENCE = launch.get("patience", runner.ranks.watchdog.PATIENCE)
    if "at" in launch and number in launch["to"]:
        stop_at(launch["at"])
    log = os.open(f"rank-{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        train(config_from(*split_options(launch["words"])))
    except BaseException as error:
        traceback.print_exc()
        return int(exit_code(error))
    return 0


def stop_at(moment: str) -> None:
    """This process stops when it comes to a method of World."""
    method = getattr(World, moment)

    def stopped(*arguments: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGSTOP)
        return method(*arguments, **named)

    setattr(World, moment, stopped)


def run(launch: dict[str, Any]) -> dict[str, Any]:
    """Fork the ranks, disturb them where that is asked for, and wait for all."""
    Path(launch["place"]).mkdir(parents=True, exist_ok=True)
    os.chdir(launch["place"])
    port, children, launcher = free_port(), list[int](), os.getpid()
    for number in range(launch["ranks"]):
        child = os.fork()
        if not child:
            code = 70
            end_with_parent(launcher)
            try:
                code = rank(launch, number, port)
            finally:
                os._exit(code)
        children.append(child)
    deadline = time.monotonic() + LIMIT
    sent = disturb(launch, children, deadline) if {"signal", "at"} & set(launch) else time.monotonic()
    codes = [finished(child, deadline) for child in children]
    return {"codes": codes, "seconds": time.monotonic() - sent}


def disturb(launch: dict[str, Any], children: list[int], deadline: float) -> float:
    """Send the signal once there is a checkpoint, or wait until the ranks have stopped themselves; when that was."""
    folder, to = run_path(config_from(*split_options(launch["words"]))), [children[number] for number in launch["to"]]
    while time.monotonic() < deadline:
        if all(is_stopped(pid) for pid in to) if "at" in launch else any(folder.glob("checkpoints/step-*.json")):
            break
        time.sleep(0.005)
    for pid in to if "signal" in launch else []:
        os.kill(pid, launch["signal"])
    return time.monotonic()


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "T"


def finished(child: int, deadline: float) -> int:
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
    warm_up(sys.argv[1:])
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
