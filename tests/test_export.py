"""Exports compute what was trained, to the last bit where that is promised; what fails its certificate is not written."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import largest_file
from hypothesis import given
from hypothesis import strategies as st
from small_nets import KEPT, Woven, after_two_steps, dilated
from test_inference import resealed, set_in
from torch import nn

from models.base import build
from quant import kernels
from quant.base import FLOAT, QuantizedLayer, find
from quant.inference import BadPackedFile, PackedModel
from quant.inference.file import to_bytes
from quant.inference.graph import Graph, Node, Preprocessing, coded
from quant.surgery import MATMUL, calibrate_, quantize_
from runner.cli import run
from runner.compose import config_from
from runner.export.certificate import Made, write
from runner.export.fold import change, fold
from runner.export.parity import Bound, Parity, compare, explained
from runner.export.trace import trace
from runner.faults import BadData, StorageError
from runner.job import train
from runner.weights import read_weights, save_weights

QUANTIZERS: list[tuple[str, dict[str, Any]]] = [
    ("none", {}), ("xnor", {}), ("xnor", {"input_scale": True}), ("xnor", {"binary_activations": False}),
    ("xnor", {"standardise": True, "tau": 0.9}), ("xnor", {"binary_weights": False}),
    ("xnor", {"input_norm": "none"}), ("xnor", {"centre": "graph"}),
    ("lsq", {"preset": "v1"}), ("lsq", {"preset": "plus"}), ("lsq", {"preset": "plain", "weight_bits": 3}),
    ("lsq", {"weight_steps": "channel", "weight_bits": 8}), ("8bit-rangebn", {}), ("8bit-rangebn", {"zero_exact": False}),
    ("8bit-rangebn", {"weight_bits": 12}), ("dorefa", {}), ("dorefa", {"weight_bits": 1, "act_bits": 2}),
    ("ternary", {}), ("ternary", {"scale": "layer"}), ("actgrad", {"norm": "quantized"}),
]  # fmt: skip


def trained(model: str, quant: str, size: int, channels: int = 3, seed: int = 0, **settings: Any) -> nn.Module:
    """A network after two steps, its normalisations as far from 1 and 0 as training ever takes them: some fall, some are flat."""
    net = after_two_steps(model, quant, size, channels, seed=seed, **settings)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None:
            nn.init.uniform_(module.weight, -1, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            module.weight.data[0] = 0
    return net.eval()


def graph_of(net: nn.Module, size: int, channels: int = 3) -> Graph:
    take = Preprocessing(channels, size, size, (0.0,) * channels, (1.0,) * channels)
    return Graph(fold(trace(net)), take, tuple("0123456789"))


@pytest.mark.parametrize(("quant", "settings"), QUANTIZERS, ids=str)
def test_a_packed_file_computes_what_was_trained(quant: str, settings: dict[str, Any]) -> None:
    """In the memory format of training: where nothing is summed in another order, to the last bit."""
    net = trained("lenet5", quant, 28, 1, **settings)
    model = PackedModel.from_bytes(to_bytes(graph_of(net, 28, 1)), packed=False)
    images = torch.randn(32, 1, 28, 28)
    with torch.no_grad():
        expected = net(images)
    if quant == "lsq":  # trained in whole numbers where that is exact, computed in floats here
        assert torch.allclose(model(images), expected, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(model(images), expected)


@pytest.mark.parametrize(
    ("shown", "model", "quant", "size", "channels"),
    [
        ("LeNet-5, xnor", "lenet5", "xnor", 28, 1),
        ("LeNet-5, 8bit-rangebn", "lenet5", "8bit-rangebn", 28, 1),
        ("NIN, xnor", "nin", "xnor", 32, 3),
        ("vgg_small, xnor", "vgg_small", "xnor", 32, 3),
        ("ResNet-20, xnor", "resnet", "xnor", 32, 3),
    ],
)
def test_a_packed_file_is_as_large_as_the_page_says(
    shown: str, model: str, quant: str, size: int, channels: int
) -> None:
    """Training moves no byte of it; those of the large networks are made the same way."""
    page = (Path(__file__).parent.parent / "runner" / "README.md").read_text(encoding="utf-8")
    (row,) = [line.split("|") for line in page.splitlines() if line.startswith(f"| {shown} |")]
    packed = len(to_bytes(graph_of(trained(model, quant, size, channels), size, channels)))
    float32 = int(row[2].replace(",", ""))
    assert row[4].strip().startswith(f"{packed:,} ({float32 / packed:.1f}x")


@pytest.mark.parametrize(
    ("name", "size", "arguments"),
    [
        ("resnet", 16, {}),
        ("resnet", 16, {"block": "bireal", "activation": "prelu", "shortcut": "pool"}),
        ("resnet", 16, {"block": "bireal", "activation": "rprelu"}),
        ("resnet", 16, {"depth": 18, "activation": "hardtanh", "shortcut": "conv"}),
        ("nin", 16, {"batch_norm": True}),
        ("vgg_small", 16, {"activation": "hardtanh"}),
        ("torchvision", 32, {"arch": "mobilenet_v2"}),
        ("torchvision", 64, {"arch": "squeezenet1_1"}),
    ],
)
def test_binary_networks_of_every_family(name: str, size: int, arguments: dict[str, Any]) -> None:
    net = trained(name, "xnor", size, arguments=arguments)
    content = to_bytes(graph_of(net, size))
    images = torch.randn(8, 3, size, size)
    with torch.no_grad():
        expected = net(images)
    assert torch.equal(PackedModel.from_bytes(content, packed=False)(images), expected)
    if kernels.why_not() is None:
        assert torch.allclose(PackedModel.from_bytes(content)(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"input_scale": True}], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_dilated_window_stays_dilated(settings: dict[str, Any], groups: int) -> None:
    net, images = dilated("xnor", 3, groups, **settings), torch.randn(2, 4, 12, 12)
    content = to_bytes(graph_of(net, 12, 4))
    with torch.no_grad():
        assert torch.equal(PackedModel.from_bytes(content, packed=False)(images), net(images))
        assert torch.allclose(PackedModel.from_bytes(content)(images), net(images), rtol=1e-4, atol=1e-4)


def test_folding_leaves_no_scale_between_two_binary_layers() -> None:
    nodes = {node.name: node for node in fold(trace(trained("vgg_small", "xnor", 16)))}
    assert "next_threshold" in nodes["conv3"].tensors
    assert not {"step", "bias"} & nodes["conv3"].tensors.keys()
    assert nodes["conv3"].tensors["next_threshold"].dtype == torch.int16
    assert not {"bn3", "act3", "conv4.norm"} & nodes.keys(), "normalisation and activation are in the threshold"
    assert "threshold" in nodes["conv3"].tensors, "a float threshold behind a max-pool"


@given(at=st.integers(-50, 50), falls=st.booleans(), low=st.integers(-40, -1), high=st.integers(1, 40))
def test_bisection_finds_the_one_change(at: int, falls: bool, low: int, high: int) -> None:
    def negative(x: torch.Tensor) -> torch.Tensor:
        return (x >= at) if falls else (x < at)

    first, flips, always = (t[0].item() for t in change(negative, 1, low, high))
    everywhere = [bool(negative(torch.tensor([x]))) for x in range(low, high + 1)]
    if len(set(everywhere)) == 1:
        assert (always, flips) == (1.0 if everywhere[0] else -1.0, False)
    else:
        assert everywhere.index(not everywhere[0]) == first - low
        assert flips == falls


FAMILIES = [("lenet5", 28, 1), ("resnet18", 32, 3), ("nin", 32, 3), ("vgg_small", 32, 3)]


@pytest.mark.parametrize(("model", "size", "channels"), FAMILIES)
@pytest.mark.parametrize("quant", ["xnor", "lsq", "8bit-rangebn"])
def test_a_file_is_hardly_larger_than_it_must_be(model: str, size: int, channels: int, quant: str) -> None:
    if quant != "xnor" and model != "lenet5" and model != "vgg_small":
        pytest.skip("many normalisations that keep their codes: the two others show the packing of codes")
    torch.manual_seed(0)
    net = build(model, in_channels=channels, num_classes=10, image_size=size)
    quantize_(net, find(quant)(), KEPT if quant == "xnor" else [])
    calibrate_(net, torch.randn(2, channels, size, size))
    assert len(to_bytes(graph_of(net.eval(), size, channels))) <= 1.03 * least_bytes(net)


def least_bytes(net: nn.Module) -> float:
    """Weights at their bits, a scale and a shift an output channel, a threshold a channel of a binary layer's input."""
    total = 0.0
    for module in net.modules():
        if isinstance(module, MATMUL):
            precision = module.precision if isinstance(module, QuantizedLayer) else None
            bits, act = (precision.weight, precision.act) if precision else (FLOAT, FLOAT)
            total += module.weight.numel() * bits / 8 + 8 * module.weight.shape[0]
            total += 4 * module.weight.shape[1] if act == 1 else 0
    return total


class Odd(nn.Module):
    """Two layers without a plain form, and one that has one."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.norm, self.fc = nn.GRUCell(4, 4), nn.LayerNorm(4), nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.special.entr(self.norm(self.rnn(x))))  # type: ignore[no-any-return]


def test_layers_without_a_plain_form_are_listed_by_name() -> None:
    with pytest.raises(BadData) as caught:
        trace(Odd())
    text = str(caught.value)
    assert "3 layers" in text
    assert "rnn: GRUCell has no plain form" in text
    assert "norm: LayerNorm has no plain form" in text
    assert "entr" in text
    assert "fc" not in text


def test_a_value_that_is_read_twice_stays_at_its_places() -> None:
    torch.manual_seed(0)
    net, images = Woven().eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(PackedModel(graph_of(net, 8))(images), net(images))


def test_a_network_that_looks_at_its_input_is_refused() -> None:
    class Looks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(BadData, match="depends on its input"):
        trace(Looks())


# ---- parity ----------------------------------------------------------------------------------------------------------


def near_a_threshold() -> tuple[Graph, torch.Tensor, int]:
    """A network, a batch and a row of it whose answer hangs on the last bit of a convolution that two formats sum differently."""
    for seed in range(50):
        torch.manual_seed(seed)
        first = Node("conv2d", "first", (0,), {}, {"weight": torch.randn(20, 3, 3, 3)})
        second = Node("conv2d", "second", (1,), {}, {"weight": torch.randn(50, 20, 5, 5)})
        images = torch.randn(64, 3, 12, 12)
        mine, theirs = (_after(first, second, images, packed) for packed in (True, False))
        rows = (mine != theirs).nonzero().tolist()
        if rows:
            break
    else:
        pytest.skip("this processor sums both formats alike")
    row, channel, y, x = rows[0]
    threshold = torch.full((50,), -1e6)
    threshold[channel] = max(mine[row, channel, y, x], theirs[row, channel, y, x])
    # All weights are -1: the sum at the pixel is -50, or -48 where this one sign turns. The second logit lies between.
    attrs, planes = coded(torch.ones(50, 50, 1, 1, dtype=torch.bool), 1)
    binary = Node("sign_conv2d", "binary", (2,), attrs, planes | {"threshold": threshold})
    weight = torch.zeros(2, mine[0].numel())
    weight[0, y * mine.shape[3] + x] = 1.0
    head = Node("linear", "head", (4,), {}, {"weight": weight, "bias": torch.tensor([0.0, -49.0])})
    take = Preprocessing(3, 12, 12, (0.0,) * 3, (1.0,) * 3)
    return Graph((first, second, binary, Node("flatten", "flat", (3,)), head), take, ("a", "b")), images, row


def _after(first: Node, second: Node, images: torch.Tensor, packed: bool) -> torch.Tensor:
    from quant.inference.ops import OPS

    y = OPS["conv2d"].make(first, packed)(images)
    return OPS["conv2d"].make(second, packed)(y).contiguous()


class Given:
    """A source of one batch."""

    skipped = 0

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def steps(self, batch_size: int, world: int = 1) -> int:
        return 1

    def batches(self, **_: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield self.images, self.labels


@pytest.mark.skipif(kernels.why_not() is not None, reason="the packed kernels cannot run here")
def test_a_difference_is_explained_by_the_rounding_that_makes_it() -> None:
    graph, images, row = near_a_threshold()
    packed, twin = PackedModel(graph), PackedModel(graph, packed=False)
    source = Given(images, torch.zeros(len(images), dtype=torch.int64))
    parity = compare(twin, packed, source, {"batch_size": len(images)})
    assert row in [found["image"] for found in parity.different]
    assert parity.unexplained == 0
    why = next(found["because"] for found in parity.different if found["image"] == row)
    assert "(conv2d) differs by" in why
    assert "units in the last place" in why
    assert "signs in front of binary turn" in why
    assert not parity.faults(Bound(agreement=100))


@pytest.mark.skipif(kernels.why_not() is not None, reason="the packed kernels cannot run here")
def test_a_difference_that_is_no_rounding_is_not_explained() -> None:
    graph, images, row = near_a_threshold()
    wrong = replace(graph.nodes[0], tensors={"weight": graph.nodes[0].tensors["weight"] * 1.001})
    twin = PackedModel(replace(graph, nodes=(wrong, *graph.nodes[1:])), packed=False)
    assert explained(PackedModel(graph), twin, images, row) is None
    parity = compare(lambda x: -twin(x), PackedModel(graph), Given(images, torch.zeros(64, dtype=torch.int64)), {})
    assert parity.unexplained == len(parity.different) > 0
    assert "at least 100 % must agree" in parity.faults(Bound(agreement=100))[0]


def test_a_bound_says_what_is_outside_of_it() -> None:
    parity = Parity(images=200, trained_top1=90, exported_top1=88, largest_logit_difference=0.5, unexplained=3)
    assert parity.faults(Bound(agreement=98, top1_delta=2, logit_difference=0.5)) == []
    assert len(parity.faults(Bound(agreement=99, top1_delta=1, logit_difference=0.1))) == 3
    assert Parity(images=1, largest_logit_difference=float("inf")).faults(Bound(0, logit_difference=1e9))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_answers_that_mean_nothing_are_no_agreement(number: float) -> None:
    """The place of NaN is the same in both, and so is the answer."""

    def odd(images: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[0.0, number]]).expand(len(images), 2)

    parity = compare(odd, odd, Given(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64)), {})
    assert parity.faults(Bound(agreement=100)) == ["3 of 3 answers hold logits that are not finite"]


def diverged(quant: str, **settings: Any) -> nn.Module:
    net = trained("lenet5", quant, 28, 1, **settings)
    for tensor in (*net.parameters(), *net.buffers()):
        if tensor.is_floating_point():
            tensor.data.fill_(float("nan"))
    return net


@pytest.mark.parametrize(("quant", "settings"), QUANTIZERS, ids=str)
def test_a_network_that_diverged_is_refused_layer_by_layer(quant: str, settings: dict[str, Any]) -> None:
    with pytest.raises(BadData, match=r"conv2(\.input)?: not all numbers of its .* are finite"):
        trace(diverged(quant, **settings))


def test_a_number_that_no_packed_file_holds_is_refused_by_name() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 10), nn.Hardtanh(0, float("inf")))
    with pytest.raises(BadPackedFile, match=r"2 \(clamp\): high is inf"):
        to_bytes(graph_of(net, 2, 1))


# ---- the command line ------------------------------------------------------------------------------------------------

SMALL = ["trainer.progress=none", "trainer.dashboard=none", "trainer.threads=1", "epochs=2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A finished run of each kind, on the digits."""
    import signal

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    outputs = f"outputs={tmp_path_factory.mktemp('outputs')}"
    yield {
        quant: train(config_from([*SMALL, outputs, "model=lenet5", f"quant={quant}", f"seed={seed}"]))
        for seed, quant in enumerate(("xnor", "8bit-rangebn"))
    }
    for number, handler in before.items():
        signal.signal(number, handler)


def certificate(path: Path) -> dict[str, Any]:
    return json.loads(path.with_name(f"{path.name}.parity.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("quant", ["xnor", "8bit-rangebn"])
def test_every_format_comes_with_its_certificate(quant: str, runs: dict[str, Path], tmp_path: Path) -> None:
    for wanted in ("packed", "safetensors", "onnx"):
        if wanted == "onnx":
            pytest.importorskip("onnxruntime")
        out = tmp_path / f"net.{wanted}"
        assert run(["export", f"checkpoint={runs[quant]}", f"format={wanted}", f"out={out}"]) == 0
        said = certificate(out)
        assert said["images"] == 288
        assert said["trained_top1"] == json.loads((runs[quant] / "summary.json").read_text())["best_val_top1"]
        assert said["equal_top1"] >= said["bound"]["agreement"]
        assert said["bytes"] == out.stat().st_size
        if wanted == "packed" and quant == "xnor":
            assert said["equal_top1"] == 100 or all(
                "units in the last place" in d["because"] for d in said["different"]
            )
        if wanted == "safetensors":
            assert said["largest_logit_difference"] == 0
            assert read_weights(out).config["quant"]["name"] == quant
    assert {path.name for path in tmp_path.iterdir() if ".tmp" in path.name} == set()


def test_a_packed_file_is_evaluated_as_its_run_was(runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "net.packed.safetensors"
    assert run(["export", f"checkpoint={runs['xnor']}", "format=packed", f"out={out}"]) == 0
    summary = json.loads((runs["xnor"] / "summary.json").read_text())
    for words in (["evaluate"], ["mode=evaluate"]):
        assert run([*words, f"checkpoint={out}", "trainer.progress=none"]) == 0
        found = json.loads((tmp_path / f"{out.name}.evaluation.json").read_text())
        assert found["test_top1"] == summary["test_top1"]
        assert found["val_top1"] == summary["best_val_top1"]
    assert run(["evaluate", f"checkpoint={out}", "dataset.test_fraction=0.5", "trainer.progress=none"]) == 0
    other = json.loads((tmp_path / f"{out.name}.evaluation.json").read_text())
    assert other["test_loss"] != found["test_loss"]
    assert run(["evaluate", f"checkpoint={out}", "dataset=synthetic", "dataset.channels=1", "dataset.classes=4"]) == 65


@pytest.mark.parametrize("size", ["abc", [3], 0, -3, 1.5, 1 << 40])
def test_a_packed_file_with_an_odd_batch_size_is_refused(
    size: Any, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "net"
    assert run(["export", f"checkpoint={runs['xnor']}", "format=packed", f"out={out}"]) == 0
    out.write_bytes(resealed(out.read_bytes(), set_in("graph/about/batch_size", size)))
    words = ["evaluate", f"checkpoint={out}", "trainer.progress=none"]
    assert run(words) == 65
    assert f"{out}: about.batch_size is {size!r}, accepted: a whole number" in capsys.readouterr().err
    assert run([*words, "batch_size=64"]) == 0


def test_what_fails_its_bound_is_not_written(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    words = [f"checkpoint={runs['xnor']}", "format=onnx", "difference=0", f"out={tmp_path / 'net.onnx'}"]
    assert run(["export", *words]) == 65
    assert "nothing is written: on the 288 validation images logits differ by up to" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wanted", ["packed", "onnx", "safetensors"])
def test_what_diverged_is_not_written(
    wanted: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if wanted == "onnx":
        pytest.importorskip("onnxruntime")
    weights = read_weights(runs["xnor"])
    odd = {name: torch.full_like(t, float("nan")) if name == "fc2.bias" else t for name, t in weights.tensors.items()}
    assert "fc2.bias" in odd
    save_weights(tmp_path / "odd.safetensors", odd, weights.config)
    out = tmp_path / "net"
    assert run(["export", f"checkpoint={tmp_path / 'odd.safetensors'}", f"format={wanted}", f"out={out}"]) == 65
    error = capsys.readouterr().err
    assert "finite" in error
    assert "Traceback" not in error
    assert {path.name for path in tmp_path.iterdir()} == {"odd.safetensors"}


def test_a_size_that_no_packed_file_holds_ends_with_65(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("quant.inference.attributes.LARGEST_SIDE", 1)
    assert run(["export", f"checkpoint={runs['xnor']}", "format=packed", f"out={tmp_path / 'net'}"]) == 65
    assert "cannot be exported as a packed file: pool1 (max_pool2d): kernel is [2, 2]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_leaves_nothing(runs: dict[str, Path], small_disk: Path) -> None:
    (small_disk / "filling").write_bytes(bytes(200 << 10))
    before = set(small_disk.iterdir())
    assert run(["export", f"checkpoint={runs['xnor']}", "format=packed", f"out={small_disk / 'net'}"]) == 74
    assert set(small_disk.iterdir()) == before


@pytest.mark.parametrize("in_the_way", [False, True], ids=["a quota", "a folder of that name"])
def test_an_export_that_cannot_be_written_leaves_the_one_before(in_the_way: bool, tmp_path: Path) -> None:
    target = tmp_path / "net"
    write(Made(b"before", Parity(), {"says": "before"}, ()), target)
    if in_the_way:
        target.unlink()
        target.mkdir()
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with largest_file(1 << 12), pytest.raises(StorageError, match=f"{target}: could not write"):
        write(Made(bytes(1 if in_the_way else 1 << 16), Parity(), {"says": "after"}, ()), target)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_format_whose_packages_are_missing_says_what_to_install(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "runner.export.onnx", raising=False)
    assert run(["export", f"checkpoint={runs['xnor']}", "format=onnx"]) == 78
    assert "pip install -e '.[onnx]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["checkpoint={run}"], 78, "format: say which; accepted: packed, onnx, safetensors"),
        (["checkpoint={run}", "format=packd"], 78, "Did you mean 'packed'?"),
        (["format=packed"], 78, "config has a fault:\n  checkpoint: say which stored model: checkpoint=PATH"),
        (
            ["{run}", "format=packed"],
            78,
            "config has a fault:\n  cannot read '{run}': it is a path; did you mean checkpoint={run}?",
        ),
        (["checkpoint={run}", "format=packed", "agrement=99"], 78, "agrement: unknown key. Did you mean 'agreement'?"),
        (["checkpoint=/nowhere", "format=packed"], 66, "/nowhere: no such file or folder"),
        (["checkpoint={run}", "format=packed", "out=/nowhere/net"], 78, "/nowhere: no such folder"),
        (["checkpoint={run}", "format=packed", "agreement=101"], 78, "'101' is not percent of equal answers"),
        (["checkpoint={run}", "format=packed", "difference=little"], 78, "'little' is not a difference of logits"),
        (["checkpoint={run}", "format=packed", "dataset.evil=1"], 78, "dataset.evil"),
    ],
)
def test_bad_words(
    words: list[str], code: int, says: str, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", *[word.format(run=runs["xnor"]) for word in words]]) == code
    error = capsys.readouterr().err
    assert says.format(run=runs["xnor"]) in error
    assert "Traceback" not in error


def test_damaged_files_end_with_65(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "net.packed.safetensors"
    assert run(["export", f"checkpoint={runs['xnor']}", "format=packed", f"out={out}"]) == 0
    whole = out.read_bytes()
    damaged = {
        "flipped": whole[:-99] + bytes([whole[-99] ^ 1]) + whole[-98:],
        "half": whole[: len(whole) // 2],
        "other version": whole.replace(b"packed 1", b"packed 9", 1),
    }
    for name, content in damaged.items():
        out.write_bytes(content)
        for words in (["evaluate", f"checkpoint={out}"], ["predict", str(out), __file__]):
            assert run(words) == 65, name
            error = capsys.readouterr().err
            assert str(out) in error
            assert "Traceback" not in error
