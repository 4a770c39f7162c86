"""What a number depends on besides its config: versions, processor, threads, code. Decides whether resume is exact to the bit."""

import hashlib
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from runner.catalog import ROOT, source_of
from runner.hoard import keep_memory

DECIDES = (
    "python", "torch", "torchvision", "device", "cpu", "capability", "threads", "world", "code", "mkldnn", "tf32", "teacher",
)  # fmt: skip


def environment(device: torch.device, world: int = 1, plugins: Iterable[str] = ()) -> dict[str, Any]:
    """The facts; those named in DECIDES can change the last bits of a result. `world`: processes that train together."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),  # not imported: that takes seconds
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "tf32": device.type == "cuda" and torch.backends.cudnn.allow_tf32,  # torch's own default for convolutions
        "world": world,
        "code": code_digest(tuple(plugins)),
        "platform": platform.platform(),
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Why a resumed run may differ in its last bits; empty where it is exact."""
    changed = [key for key in DECIDES if before.get(key) != now.get(key)]
    return [f"{key} was {before.get(key)}, is {now.get(key)}" for key in changed]


@cache
def code_digest(plugins: tuple[str, ...] = ()) -> str:
    """Twelve hex digits over the source text of runner, models and quant, and of the plugins with the packages they stand in."""
    own = (ROOT / folder for folder in ("models", "quant", "runner"))
    digest = hashlib.sha256()
    for root in (*own, *map(source_of, plugins)):
        for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            digest.update(str(path.relative_to(root.parent)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    model = f"family {names['cpu family']} model {names.get('model', '?')}" if "cpu family" in names else ""
    return " ".join(filter(None, [names.get("model name", platform.machine()), model]))


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def pick_device(wanted: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises ValueError for a GPU that is not there."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: this machine has no GPU that torch can use; accepted here: auto, cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def prepare(seed: int, threads: int | None, device: torch.device) -> None:
    """Make a run repeatable, and no slower than it has to be: seeds, threads, deterministic algorithms, memory."""
    keep_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms imports the compiler, which takes seconds
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # 6 % of a step, and nothing reads what was not written
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
