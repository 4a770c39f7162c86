"""Which runs are tortured, and what two runs must have in common to count as the same."""

import csv
import hashlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from runner.checkpoint import Checkpoints, load
from runner.compose import choices_of, config_from, split_options
from runner.folder import run_path
from runner.schema import RunConfig

DATA = (
    "dataset=synthetic dataset.size=8 dataset.channels=1 dataset.samples=48 dataset.test_samples=16 dataset.classes=4 "
    "dataset.augment.flip=true dataset.augment.crop=1 batch_size=8"
).split()
MODEL = ["model=torture", "plugins=[tests.torture.tiny]", "--config-dir", str(Path(__file__).parent / "conf")]
QUIET = "trainer.progress=none trainer.dashboard=none trainer.threads=1 trainer.device=cpu".split()
BASE = [*DATA, *MODEL, *QUIET]
SWITCH = "regime.phases=[{epoch: 0, optimizer: Adam, lr: 0.01}, {epoch: 1, optimizer: SGD, lr: 0.05, momentum: 0.9}]"


@dataclass(frozen=True)
class Scenario:
    """One kind of run: its quantizer and what else is switched on."""

    name: str
    words: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        """The command line without `python -m runner`. Runs go to ./outputs, so that their configs are the same everywhere."""
        return [*BASE, *self.words]

    @cached_property
    def config(self) -> RunConfig:
        return config_from(*split_options(self.command))

    def folder(self, place: Path) -> Path:
        """The run folder of a run that was started in `place`."""
        return place / run_path(self.config)


TRAINING = ("epochs=3", "trainer.checkpoint_every=2", SWITCH)
POISONED = ("model.poison=0.3", "trainer.on_nan=lower_lr")
SHORT = ("epochs=2", "dataset.samples=20", "trainer.checkpoint_every=2")


def scenarios() -> list[Scenario]:
    """Every method whose state or randomness a checkpoint has to carry; the optimizer class changes in mid-run."""
    ema = "trainer.ema=0.9"
    return [
        Scenario("float with an average", ("quant=none", *TRAINING, ema)),
        Scenario("xnor", ("quant=xnor", *TRAINING)),
        Scenario("lsq with an average", ("quant=lsq", *TRAINING, ema)),
        Scenario("8bit-rangebn, stochastic rounding", ("quant=8bit-rangebn", *TRAINING)),
        Scenario("actgrad, stochastic rounding", ("quant=actgrad", "quant.bits=2", *TRAINING)),
        Scenario("lsq, batches that give NaN", ("quant=lsq", *TRAINING, *POISONED)),
    ]


def short_scenario() -> Scenario:
    """Four steps and three commits: for sweeps over every system call."""
    return Scenario("short xnor", ("quant=xnor", *SHORT))


def short_scenarios() -> list[Scenario]:
    """One of each quantizer, as short."""
    return [Scenario(quant, (f"quant={quant}", *SHORT)) for quant in choices_of()["quant"]]


@dataclass(frozen=True)
class Fingerprint:
    """All that must not depend on how often a run was killed."""

    metrics: str
    quant: str
    weights: str
    state: str
    rows: int
    litter: int  # temporary files left behind

    def differences(self, other: "Fingerprint") -> list[str]:
        return [key for key in vars(self) if getattr(self, key) != getattr(other, key)]


def fingerprint(folder: Path) -> Fingerprint:
    """Of a finished run: CSV bytes, the weights for sharing, and the whole last state."""
    newest = next(iter(Checkpoints(folder / "checkpoints").manifests()), None)
    return Fingerprint(
        metrics=_sha(folder / "metrics.csv"),
        quant=_sha(folder / "quant.csv"),
        weights=_sha(folder / "weights.safetensors"),
        state=digest(without_clock(load(newest).state)) if newest else "none",
        rows=len(rows_of(folder / "metrics.csv")),
        litter=sum(1 for _ in folder.rglob(".*.tmp-*")),
    )


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def row_faults(folder: Path, reference: Path) -> dict[str, int]:
    """Rows of metrics.csv that were lost, repeated or torn, measured against an uninterrupted run."""
    content = (folder / "metrics.csv").read_bytes()
    epochs = [row["epoch"] for row in rows_of(folder / "metrics.csv")]
    wanted = [row["epoch"] for row in rows_of(reference / "metrics.csv")]
    return {
        "lost": len(set(wanted) - set(epochs)),
        "repeated": len(epochs) - len(set(epochs)),
        "torn": int(not content.endswith(b"\n")),
    }


def without_clock(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state without the seconds that it took."""
    progress = {key: value for key, value in state["progress"].items() if key != "seconds"}
    return {**state, "progress": progress}


def digest(value: Any) -> str:
    """SHA-256 over nested containers of tensors and plain values, types and shapes included."""
    found = hashlib.sha256()
    for piece in _pieces(value):
        found.update(piece)
    return found.hexdigest()


def _pieces(value: Any) -> Iterable[bytes]:
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().contiguous()
        yield f"tensor {tensor.dtype} {tuple(tensor.shape)} ".encode()
        yield tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            yield f"key {key!r} ".encode()
            yield from _pieces(value[key])
    elif isinstance(value, list | tuple):
        yield f"list {len(value)} ".encode()
        for item in value:
            yield from _pieces(item)
    else:
        yield f"{value!r} ".encode()


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
