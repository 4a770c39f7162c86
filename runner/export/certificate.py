"""Make an export, try it on the whole validation set, and write both: or neither."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors

from quant.inference import BadPackedFile, PackedModel
from runner.build import build
from runner.environment import environment
from runner.evaluate import Stored, why_float
from runner.export.packed import packed_bytes
from runner.export.parity import Bound, Network, Parity, compare
from runner.faults import BadData
from runner.files import json_bytes, write_together
from runner.weights import weights_bytes

ALIKE = Bound(agreement=99, top1_delta=0.5)  # where another order of a sum may move a value to the next code
SAME = Bound(agreement=100)
BOUNDS = {"packed": ALIKE, "safetensors": replace(SAME, logit_difference=0.0), "onnx": ALIKE}


def _bound(wanted: str, exported: Network, bounds: Mapping[str, float]) -> Bound:
    """What is accepted: of a packed binary network every answer, of others what BOUNDS says, if nothing else was said."""
    binary = isinstance(exported, PackedModel) and exported.binary
    bound = SAME if binary else BOUNDS[wanted]
    bound = replace(bound, agreement=bounds.get("agreement", bound.agreement))
    return replace(bound, logit_difference=bounds.get("difference", bound.logit_difference))


@dataclass(frozen=True)
class Made:
    """An export that passed: its content, and what its certificate says."""

    content: bytes
    parity: Parity
    facts: Mapping[str, Any]
    remarks: tuple[str, ...]


def certified(stored: Stored, wanted: str, bounds: Mapping[str, float]) -> Made:
    """Raises BadData where the network cannot be exported, or what was exported is outside of its bound."""
    content, exported, remarks = MAKERS[wanted](stored)
    bound = _bound(wanted, exported, bounds)
    parity = compare(stored.model, exported, stored.data.val, stored.sizes)
    faults = parity.faults(bound)
    if faults:
        raise BadData(f"nothing is written: on the {parity.images} validation images {'; '.join(faults)}")
    facts = {
        "format": wanted,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "made_from": str(stored.weights.source),
        "model": stored.config.model.name,
        "quant": stored.config.quant.name,
        "dataset": stored.config.dataset.name,
        "bound": vars(bound),
        **parity.figures(),
        "remarks": list(remarks),
        "environment": environment(torch.device("cpu")),
    }
    return Made(content, parity, facts, remarks)


def write(made: Made, target: Path) -> None:
    """The file and its certificate; where one cannot be written, neither is, and those of an earlier export stay.

    Raises StorageError.
    """
    beside = target.with_name(f"{target.name}.parity.json")
    write_together({beside: json_bytes(made.facts), target: made.content})


def _packed(stored: Stored) -> tuple[bytes, Network, tuple[str, ...]]:
    try:
        content = packed_bytes(stored)
        model = PackedModel.from_bytes(content)
    except BadPackedFile as error:  # a size or a number beyond what such a file holds
        raise BadData(f"the network cannot be exported as a packed file: {error}") from error
    return content, model, (f"kernel: {model.kernel}{why_float(model)}",)


def _safetensors(stored: Stored) -> tuple[bytes, Network, tuple[str, ...]]:
    content = weights_bytes(stored.model.state_dict(), stored.weights.config)
    data = stored.data
    again = build(
        stored.config.model_copy(update={"pretrained": None}),
        in_channels=data.in_channels,
        num_classes=len(data.classes),
        image_size=data.image_size,
    ).model
    again.load_state_dict(load_safetensors(content))
    return content, again.eval(), ()


def _onnx(stored: Stored) -> tuple[bytes, Network, tuple[str, ...]]:
    from runner.export.onnx import onnx_bytes, session

    content, remarks = onnx_bytes(stored)
    return content, session(content), remarks


MAKERS: dict[str, Callable[[Stored], tuple[bytes, Network, tuple[str, ...]]]] = {
    "packed": _packed,
    "safetensors": _safetensors,
    "onnx": _onnx,
}
