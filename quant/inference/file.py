"""One file for a packed network: safetensors whose header carries the graph as JSON and a checksum over everything.

    8 bytes         length of the header
    header          JSON: {"__metadata__": {"format", "graph", "sha256"}, "<layer>.<tensor>": {"dtype", "shape", "data_offsets"}}
    data            the tensors, little-endian, without gaps

`sha256` is that of the header, with 64 zeros in its place, and of the data. Reading is strict and allocates nothing that the
file does not hold: no pickle, no compression, no code, bounded sizes; whatever is odd is BadPackedFile.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quant.inference.attributes import number, positive
from quant.inference.graph import Graph, Node, Preprocessing, planes_shape
from quant.inference.ops import OPS

FORMAT, VERSION = "lowbit-runner packed", 1
LARGEST_HEADER = 4 << 20
MOST_NODES = 10_000
NO_DIGEST = "0" * 64
DTYPES = {"F32": torch.float32, "I32": torch.int32, "I16": torch.int16, "U8": torch.uint8}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ARRAYS = {"F32": "<f4", "I32": "<i4", "I16": "<i2", "U8": "u1"}


class BadPackedFile(ValueError):
    """Not a packed network, or one that is damaged, of another version, or makes no sense."""


# ---- write -----------------------------------------------------------------------------------------------------------


def to_bytes(graph: Graph) -> bytes:
    """The file of a graph. The same graph gives the same bytes. Raises BadPackedFile for an attribute that JSON does not hold."""
    _refuse_infinite(graph.nodes)
    tensors = {f"{node.name}.{key}": t for node in graph.nodes for key, t in node.tensors.items()}
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {
        "__metadata__": {"format": f"{FORMAT} {VERSION}", "graph": _text(_described(graph)), "sha256": NO_DIGEST}
    }
    parts, end = [], 0
    for name in order:
        tensor = tensors[name].detach().cpu().contiguous()
        parts.append(tensor.numpy().astype(ARRAYS[NAMES[tensor.dtype]]).tobytes())
        begin, end = end, end + len(parts[-1])
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    data = b"".join(parts)
    text = _text(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256(text + data).hexdigest()
    return len(text).to_bytes(8, "little") + text.replace(NO_DIGEST.encode(), digest.encode()) + data


def _refuse_infinite(nodes: Sequence[Node]) -> None:
    for node in nodes:
        for key, value in node.attrs.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise BadPackedFile(f"{node.name} ({node.op}): {key} is {value}, accepted: a finite number")


def _described(graph: Graph) -> dict[str, Any]:
    """The graph without its tensors. A node is [operation, name, inputs] or [operation, name, inputs, attributes]."""
    nodes = [[n.op, n.name, list(n.inputs), *([dict(n.attrs)] if n.attrs else [])] for n in graph.nodes]
    facts = {"input": asdict(graph.preprocessing), "classes": list(graph.classes), "nodes": nodes}
    return facts | ({"about": dict(graph.about)} if graph.about else {})


def _text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


# ---- read ------------------------------------------------------------------------------------------------------------


def read(path: Path) -> Graph:
    """The graph of a file. Raises OSError, or BadPackedFile with the path."""
    try:
        return from_bytes(path.read_bytes())
    except BadPackedFile as error:
        raise BadPackedFile(f"{path}: {error}") from error


def looks_packed(path: Path) -> bool:
    """Whether a file says that it is a packed network (which does not mean that it is sound)."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return f'"{FORMAT} '.encode() in file.read(min(length, LARGEST_HEADER))


def from_bytes(content: bytes) -> Graph:
    """The graph of the content of a file. Raises BadPackedFile."""
    header, begin = _header(content)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not str(metadata.get("format", "")).startswith(f"{FORMAT} "):
        raise BadPackedFile(f"a safetensors file, but not a packed network (its format is not '{FORMAT} {VERSION}')")
    if metadata["format"] != f"{FORMAT} {VERSION}":
        raise BadPackedFile(
            f"its format is {metadata['format']!r}; this program reads version {VERSION}: export it again"
        )
    _refuse_damage(content, begin, metadata.get("sha256"))
    try:
        tensors = _tensors(header, memoryview(content)[begin:])
        return _graph(_json(str(metadata["graph"])), tensors)
    except (KeyError, TypeError, AttributeError) as error:
        raise BadPackedFile(f"the description of its network is not complete ({error!r})") from error


def _header(content: bytes) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(content[:8], "little")
    if len(content) < 10 or content[8:9] != b"{":
        other = content[:2] == b"PK" or content[:1] == b"\x80"
        hint = (
            "a zip archive or a pickle, and such files are not opened" if other else "it does not begin as safetensors"
        )
        raise BadPackedFile(f"not a packed network: {hint}")
    if length > LARGEST_HEADER:
        raise BadPackedFile(f"its header claims {length:,} bytes; at most {LARGEST_HEADER:,} are accepted")
    if 8 + length > len(content):
        raise BadPackedFile(f"truncated: its header has {length:,} bytes, the whole file {len(content):,}")
    header = _json(content[8 : 8 + length].decode("utf-8", "replace"))
    if not isinstance(header, dict):
        raise BadPackedFile("its header is not a table")
    return header, 8 + length


def _json(text: str) -> Any:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a key occurs twice")
        return table

    def no_constants(name: str) -> Any:
        raise ValueError(f"{name} is no number")

    try:
        return json.loads(text, object_pairs_hook=no_duplicates, parse_constant=no_constants)
    except (ValueError, RecursionError) as error:
        raise BadPackedFile(f"damaged: its header is not sound JSON ({error})") from error


def _refuse_damage(content: bytes, begin: int, digest: Any) -> None:
    if not isinstance(digest, str) or len(digest) != 64 or not digest.isascii():
        raise BadPackedFile("damaged: it has no checksum")
    text = content[8:begin].replace(digest.encode(), NO_DIGEST.encode(), 1)
    if hashlib.sha256(text + content[begin:]).hexdigest() != digest:
        raise BadPackedFile("damaged or truncated: its checksum is not the one that was saved")


def _tensors(table: Mapping[str, Any], data: memoryview) -> dict[str, Tensor]:
    tensors, end = {}, 0
    for name, entry in sorted(table.items(), key=lambda item: _begin(*item)):
        dtype, shape = entry.get("dtype"), entry.get("shape")
        begin, stop = entry["data_offsets"]
        if (
            not isinstance(dtype, str)
            or dtype not in DTYPES
            or not isinstance(shape, list)
            or not all(type(n) is int and 0 < n < 1 << 40 for n in shape)
        ):
            raise BadPackedFile(f"tensor {name}: {dtype} {shape} is not accepted; types: {', '.join(DTYPES)}")
        if begin != end or not begin < stop <= len(data) or stop - begin != prod(shape) * DTYPES[dtype].itemsize:
            raise BadPackedFile(f"tensor {name}: bytes {begin} to {stop} do not hold {dtype} {shape}, or leave a gap")
        tensors[name], end = (
            torch.empty(shape, dtype=DTYPES[dtype]),
            stop,
        )  # torch's memory is aligned, the file's is not
        tensors[name].numpy()[...] = np.frombuffer(data[begin:stop], ARRAYS[dtype]).reshape(shape)
        if dtype == "F32" and not bool(tensors[name].isfinite().all()):
            raise BadPackedFile(f"tensor {name}: not all of its numbers are finite")
    if end != len(data):
        raise BadPackedFile(f"{len(data) - end:,} bytes belong to no tensor")
    return tensors


def _begin(name: str, entry: Any) -> int:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int for n in offsets)):
        raise BadPackedFile(f"tensor {name}: not described")
    begin: int = offsets[0]
    return begin


def _graph(said: Mapping[str, Any], tensors: dict[str, Tensor]) -> Graph:
    rows, left = said["nodes"], set(tensors)
    if not isinstance(rows, list) or not 0 < len(rows) <= MOST_NODES:
        raise BadPackedFile(f"a network has 1 to {MOST_NODES:,} operations")
    nodes: list[Node] = []
    for row in rows:
        nodes.append(_node(row, len(nodes), tensors))
        left -= {f"{nodes[-1].name}.{key}" for key in nodes[-1].tensors}
    if left or len({node.name for node in nodes}) != len(nodes):
        raise BadPackedFile(f"operations share a name, or tensors belong to none: {', '.join(sorted(left)[:5])}")
    classes = said["classes"]
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise BadPackedFile("classes: not a list of names")
    about = said.get("about", {})
    if not isinstance(about, dict):
        raise BadPackedFile("about: not a table")
    return Graph(tuple(nodes), _preprocessing(said["input"]), tuple(classes), about)


def _node(row: Any, before: int, tensors: Mapping[str, Tensor]) -> Node:
    """One operation: known, reading values that exist, with attributes and tensors that it knows."""
    if not isinstance(row, list) or len(row) not in (3, 4) or not all(isinstance(text, str) for text in row[:2]):
        raise BadPackedFile(f"operation {before + 1}: not [operation, name, inputs, attributes]")
    kind, name, inputs, attrs = row[0], row[1], row[2], row[3] if len(row) == 4 else {}
    if kind not in OPS:
        raise BadPackedFile(f"{name}: unknown operation {kind!r}")
    known = OPS[kind]
    right_count = isinstance(inputs, list) and (len(inputs) == known.inputs or (known.inputs < 0 and inputs))
    if not right_count or not all(type(i) is int and 0 <= i <= before for i in inputs):
        raise BadPackedFile(f"{name} ({kind}): inputs {inputs} are not {abs(known.inputs)} earlier values")
    if not isinstance(attrs, dict):
        raise BadPackedFile(f"{name} ({kind}): attributes are not a table")
    for key, value in attrs.items():
        wanted = known.attrs[key](value) if key in known.attrs else f"no attribute; known: {', '.join(known.attrs)}"
        if wanted is not None:
            raise BadPackedFile(f"{name} ({kind}): {key} is {str(value)[:40]}, accepted: {wanted}")
    own = {key: tensors[f"{name}.{key}"] for key in sorted(known.tensors) if f"{name}.{key}" in tensors}
    node = Node(kind, name, tuple(inputs), attrs, own)
    _refuse_wrong_weight(node, known.required)
    return node


def _refuse_wrong_weight(node: Node, required: frozenset[str]) -> None:
    missing = required - node.tensors.keys()
    if missing:
        raise BadPackedFile(f"{node.name} ({node.op}): tensors {', '.join(sorted(missing))} are missing")
    if "codes" in node.tensors:
        codes, expected = node.tensors["codes"], planes_shape(node.attrs["bits"], node.attrs["shape"])
        if codes.dtype != torch.uint8 or tuple(codes.shape) != expected:
            raise BadPackedFile(f"{node.name} ({node.op}): codes {tuple(codes.shape)}, expected uint8 {expected}")


def _preprocessing(said: Mapping[str, Any]) -> Preprocessing:
    numbers = {key: said[key] for key in ("channels", "size", "pixels")}
    mean, std, crop = said["mean"], said["std"], said["crop"]
    right = all(type(n) is int and 0 < n <= 1 << 14 for n in numbers.values()) and numbers["channels"] <= 1 << 10
    right = right and positive(crop) is None and crop <= 1
    for values, check in ((mean, number), (std, positive)):
        right = right and isinstance(values, list) and len(values) == numbers["channels"]
        right = right and all(check(v) is None for v in values)
    if not right:
        raise BadPackedFile(f"input: makes no sense: {str(dict(said))[:200]}")
    return Preprocessing(**numbers, mean=tuple(mean), std=tuple(std), crop=crop)
