"""T7: damaged and malicious checkpoints. Each is opened in a child that may neither grow, nor hang, nor leave a mark."""

import functools
import io
import json
import os
import pickle
import random
import resource
import runpy
import shutil
import subprocess
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas
import torch

from runner.checkpoint import SCHEMA, Checkpoints, _check, load, loads
from runner.faults import BadData, RunnerError
from runner.files import sha256
from runner.weights import read_weights
from tests.torture.forks import do_run, limit_memory, run_once
from tests.torture.scenarios import digest, short_scenario

MEMORY = 2 << 30  # bytes of address space that a child may take on top of what it has
SECONDS = 60  # of a processor, not of the clock: a busy machine may hold a child for minutes
BATCH = 50  # mutants a child
REFUSED, SAME, OTHER, CRASHED = 0, 1, 2, 3
WORDS = ("refused", "same", "silently other", "odd exception")
Mutate = Callable[[bytes, random.Random], bytes]
Job = tuple[Path, Mutate, int]  # a file, what is done to it, and the seed of that


def _flip(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def _zeros(content: bytes, rng: random.Random) -> bytes:
    at, length = rng.randrange(len(content)), rng.choice((1, 16, 512, 4096))
    return (content[:at] + bytes(min(length, len(content) - at)) + content[at + length :])[: len(content)]


def _splice(content: bytes, rng: random.Random) -> bytes:
    start, length, to = rng.randrange(len(content)), rng.randrange(1, 600), rng.randrange(len(content))
    piece = content[start : start + length]
    return content[:to] + piece + content[to + (len(piece) if rng.random() < 0.5 else 0) :]


def _append(content: bytes, rng: random.Random) -> bytes:
    return content + rng.randbytes(rng.choice((1, 20, 5000)))


def _digit(content: bytes, rng: random.Random) -> bytes:
    """Another digit where one stands: what changes a number in JSON and leaves it JSON."""
    places = [i for i, byte in enumerate(content) if 48 <= byte <= 57]
    at = rng.choice(places)
    return content[:at] + str(rng.randrange(10)).encode() + content[at + 1 :]


MUTATIONS: tuple[Mutate, ...] = (_flip, _cut, _zeros, _splice, _append, _digit)


def run(mutants: int, seed: int, root: Path) -> dict[str, Any]:
    """Mutants of every file of a checkpoint and of the weights for sharing."""
    rng, folder = random.Random(seed), _made(root)
    manifest = Checkpoints(folder / "checkpoints").manifests()[0]
    best = json.loads(manifest.read_text())["best"]["file"]
    state = json.loads(manifest.read_text())["file"]
    files = [manifest, manifest.with_name(state), manifest.with_name(best), folder / "weights.safetensors"]
    whole = {path: _opened(path, manifest) for path in files}
    counts: Counter[str] = Counter()
    bad: list[str] = []
    for number in range(0, mutants, BATCH):
        jobs = [
            (rng.choice(files), rng.choice(MUTATIONS), rng.randrange(2**32))
            for _ in range(min(BATCH, mutants - number))
        ]
        verdicts = _in_child(_trials(jobs, manifest, whole, root / "scratch"), root)
        if verdicts is None:
            bad.append(f"a child crashed or hung on one of {jobs}")
            continue
        counts.update(WORDS[verdict] for verdict in verdicts)
        pairs = zip(verdicts, jobs, strict=True)
        bad += [f"{WORDS[v]}: {mutate.__name__} {path.name} {s}" for v, (path, mutate, s) in pairs if v >= OTHER]
    return {"mutants": sum(counts.values()), **counts, "bad": bad}


def _trials(jobs: list[Job], manifest: Path, whole: dict[Path, str], scratch: Path) -> Callable[[], list[int]]:
    return lambda: [_try(job, manifest, whole[job[0]], scratch) for job in jobs]


def _made(root: Path) -> Path:
    """A finished run to take checkpoints from."""
    scenario = short_scenario()
    end = run_once(lambda: do_run(scenario.config), root / "made")
    assert end.code == 0, end
    return scenario.folder(root / "made")


def _opened(path: Path, manifest: Path) -> str:
    """The digest of everything that opening a file gives."""
    if path.suffix == ".safetensors":
        weights = read_weights(path)
        return digest([weights.tensors, weights.config])
    found = load(manifest)
    return digest([found.manifest, found.state, found.best])


def _try(job: Job, manifest: Path, whole: str, scratch: Path) -> int:
    """What becomes of one mutant, among copies of the files that belong to it."""
    path, mutate, seed = job
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    for file in path.parent.iterdir():
        if file.is_file():
            shutil.copy(file, scratch)
    rng = random.Random(seed)
    (scratch / path.name).write_bytes(mutate(path.read_bytes(), rng))
    try:
        return SAME if _opened(scratch / path.name, scratch / manifest.name) == whole else OTHER
    except RunnerError:
        return REFUSED
    except Exception as error:
        print(f"{path.name} {mutate.__name__} {seed}: {error!r}", flush=True)
        return CRASHED


def _in_child(work: Callable[[], list[int]], root: Path) -> list[int] | None:
    """The results of a child with little memory and little time; None where it did not live to tell them."""
    answer = root / "answer.json"
    answer.unlink(missing_ok=True)

    def limited() -> int:
        limit_memory(MEMORY)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        answer.write_text(json.dumps(work()))
        return 0

    end = run_once(limited, root / "child")
    return json.loads(answer.read_text()) if end.code == 0 and answer.exists() else None


# Malicious files ---------------------------------------------------------------------------------------------------------


class _Call:
    """A pickle of it calls a function when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def _payloads(mark: Path) -> dict[str, Any]:
    """Objects whose unpickling would make the file `mark`."""
    touch, code = f"touch {mark}", f"open({str(mark)!r}, 'w')"
    script = mark.with_suffix(".py")
    script.write_text(code)
    pickled = mark.with_suffix(".pkl")
    pickled.write_bytes(pickle.dumps(_Call(os.system, touch)))
    return {
        "os.system": _Call(os.system, touch),
        "eval": _Call(eval, code),
        "exec": _Call(exec, code),
        "subprocess": _Call(subprocess.check_output, ["touch", str(mark)]),
        "open": _Call(open, str(mark), "w"),
        "runpy": _Call(runpy.run_path, str(script)),
        "partial": _Call(functools.partial(os.system, touch)),
        "torch.load": _Call(functools.partial(torch.load, weights_only=False), str(pickled)),
        "pandas.read_pickle": _Call(pandas.read_pickle, str(pickled)),
        "pickle.loads": _Call(pickle.loads, pickled.read_bytes()),
        "mkdir": _Call(os.mkdir, str(mark)),
    }


def malicious(mark: Path) -> Iterator[tuple[str, bytes]]:
    """(what it is, the file): code in zip, legacy and bare pickles, at the top and beside tensors; bombs."""
    for name, payload in _payloads(mark).items():
        for place, content in (("top", payload), ("beside", {"model": {"w": torch.zeros(2)}, "x": [payload]})):
            for form in ("zip", "legacy"):
                buffer = io.BytesIO()
                torch.save(content, buffer, _use_new_zipfile_serialization=form == "zip")
                yield f"{name}, {place}, {form}", buffer.getvalue()
        yield f"{name}, bare pickle", pickle.dumps(payload)
    yield "deflated zip bomb", _zip({"archive/data.pkl": bytes(64 << 20)}, zipfile.ZIP_DEFLATED)
    yield "bomb of a compressed tensor", _recompressed(torch.zeros(16 << 20))
    yield (
        "zip with a name outside",
        _zip({"../../evil": b"x", "archive/data.pkl": pickle.dumps({})}, zipfile.ZIP_STORED),
    )
    yield "nested lists", b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."


def _zip(members: dict[str, bytes], compression: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _recompressed(tensor: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": {"w": tensor}}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return _zip({name: archive.read(name) for name in archive.namelist()}, zipfile.ZIP_DEFLATED)


def run_malicious(_: int, seed: int, root: Path) -> dict[str, Any]:
    """Every malicious file, alone under several names and inside a checkpoint whose manifest vouches for it."""
    (root / "scratch").mkdir(parents=True)
    mark, bad, refused, files = root / "mark", [], 0, list(malicious(root / "mark"))
    for name, content in files:
        verdicts = _in_child(lambda content=content: _open_everywhere(content, root / "scratch"), root)  # type: ignore[misc]
        if mark.exists():
            bad.append(f"{name}: its code ran")
            mark.rmdir() if mark.is_dir() else mark.unlink()
        if verdicts is None or any(verdict != REFUSED for verdict in verdicts):
            bad.append(f"{name}: {verdicts}")
        refused += len(verdicts or []) - sum(verdicts or [])
    return {"files": len(files), "refused": refused, "executed": sum("code ran" in fault for fault in bad), "bad": bad}


def _open_everywhere(content: bytes, folder: Path) -> list[int]:
    """Opened as a foreign file under usual names, and as the state of a run's own checkpoint."""
    named = {"schema": SCHEMA, "step": 1, "file": "step-1.pt", "sha256": sha256(content), "best": None}
    (folder / "step-1.json").write_text(json.dumps(named | {"check": _check(named)}))
    (folder / "step-1.pt").write_bytes(content)
    verdicts = [_refused(lambda: load(folder / "step-1.json"))]
    for name in ("model.pt", "model.pth", "model.bin", "model.safetensors"):
        (folder / name).write_bytes(content)
        verdicts += [_refused(lambda name=name: read_weights(folder / name))]  # type: ignore[misc]
    return [*verdicts, _refused(lambda: loads(folder / "model.pt"))]


def _refused(opening: Callable[[], Any]) -> int:
    try:
        opening()
    except BadData:
        return REFUSED
    except Exception as error:
        print(repr(error), flush=True)
        return 1
    return 1
