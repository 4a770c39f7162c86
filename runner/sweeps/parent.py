"""A process that makes no sense without the one that started it ends with it, however that one ended."""

import ctypes
import os
import signal
import sys
import threading
import time

VARIABLE = "RUNNER_PARENT"  # pid of the process to end with
PR_SET_PDEATHSIG = 1
LOOK_EVERY = 1.0  # seconds


def end_with_parent(parent: int) -> None:
    """From now on, SIGKILL for this process once `parent` is gone: by the kernel where it can, else by looking every second."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # gone before we asked
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=_look, args=(parent,), daemon=True, name="parent").start()


def end_with_the_launcher() -> None:
    """What a job of a sweep, or a rank, calls first; nothing for a process that somebody started by hand."""
    said = os.environ.pop(VARIABLE, "")
    if said.isdigit():
        end_with_parent(int(said))
    elif "TORCHELASTIC_RUN_ID" in os.environ:  # a rank without its agent would train on, alone and unseen
        end_with_parent(os.getppid())


def _look(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY)
    os.kill(os.getpid(), signal.SIGKILL)
