"""Weights for sharing: safetensors with the config and a checksum in their header, and loading by name."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from quant.inference import looks_packed
from runner.checkpoint import Checkpoints, load, loads, read_manifest
from runner.faults import BadData, MissingInput
from runner.files import write_atomic

FORMAT = "lowbit-runner weights 1"
FEW = 4  # names that are told one by one
ANYWHERE = {
    "outputs": "outputs",
    "checkpoint": None,
    "pretrained": None,
    "distill": None,
}  # where a run lay says nothing about its weights


@dataclass(frozen=True)
class Weights:
    """Tensors by name, and the config of the run that made them (empty for a foreign file)."""

    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    source: Path = Path()


def save_weights(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write a safetensors file that says what it is."""
    write_atomic(path, weights_bytes(tensors, config))


def weights_bytes(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> bytes:
    """The content of that file."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    said = json.dumps(dict(config) | ANYWHERE)
    facts = json.dumps({"config": said, "sha256": fingerprint(plain, said)})
    return save(plain, metadata={FORMAT: facts})  # one key, because safetensors keeps no order of several


def read_weights(path: Path) -> Weights:
    """The weights of a run folder (its best), of a checkpoint, of a safetensors file or of a foreign state dict.

    Raises MissingInput where nothing is there, BadData for anything damaged, foreign or unsafe.
    """
    if path.is_dir():
        return _from_folder(path)
    if not path.is_file():
        raise MissingInput(
            f"{path}: no such file; give a run folder, a checkpoint (step-N.json or .pt) or a .safetensors file"
        )
    if path.suffix == ".safetensors":
        if looks_packed(path):
            raise BadData(
                f"{path}: a packed network, which `evaluate` and `predict` take; give the run that it was made of"
            )
        return _from_safetensors(path)
    manifest = _manifest_of(path)
    if manifest is None:
        return Weights(_foreign(loads(path), path), source=path)
    found = load(manifest)
    best = path.name.startswith("best-") and found.best
    return Weights(best or _evaluated(found.state), found.manifest.get("config", {}), path)


def _manifest_of(path: Path) -> Path | None:
    """The manifest that vouches for a file of a run's checkpoints; None for a file from elsewhere."""
    if re.fullmatch(r"step-\d+\.json", path.name):
        return path
    ours = re.fullmatch(r"(best|step)-\d+(-\d+)?\.pt", path.name)
    beside = Checkpoints(path.parent).manifests() if ours else []
    return next((m for m in beside if path.name in _files_of(read_manifest(m))), None)


def _files_of(manifest: Mapping[str, Any]) -> set[str]:
    """The names of the data files that a manifest vouches for."""
    return {manifest["file"], *([manifest["best"]["file"]] if manifest["best"] else [])}


def _evaluated(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights that the run would evaluate: their average where one is kept."""
    if state.get("ema") is None:
        return dict(state["model"])
    return {name.removeprefix("module."): t for name, t in state["ema"].items() if name.startswith("module.")}


def _from_folder(folder: Path) -> Weights:
    if (folder / "weights.safetensors").is_file():
        return _from_safetensors(folder / "weights.safetensors")
    manifests = Checkpoints(folder / "checkpoints").manifests()
    if not manifests:
        raise MissingInput(f"{folder}: holds neither weights.safetensors nor a checkpoint; is it a run folder?")
    found = load(manifests[0])
    return Weights(found.best or _evaluated(found.state), found.manifest.get("config", {}), manifests[0])


def _from_safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise BadData(f"{path}: not a safetensors file that can be read ({error})") from error
    if not any(
        key == FORMAT or '"sha256"' in text for key, text in header.items()
    ):  # one is left of ours after any flip
        return Weights(tensors, source=path)
    try:
        facts = json.loads(header[FORMAT])
        whole = facts["sha256"] == fingerprint(tensors, facts["config"])
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise BadData(f"{path}: damaged, or of another version: its checksum is not the one that was saved")
    return Weights(tensors, json.loads(facts["config"]), path)


def _foreign(state: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The tensors of somebody else's checkpoint: a state dict, bare or under a usual key, without DataParallel's prefix."""
    inner = next((state[key] for key in ("state_dict", "model") if isinstance(state.get(key), dict)), state)
    tensors = {name.removeprefix("module."): value for name, value in inner.items() if isinstance(value, Tensor)}
    if not tensors:
        raise BadData(f"{path}: holds no tensors by name")
    return tensors


def fingerprint(tensors: Mapping[str, Tensor], config: str = "") -> str:
    """SHA-256 over a config, and names, types, shapes and raw bytes in the order of names."""
    digest = hashlib.sha256(config.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass
class Match:
    """What became of the names of a file and of a model."""

    loaded: set[str]
    missing: list[str]
    misshapen: list[str]
    unused: list[str]

    @classmethod
    def of(cls, loaded: set[str], model: Iterable[str], file: Iterable[str]) -> Self:
        """`model` and `file`: the names that either has."""
        own, theirs = set(model) - loaded, set(file) - loaded
        return cls(loaded, sorted(own - theirs), sorted(own & theirs), sorted(theirs - own))

    def lines(self) -> Iterable[str]:
        """For people: nothing is left out silently."""
        yield f"pretrained: {len(self.loaded)} tensors loaded by name"
        if self.missing:
            yield f"pretrained: not in the file, kept as initialised: {_by_ending(self.missing)}"
        if self.misshapen:
            yield f"pretrained: in the file with another shape, kept as initialised: {_by_ending(self.misshapen)}"
        if self.unused:
            yield f"pretrained: in the file, not used: {_by_ending(self.unused)}"


def _by_ending(names: Sequence[str]) -> str:
    """Names, those of many layers once.

    >>> _by_ending(["fc.bias", *(f"conv{i}.input_range.low" for i in range(20))])
    'fc.bias, 20 *.low (conv0.input_range.low, ...)'
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rpartition(".")[2], []).append(name)
    return ", ".join(
        ", ".join(group) if len(group) <= FEW else f"{len(group)} *.{last} ({group[0]}, ...)"
        for last, group in groups.items()
    )


def load_matching(model: nn.Module, tensors: Mapping[str, Tensor]) -> set[str]:
    """Copy every tensor whose name and shape the model has; the names that were."""
    own = model.state_dict()
    hits = {n: t for n, t in tensors.items() if n in own and own[n].shape == t.shape}
    bad = [name for name, tensor in hits.items() if tensor.is_floating_point() and not bool(tensor.isfinite().all())]
    if bad:
        raise BadData(f"pretrained weights are not finite: {', '.join(bad[:5])}")
    model.load_state_dict(hits, strict=False)
    return set(hits)


def load_exactly(model: nn.Module, weights: Weights) -> None:
    """Load a whole state. Raises BadData with the first differences where the file belongs to another network."""
    own = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    theirs = {name: tuple(t.shape) for name, t in weights.tensors.items()}
    if own != theirs:
        names = sorted(n for n in own.keys() | theirs.keys() if own.get(n) != theirs.get(n))
        shown = [f"{n}: model {own.get(n, 'has none')}, file {theirs.get(n, 'has none')}" for n in names[:5]]
        raise BadData(
            f"{weights.source}: belongs to another network; {len(names)} differences, the first: {'; '.join(shown)}"
        )
    model.load_state_dict(weights.tensors)
