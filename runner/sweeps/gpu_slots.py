"""One job a GPU: who starts a job on this machine takes a free GPU and gives it back when the job is over.

A slot is a locked file, so that it is free again as soon as its holder is gone, whichever launcher or sweep that belonged to.
"""

import fcntl
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

LOOK_EVERY = 0.2  # seconds


@contextmanager
def gpu_slot(words: Sequence[str]) -> Iterator[dict[str, str]]:
    """Waits for a GPU of its own; what the job's environment has to say. Nothing for jobs on the CPU."""
    devices = [] if "trainer.device=cpu" in words else visible_gpus()
    if not devices:
        yield {}
        return
    handle, device = take_slot(devices)
    try:
        yield {"CUDA_VISIBLE_DEVICES": device}
    finally:
        os.close(handle)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, by what CUDA_VISIBLE_DEVICES says or else all of this machine. Without torch."""
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    if said is not None:
        return [device.strip() for device in said.split(",") if device.strip() not in {"", "-1"}]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = listed.stdout.splitlines() if listed.returncode == 0 else []
    return [str(number) for number, line in enumerate(lines) if line.startswith("GPU")]


def take_slot(devices: Sequence[str]) -> tuple[int, str]:
    """The handle that holds a device, and the device; waits until one is free."""
    while (slot := free_slot(devices)) is None:
        time.sleep(LOOK_EVERY)
    return slot


def free_slot(devices: Sequence[str]) -> tuple[int, str] | None:
    """A device that nobody works on, and the handle that holds it; None where there is none just now."""
    for device in devices:
        path = Path(tempfile.gettempdir()) / f"lowbit-runner-{os.getuid()}-gpu-{device.replace('/', '_')}.lock"
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle, device
        except BlockingIOError:
            os.close(handle)
    return None
