"""Checkpoints with one commit point: the manifest. Whatever is killed when, the newest manifest names a whole state.

Order of a save: CSV files to disk, then `step-N.pt` (private name, fsync, rename, fsync of the folder; a name that no
manifest uses yet), then the same for `step-N.json`, which holds sizes, SHA-256 and the CSV offsets. Only then older ones go;
the last two and the best stay.
Neither torch.load nor safetensors notices a flipped bit, so the checksum is verified before anything is decoded.
"""

import io
import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch

from runner.faults import BadData, StorageError, about_content
from runner.files import reason, remove, sha256, write_atomic, write_json

SCHEMA = 1
KEEP = 2
DATA = re.compile(r"(step-\d+|best)-\d+\.pt|step-\d+\.pt")
STEP = re.compile(r"step-(\d+)\.json")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was verified: its manifest, its state, and the best weights so far (None: none yet)."""

    manifest: dict[str, Any]
    state: dict[str, Any]
    best: dict[str, Any] | None


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._best_entry: dict[str, Any] | None = None

    def save(
        self, step: int, state: Mapping[str, Any], best: tuple[int, Mapping[str, Any]] | None, facts: Mapping[str, Any]
    ) -> None:
        """Commit `state` as the checkpoint of `step`. `best` is (its step, its weights); `facts` stand in the manifest."""
        entry = self._save_best(*best) if best is not None else None
        content = dumps(state)
        name = self._free_name(step)
        write_atomic(self.folder / name, content)
        named = {"schema": SCHEMA, "step": step, "file": name, "sha256": sha256(content), "best": entry}
        manifest = named | dict(facts)
        write_json(self.folder / f"step-{step}.json", manifest | {"check": _check(manifest)}, durable=True)
        self._prune()

    def _free_name(self, step: int) -> str:
        """A name that no commit uses: a step may be saved twice, and the first stays whole until the second is."""
        names = (f"step-{step}{suffix}.pt" for suffix in chain([""], (f"-{n}" for n in count(2))))
        return next(name for name in names if not (self.folder / name).exists())

    def _save_best(self, step: int, weights: Mapping[str, Any]) -> dict[str, Any]:
        if self._best_entry is None or self._best_entry["step"] != step:
            content = dumps(weights)
            write_atomic(self.folder / f"best-{step}.pt", content)
            self._best_entry = {"step": step, "file": f"best-{step}.pt", "sha256": sha256(content)}
        return self._best_entry

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; warns for every damaged one on the way there and removes it.

        None where there are none. Raises BadData where there are some and none is whole: nothing is thrown away then.
        """
        self._sweep()
        damaged: list[Path] = []
        for path in self.manifests():
            try:
                found = load(path)
            except Damaged as error:
                warnings.warn(f"{error}; going back to the checkpoint before it", stacklevel=2)
                damaged.append(path)
                continue
            for one in damaged:
                remove(one)
            self._best_entry = found.manifest["best"]
            return found
        if damaged:
            raise BadData(
                f"{self.folder}: no checkpoint in it is whole; restore one, or delete the folder to start anew"
            )
        return None

    def manifests(self) -> list[Path]:
        """The commits in the folder, newest first."""
        paths = [p for p in self.folder.glob("step-*.json") if STEP.fullmatch(p.name)]
        return sorted(paths, key=lambda p: int(p.stem.split("-")[1]), reverse=True)

    def _sweep(self) -> None:
        """Remove what a kill left behind: temporary files, and data that no manifest names."""
        for path in self.folder.glob(".*.tmp-*"):
            remove(path)
        self._remove_unnamed(self.manifests())

    def _prune(self) -> None:
        manifests = self.manifests()
        for path in manifests[KEEP:]:
            remove(path)
        self._remove_unnamed(manifests[:KEEP])

    def _remove_unnamed(self, manifests: list[Path]) -> None:
        """Remove the data that no manifest names; none at all where a manifest cannot be read just now."""
        try:
            keep = set(self._named(manifests))
        except OSError:
            return
        for path in self.folder.glob("*.pt"):
            if path.name not in keep:
                remove(path)

    def _named(self, manifests: list[Path]) -> Iterator[str]:
        for path in manifests:
            try:
                manifest = json.loads(path.read_bytes())
                yield str(manifest["file"])
                if manifest["best"] is not None:
                    yield str(manifest["best"]["file"])
            except (ValueError, KeyError, TypeError, RecursionError):  # damaged; a person may still want to repair it
                yield from (data.name for data in self.folder.glob(f"{path.stem}*.pt"))


class Damaged(BadData):
    """A file that is not as it was saved."""


def load(path: Path) -> Checkpoint:
    """Read and verify the checkpoint of a manifest.

    Raises Damaged, naming the file, for anything that is not as it was saved; BadData for a format of another version.
    """
    manifest = read_manifest(path)
    best = manifest["best"]
    state = loads(_beside(path, manifest["file"]), manifest["sha256"])
    return Checkpoint(manifest, state, loads(_beside(path, best["file"]), best["sha256"]) if best else None)


def read_manifest(path: Path) -> dict[str, Any]:
    """The facts of a checkpoint, verified."""
    try:
        manifest = json.loads(_content(path))
        own = manifest.pop("check")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path}: not a checkpoint manifest ({type(error).__name__}: {error})") from error
    schema = manifest.get("schema")
    other = "" if schema == SCHEMA else f"; it says format {schema}, this program reads format {SCHEMA}"
    if own != _check(manifest):
        raise Damaged(f"{path}: damaged: its checksum is not the one that was saved{other}")
    if other:
        raise BadData(f"{path}: cannot be read{other}")
    return manifest  # type: ignore[no-any-return]


def _check(manifest: Mapping[str, Any]) -> str:
    """The checksum of a manifest's facts, the same in every format: what another version wrote is told from what is damaged."""
    return sha256(json.dumps(manifest, sort_keys=True, default=str).encode())


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise Damaged(f"{path}: is missing") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {reason(error)}") from error


def _beside(manifest: Path, name: Any) -> Path:
    """A file that a manifest names: beside it, nowhere else."""
    if not isinstance(name, str) or not DATA.fullmatch(name):
        raise Damaged(f"{manifest}: names no data file beside it: {name!r}")
    return manifest.with_name(name)


def dumps(state: Mapping[str, Any]) -> bytes:
    """Tensors and plain Python as bytes, made in memory so that a failing disk meets only our own writing."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def loads(path: Path, digest: str | None = None) -> dict[str, Any]:
    """Decode a file of tensors and plain Python; code in it is refused, never run. Raises Damaged for anything odd."""
    content = _content(path)
    if digest is not None and sha256(content) != digest:
        raise Damaged(f"{path}: damaged: its checksum is not the one that was saved")
    try:
        _refuse_compressed(content)
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a decoder trips over, the file is what is wrong
        if not about_content(error):
            raise
        raise Damaged(f"{path}: not a checkpoint that can be trusted ({type(error).__name__})") from error
    if not isinstance(state, dict):
        raise Damaged(f"{path}: holds a {type(state).__name__}, not a state")
    return state


def _refuse_compressed(content: bytes) -> None:
    """torch.save stores members as they are; a compressed member is a bomb, not a checkpoint."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        compressed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        if compressed or sum(member.file_size for member in members) > len(content):
            raise ValueError("compressed members")
