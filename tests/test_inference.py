"""Packed networks: the file gives back what was written, both ways to compute agree, and nothing odd is loaded or run."""

import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load as load_safetensors

from quant import kernels
from quant.inference import BadPackedFile, PackedModel, looks_packed
from quant.inference.file import from_bytes, to_bytes
from quant.inference.graph import Graph, Node, Preprocessing, coded, pack_planes, unpack_planes, weight_of
from quant.inference.registry import OPS

ROOT = Path(__file__).resolve().parent.parent


def signs(
    name: str, inputs: tuple[int, ...], *shape: int, attrs: dict[str, Any] | None = None, **tensors: torch.Tensor
) -> Node:
    given_attrs, planes = coded(torch.randn(*shape) < 0, 1)
    op = "sign_conv2d" if len(shape) == 4 else "sign_linear"
    return Node(op, name, inputs, given_attrs | (attrs or {}), planes | tensors)


def whole_numbers(count: int) -> torch.Tensor:
    return torch.randint(-9, 9, (count,), dtype=torch.int16)


@pytest.fixture(scope="module")
def graph() -> Graph:
    """Every way in which binary layers are fed: by floats, by thresholds, by bits, as images and as rows."""
    torch.manual_seed(0)
    nodes = (
        Node(
            "conv2d", "stem", (0,), {"padding": [1, 1]}, {"weight": torch.randn(20, 3, 3, 3), "bias": torch.randn(20)}
        ),
        Node("relu", "act", (1,)),
        signs(
            "a",
            (2,),
            40,
            20,
            3,
            3,
            attrs={"padding": [1, 1]},
            threshold=torch.rand(20),
            next_threshold=whole_numbers(40),
        ),
        signs("b", (3,), 40, 40, 3, 3, attrs={"padding": [1, 1]}, step=torch.rand(40), bias=torch.randn(40)),
        signs("c", (4,), 40, 40, 3, 3, attrs={"padding": [2, 2], "stride": [2, 2]}, step=torch.rand(40)),
        Node("spatial_mean", "mean", (5,)),
        signs("d", (6,), 50, 40, threshold=torch.rand(40), next_threshold=whole_numbers(50)),
        signs("e", (7,), 50, 50, step=torch.rand(50)),
        Node("linear", "fc", (8,), {}, {"weight": torch.randn(4, 50)}),
    )
    return Graph(nodes, Preprocessing(3, 12, 12, (0.5,) * 3, (0.25,) * 3), ("a", "b", "c", "d"), {"model": "made"})


@given(bits=st.integers(1, 16), data=st.data())
def test_planes_give_back_their_codes(bits: int, data: st.DataObject) -> None:
    codes = torch.tensor(data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=40)))
    planes = pack_planes(codes, bits)
    assert planes.shape == (bits, -(-len(codes) // 8)), "not a bit more than needed"
    assert torch.equal(unpack_planes(planes, codes.shape).to(torch.int64), codes)


def test_a_weight_is_what_its_numbers_say() -> None:
    codes = torch.tensor([[0, 1, 5], [7, 2, 3]])
    attrs, planes = coded(codes, 3)
    step, zero = torch.tensor([0.5, 2.0]), torch.tensor([4.0])
    node = Node("linear", "w", (0,), attrs, planes | {"step": step, "zero": zero})
    assert weight_of(node).tolist() == [[-2.0, -1.5, 0.5], [6.0, -4.0, -2.0]]
    moved = Node("linear", "w", (0,), attrs, planes | {"step": step, "offset": torch.tensor([-1.0])})
    assert weight_of(moved).tolist() == [[-1.0, -0.5, 1.5], [13.0, 3.0, 5.0]]
    signed = Node("linear", "w", (0,), *coded(torch.tensor([[True, False]]), 1))
    assert weight_of(signed).tolist() == [[-1.0, 1.0]]


def test_a_file_gives_back_its_graph_and_is_plain_safetensors(graph: Graph) -> None:
    content = to_bytes(graph)
    assert content == to_bytes(graph)
    again = from_bytes(content)
    assert (again.preprocessing, again.classes, again.about) == (graph.preprocessing, graph.classes, graph.about)
    plain = load_safetensors(content)
    for before, after in zip(graph.nodes, again.nodes, strict=True):
        assert (before.op, before.name, before.inputs, before.attrs) == (
            after.op,
            after.name,
            after.inputs,
            after.attrs,
        )
        for key, tensor in before.tensors.items():
            assert torch.equal(tensor, after.tensors[key])
            assert torch.equal(tensor, plain.pop(f"{before.name}.{key}"))
    assert not plain


def test_bits_and_floats_agree(graph: Graph) -> None:
    if kernels.why_not():
        pytest.skip("the packed kernels cannot run here")
    packed, floats = PackedModel(graph), PackedModel(graph, packed=False)
    assert (packed.kernel, floats.kernel, floats.why_float) == (kernels.available(), "float", "as asked for")
    for batch in (1, 5):
        images = torch.randn(batch, 3, 12, 12)
        assert torch.allclose(packed(images), floats(images), rtol=1e-5, atol=1e-4)
    values, others = packed.begin(images), floats.begin(images)
    for op, other in zip(packed.ops[:4], floats.ops[:4], strict=True):
        op(values)
        other(others)
    assert torch.equal(values[4], others[4]), "thresholds, bits and sums are exact"


@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_of_nothing_has_no_answers(graph: Graph, packed: bool) -> None:
    assert PackedModel(graph, packed=packed)(torch.zeros(0, 3, 12, 12)).shape == (0, 4)
    scales = Node("input_scale", "k", (0,), {"kernel": [3, 3], "padding": [1, 1], "groups": 3, "out_channels": 6})
    assert OPS["input_scale"].make(scales, packed)(torch.zeros(0, 3, 12, 12)).shape == (0, 6, 12, 12)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 1, 12, 12), torch.zeros(2, 3, 12, 11), torch.zeros(2, 3, 24, 24), torch.zeros(3, 12, 12),
        torch.zeros(2, 3, 12, 12, dtype=torch.float64), torch.zeros(2, 3, 12, 12, dtype=torch.uint8), torch.zeros(()),
    ],
    ids=lambda images: f"{images.dtype} {tuple(images.shape)}",
)  # fmt: skip
def test_images_that_a_network_does_not_take_are_refused(images: torch.Tensor, packed: bool) -> None:
    """An `affine` in front would broadcast a single channel."""
    vectors = {"scale": torch.ones(3), "shift": torch.zeros(3)}
    nodes = (Node("affine", "norm", (0,), {}, vectors), Node("spatial_mean", "mean", (1,)))
    model = PackedModel(Graph(nodes, Preprocessing(3, 12, 12, (0.5,) * 3, (0.25,) * 3), ("a", "b", "c")), packed=packed)
    with pytest.raises(ValueError, match=r"accepted: torch\.float32 \(N, 3, 12, 12\)") as caught:
        model(images)
    assert f"{images.dtype} {tuple(images.shape)}" in str(caught.value)
    assert model(torch.zeros(2, 3, 12, 12)).shape == (2, 3)


def test_values_are_let_go_when_nobody_needs_them(graph: Graph) -> None:
    model = PackedModel(graph)
    values = model.begin(torch.randn(2, 3, 12, 12))
    for op in model.ops:
        op(values)
        assert sum(value is not None for value in values) <= 2
    assert values[-1].shape == (2, 4)


def test_without_numba_it_computes_in_floats_and_says_so(graph: Graph, tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text("raise ImportError('not installed')\n")
    (tmp_path / "net.packed.safetensors").write_bytes(to_bytes(graph))
    images = torch.randn(2, 3, 12, 12)
    torch.save(images, tmp_path / "images.pt")
    program = (
        "import torch; from quant.inference import PackedModel; m = PackedModel.load('net.packed.safetensors');"
        "print(m.kernel, '|', m.why_float); torch.save(m(torch.load('images.pt')).clone(), 'out.pt')"
    )
    said = in_another_process(program, tmp_path)
    assert said.startswith("float | the packed kernels need Numba")
    assert torch.allclose(torch.load(tmp_path / "out.pt"), PackedModel(graph)(images), rtol=1e-5, atol=1e-4)


def test_it_runs_without_the_training_code(graph: Graph, tmp_path: Path) -> None:
    (tmp_path / "net.packed.safetensors").write_bytes(to_bytes(graph))
    program = (
        "import sys, torch; from quant.inference import PackedModel; "
        "PackedModel.load('net.packed.safetensors')(torch.zeros(1, 3, 12, 12));"
        "print([m for m in sys.modules if m.split('.')[0] in ('models', 'runner', 'hydra', 'pydantic') "
        "or m.startswith('quant.') and m.split('.')[1] not in ('inference', 'kernels', 'pack')])"
    )
    assert in_another_process(program, tmp_path).strip() == "[]"


def in_another_process(program: str, folder: Path) -> str:
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- what is not loaded ----------------------------------------------------------------------------------------------


def resealed(
    content: bytes, change: Callable[[dict[str, Any], dict[str, Any]], None], data: bytes | None = None
) -> bytes:
    """The file with another header (its tables, and the description of the graph), under a checksum that fits."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    described = json.loads(header["__metadata__"]["graph"])
    change(header, described)
    header["__metadata__"] |= {"sha256": "0" * 64}
    if not isinstance(header["__metadata__"].get("raw"), str):
        header["__metadata__"]["graph"] = json.dumps(described)
    else:
        header["__metadata__"]["graph"] = header["__metadata__"].pop("raw")
    text = json.dumps(header).encode()
    rest = content[8 + length :] if data is None else data
    digest = hashlib.sha256(text + rest).hexdigest()
    return len(text).to_bytes(8, "little") + text.replace(b"0" * 64, digest.encode()) + rest


def set_in(path: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """Change one place: 'header/…' or 'graph/…'."""

    def change(header: dict[str, Any], described: dict[str, Any]) -> None:
        root, *steps, last = path.split("/")
        target: Any = header if root == "header" else described
        for step in steps:
            target = target[int(step)] if isinstance(target, list) else target[step]
        target[int(last) if isinstance(target, list) else last] = value

    return change


def attribute(node: int, **values: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(_: dict[str, Any], described: dict[str, Any]) -> None:
        described["nodes"][node] = [*described["nodes"][node][:3], (described["nodes"][node] + [{}])[3] | values]

    return change


def becomes(node: int, kind: str, **attrs: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """Another operation in the place of one."""

    def change(_: dict[str, Any], described: dict[str, Any]) -> None:
        described["nodes"][node] = [kind, *described["nodes"][node][1:3], attrs]

    return change


def test_resealing_alone_changes_nothing(graph: Graph) -> None:
    assert PackedModel.from_bytes(resealed(to_bytes(graph), lambda *_: None)).classes == graph.classes


NESTED = "[" * 100_000 + "]" * 100_000
ODD: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], None], str]] = {
    "other version": (set_in("header/__metadata__/format", "lowbit-runner packed 2"), "reads version 1"),
    "other format": (set_in("header/__metadata__/format", "pt"), "not a packed network"),
    "recursion": (set_in("header/__metadata__/raw", NESTED), "not sound JSON"),
    "not json": (set_in("header/__metadata__/raw", "import os"), "not sound JSON"),
    "not a number": (set_in("header/__metadata__/raw", '{"nodes": NaN}'), "no number"),
    "twice the same key": (set_in("header/__metadata__/raw", '{"nodes": 1, "nodes": 2}'), "occurs twice"),
    "no nodes": (set_in("graph/nodes", []), "1 to 10,000 operations"),
    "a million nodes": (set_in("graph/nodes", [["relu", "r", [0]]] * 20_000), "1 to 10,000 operations"),
    "unknown operation": (set_in("graph/nodes/1/0", "exec"), "unknown operation 'exec'"),
    "a value of the future": (set_in("graph/nodes/1/2", [7]), "inputs [7]"),
    "a negative value": (set_in("graph/nodes/1/2", [-1]), "inputs [-1]"),
    "no input": (set_in("graph/nodes/1/2", []), "inputs []"),
    "a node that is none": (set_in("graph/nodes/1", "relu"), "not [operation"),
    "two of one name": (set_in("graph/nodes/1/1", "stem"), "share a name"),
    "unknown attribute": (attribute(1, code="print()"), "no attribute"),
    "absurd stride": (attribute(0, stride=[1 << 40, 1]), "stride is [1099511627776, 1]"),
    "absurd padding": (attribute(0, padding=[1 << 20, 1]), "accepted: two whole numbers from 0 to 256"),
    "a text for a number": (attribute(0, groups="1"), "groups is 1"),
    "absurd bits": (attribute(2, bits=1 << 30), "bits is"),
    "bits that are not there": (becomes(2, "conv2d", bits=2, shape=[40, 20, 3, 3]), "codes (1, 900), expected uint8 (2, 900)"),
    "absurd shape": (attribute(2, shape=[1 << 20, 1 << 20, 3, 3]), "expected uint8"),
    "a kernel beyond any image": (attribute(2, shape=[1, 1, 4096, 4096]), "of a kernel two more up to 256"),
    "a shape that does not fit": (attribute(2, shape=[20, 40, 3, 3]), "makes no sense here"),
    "a huge value": (set_in("graph/nodes/5", ["adaptive_avg_pool2d", "mean", [5], {"size": [256, 256]}]), "makes no sense"),
    "classes without names": (set_in("graph/classes", [1, 2, 3, 4]), "classes"),
    "one class too many": (set_in("graph/classes", list("abcde")), "5 classes"),
    "absurd image": (set_in("graph/input/size", 1 << 30), "input: makes no sense"),
    "an image beyond memory": (set_in("graph/input/size", 1 << 14), "numbers of one image"),
    "no deviation": (set_in("graph/input/std", [0.0, 1.0, 1.0]), "input: makes no sense"),
    "no image": (set_in("graph/input", {}), "not complete"),
    "absurd tensor": (set_in("header/stem.weight/shape", [1 << 39, 1 << 39]), "do not hold F32"),
    "negative tensor": (set_in("header/stem.weight/shape", [-1, 3]), "not accepted"),
    "unknown type": (set_in("header/stem.weight/dtype", "F64"), "F64"),
    "offsets that overlap": (set_in("header/stem.weight/data_offsets", [0, 2160]), "leave a gap"),
    "offsets that are none": (set_in("header/stem.weight/data_offsets", "all"), "not described"),
    "a type that is a list": (set_in("header/stem.weight/dtype", ["F32"]), "is not accepted; types"),
    "a shape that is a text": (set_in("header/stem.weight/shape", "20"), "is not accepted; types"),
    "a limit of many digits": (becomes(1, "clamp", low=1 - 10**400, high=0), "low is -9999"),
    "a limit beyond float32": (becomes(1, "clamp", low=-1e300, high=0), "low is -1e+300, accepted: a finite number of float32"),
    "a step that float32 rounds to 0": (becomes(1, "quantize", step=1e-60, low=0, high=1), "step is 1e-60"),
    "a mean of many digits": (set_in("graph/input/mean", [10**400 - 1, 0, 0]), "input: makes no sense"),
    "a deviation beyond float32": (set_in("graph/input/std", [1e39, 1, 1]), "input: makes no sense"),
    "signs of two bits": (attribute(2, bits=2), "bits is 2, accepted: a whole number from 1 to 1"),
    "a tensor of nobody": (set_in("graph/nodes/8/1", "other"), "tensors belong to none"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_sealed_nonsense_is_refused(name: str, graph: Graph) -> None:
    change, says = ODD[name]
    content = resealed(to_bytes(graph), change)
    with pytest.raises(BadPackedFile) as caught:
        PackedModel.from_bytes(content)
    assert says in str(caught.value)


@pytest.mark.parametrize("key", ["step", "bias", "threshold", "next_threshold"])
@pytest.mark.parametrize("shape", [(10, 4, 1, 1), (10, 4)], ids=["sign_conv2d", "sign_linear"])
@pytest.mark.parametrize("size", [(1,), (10, 1), (16,)], ids=str)
def test_one_number_for_all_channels_of_signs_is_refused(
    key: str, shape: tuple[int, ...], size: tuple[int, ...]
) -> None:
    """Floats would broadcast it, packed bits would fill up with zeros."""
    front = [] if len(shape) == 4 else [Node("spatial_mean", "mean", (0,))]
    back = [Node("spatial_mean", "mean", (1,))] if len(shape) == 4 else []
    nodes = (*front, signs("binary", (len(front),), *shape, **{key: torch.full(size, 0.5)}), *back)
    odd = Graph(nodes, Preprocessing(4, 8, 8, (0.5,) * 4, (0.25,) * 4), tuple("0123456789"))
    with pytest.raises(BadPackedFile, match=rf"binary \({nodes[len(front)].op}\) .* {key} has the shape"):
        PackedModel(odd)


READERS = {
    "relu": (Node("relu", "reader", (2,)), "reader (relu) reads the signs of source as numbers"),
    "a threshold": (signs("reader", (2,), 4, 4, threshold=torch.rand(4)), "reader (sign_linear) reads the signs of source"),
    "nobody": (None, "source (sign_linear) hands signs on, but is the last operation"),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_signs_that_are_read_as_numbers_are_refused(name: str) -> None:
    """Packed, they are 32 in a number."""
    reader, says = READERS[name]
    source = signs("source", (1,), 4, 4, next_threshold=whole_numbers(4))
    nodes = (Node("spatial_mean", "mean", (0,)), source, *([] if reader is None else [reader]))
    odd = Graph(nodes, Preprocessing(4, 8, 8, (0.5,) * 4, (0.25,) * 4), tuple("abcd"))
    with pytest.raises(BadPackedFile, match=re.escape(says)):
        PackedModel(odd)


def test_a_checksum_that_is_no_text_is_refused(graph: Graph) -> None:
    content = to_bytes(graph)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"]["sha256"] = "\ud800" * 64
    text = json.dumps(header).encode()
    with pytest.raises(BadPackedFile, match="it has no checksum"):
        from_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def test_a_bomb_made_of_a_pool_is_refused(graph: Graph) -> None:
    nodes = (*graph.nodes[:1], Node("adaptive_avg_pool2d", "bomb", (1,), {"size": [256, 256]}), *[
        Node("concat", f"twice{k}", (k + 1, k + 1)) for k in range(1, 12)
    ])  # fmt: skip
    with pytest.raises(BadPackedFile, match="numbers of one image"):
        PackedModel(replace(graph, nodes=nodes))


@pytest.mark.parametrize(
    ("kernel", "padding"),
    [((256, 256), (256, 256)), ((256, 256), (0, 255)), ((1, 256), (0, 255)), ((256, 64), (0, 63))],
)
def test_a_bomb_made_of_padding_is_refused(kernel: tuple[int, int], padding: tuple[int, int]) -> None:
    """A few bytes of weights, and hundreds of megabytes for the ways in which they stick out of an image."""
    nodes = (
        signs("bomb", (0,), 1, 1, *kernel, attrs={"padding": list(padding), "stride": [99, 99]}),
        Node("spatial_mean", "mean", (1,)),
    )
    content = to_bytes(Graph(nodes, Preprocessing(1, 300, 300, (0.5,), (0.25,)), ("a",)))
    assert len(content) < 10_000
    with pytest.raises(
        BadPackedFile, match=r"bomb \(sign_conv2d\) makes no sense here: a kernel of .* needs a table of"
    ):
        PackedModel.from_bytes(content)


@pytest.mark.parametrize(("side", "padding"), [(1, 1), (3, 2), (5, 5), (7, 6), (31, 15)])
def test_any_padding_that_a_network_has_is_loaded(side: int, padding: int) -> None:
    nodes = (
        signs("wide", (0,), 1, 1, side, side, attrs={"padding": [padding] * 2}),
        Node("spatial_mean", "mean", (1,)),
    )
    graph = Graph(nodes, Preprocessing(1, 32, 32, (0.5,), (0.25,)), ("a",))
    images = torch.randn(2, 1, 32, 32)
    assert torch.allclose(PackedModel(graph)(images), PackedModel(graph, packed=False)(images), rtol=1e-5, atol=1e-4)


def test_every_flipped_bit_is_noticed(graph: Graph) -> None:
    content = to_bytes(graph)
    header = 8 + int.from_bytes(content[:8], "little")
    places = [*range(0, header * 8, 7), *range(header * 8, len(content) * 8, 997)]
    for place in places:
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(BadPackedFile):
            from_bytes(bytes(flipped))


@given(share=st.floats(0, 1, exclude_max=True), more=st.binary(max_size=20))
def test_a_file_of_another_length_is_noticed(graph: Graph, share: float, more: bytes) -> None:
    content = to_bytes(graph)
    with pytest.raises(BadPackedFile):
        from_bytes(content[: int(len(content) * share)])
    if more:
        with pytest.raises(BadPackedFile):
            from_bytes(content + more)


@given(st.binary(max_size=300))
def test_noise_is_refused(noise: bytes) -> None:
    for content in (noise, len(noise).to_bytes(8, "little") + noise, (5).to_bytes(8, "little") + b"{" + noise):
        with pytest.raises(BadPackedFile):
            from_bytes(content)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def test_pickles_and_zip_bombs_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for protocol in range(6):
        Path("net.packed.safetensors").write_bytes(pickle.dumps(Payload(), protocol=protocol))
        with pytest.raises(BadPackedFile, match="not a packed network"):
            PackedModel.load("net.packed.safetensors")
    torch.save(Payload(), "net.packed.safetensors")
    with pytest.raises(BadPackedFile, match="zip archive or a pickle"):
        PackedModel.load("net.packed.safetensors")
    with zipfile.ZipFile("bomb", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("data", bytes(1 << 26))
    with pytest.raises(BadPackedFile, match="zip archive or a pickle"):
        PackedModel.load("bomb")
    assert not Path("executed").exists()
    assert not looks_packed(Path("bomb"))


def test_a_huge_header_is_not_read(graph: Graph) -> None:
    content = to_bytes(graph)
    for length in (1 << 62, 1 << 30, 5 << 20):
        with pytest.raises(BadPackedFile, match=r"at most 4,194,304|truncated"):
            from_bytes(length.to_bytes(8, "little") + content[8:])


def test_numbers_that_are_none_are_refused(graph: Graph) -> None:
    for number in (float("nan"), float("inf")):
        stem = replace(graph.nodes[0], tensors={**graph.nodes[0].tensors, "bias": torch.full((20,), number)})
        with pytest.raises(BadPackedFile, match=r"stem\.bias: not all of its numbers are finite"):
            from_bytes(to_bytes(replace(graph, nodes=(stem, *graph.nodes[1:]))))
