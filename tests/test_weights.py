"""Weights for sharing: what is read is what was written, damage and foreign files are told apart, and loading is by name."""

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import nn

from models.base import build as float_model
from runner.build import build
from runner.checkpoint import Checkpoints
from runner.compose import config_from
from runner.faults import BadData, MissingInput
from runner.weights import load_exactly, load_matching, read_weights, save_weights

CONFIG = {"seed": 3, "model": {"name": "lenet5"}, "outputs": "/somewhere", "plugins": []}


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "weight": torch.randn(7, 5), "steps": torch.tensor(4), "empty": torch.zeros(0, 3), "flag": torch.tensor([True, False]),
        "half": torch.randn(3).bfloat16(), "turned": torch.randn(4, 6).t(),
    }  # fmt: skip


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", tensors(), CONFIG)
    found = read_weights(tmp_path / "w.safetensors")
    assert same(found.tensors, tensors())
    assert {key: found.config[key] for key in ("seed", "model")} == {key: CONFIG[key] for key in ("seed", "model")}


def test_the_bytes_do_not_depend_on_where_the_run_lay(tmp_path: Path) -> None:
    save_weights(tmp_path / "a.safetensors", tensors(), CONFIG)
    save_weights(tmp_path / "b.safetensors", dict(reversed(tensors().items())), CONFIG | {"outputs": "/elsewhere"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_no_flipped_bit_and_no_cut_is_accepted(tmp_path: Path) -> None:
    """In the header too: a config with another seed would be evaluated without a word."""
    path, draw = tmp_path / "w.safetensors", random.Random(0)
    save_weights(path, tensors(), CONFIG)
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    for index in range(400):
        changed = bytearray(whole)
        changed[draw.randrange(header if index % 2 else len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            found = read_weights(path)
        except BadData:
            continue
        assert same(found.tensors, tensors()), "a flip may hit the white space that fills up the header, nothing else"
        assert found.config["seed"] == CONFIG["seed"]
    for percent in range(0, 100, 5):
        path.write_bytes(whole[: len(whole) * percent // 100])
        with pytest.raises(BadData, match=r"w\.safetensors"):
            read_weights(path)


def test_files_of_others_are_read_without_a_config(tmp_path: Path) -> None:
    for index, header in enumerate([None, {"format": "pt"}, {"format": "pt", "author": "someone", "license": "MIT"}]):
        (tmp_path / f"{index}.safetensors").write_bytes(save({"weight": torch.ones(2)}, metadata=header))
        found = read_weights(tmp_path / f"{index}.safetensors")
        assert found.config == {}
        assert torch.equal(found.tensors["weight"], torch.ones(2))


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s, "best": 1.0}]
)
def test_state_dicts_of_others_are_read_under_their_usual_keys(tmp_path: Path, wrap: Any) -> None:
    for prefix in ("", "module."):
        torch.save(wrap({f"{prefix}conv.weight": torch.ones(3)}), tmp_path / "x.pth")
        found = read_weights(tmp_path / "x.pth")
        assert list(found.tensors) == ["conv.weight"]


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "x.pt")
    with pytest.raises(BadData, match="holds no tensors by name"):
        read_weights(tmp_path / "x.pt")


def test_a_path_that_holds_nothing_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", tmp_path / "none.safetensors"):
        with pytest.raises(MissingInput, match=str(path)):
            read_weights(path)
    (tmp_path / "metrics.csv").write_text("epoch\n")
    with pytest.raises(BadData, match=r"metrics\.csv"):
        read_weights(tmp_path / "metrics.csv")


def checkpointed(folder: Path, ema: bool = False) -> Path:
    """A run folder with two checkpoints, of steps 1 and 2; the best weights are those of step 1."""
    (folder / "checkpoints").mkdir(parents=True)
    checkpoints = Checkpoints(folder / "checkpoints")
    for step in (1, 2):
        average = {"n_averaged": torch.tensor(1), "module.w": torch.tensor([step + 0.5])} if ema else None
        state = {"model": {"w": torch.tensor([float(step)])}, "ema": average}
        checkpoints.save(step, state, (1, {"w": torch.tensor([10.0])}), {"config": {"seed": step}})
    return folder


def test_every_file_of_a_run_knows_its_config(tmp_path: Path) -> None:
    folder = checkpointed(tmp_path / "run")
    expected = {"": (10.0, 2), "checkpoints/step-2.json": (2.0, 2), "checkpoints/step-2.pt": (2.0, 2),
                "checkpoints/step-1.pt": (1.0, 1), "checkpoints/best-1.pt": (10.0, 2)}  # fmt: skip
    for name, (value, seed) in expected.items():
        found = read_weights(folder / name)
        assert (found.tensors["w"].item(), found.config["seed"]) == (value, seed), name
    save_weights(folder / "weights.safetensors", {"w": torch.tensor([7.0])}, {"seed": 9})
    assert read_weights(folder).tensors["w"].item() == 7.0


def test_a_damaged_file_that_is_named_is_refused(tmp_path: Path) -> None:
    folder = checkpointed(tmp_path / "run") / "checkpoints"
    for name in ("step-2.pt", "best-1.pt"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-500] + bytes(500))
        for path in (folder / name, folder.parent, folder / "step-2.json"):
            with pytest.raises(BadData, match=name.replace(".", r"\.")):
                read_weights(path)
        (folder / name).write_bytes(whole)


def test_an_average_is_what_its_run_evaluates(tmp_path: Path) -> None:
    folder = checkpointed(tmp_path / "run", ema=True)
    assert read_weights(folder / "checkpoints" / "step-2.json").tensors == {"w": torch.tensor([2.5])}


def test_loading_by_name_takes_what_fits_and_says_so() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before = model[1].weight.clone()
    taken = load_matching(model, {"0.weight": torch.ones(2, 3), "0.bias": torch.ones(5), "other": torch.ones(1)})
    assert taken == {"0.weight"}
    assert torch.equal(model[0].weight, torch.ones(2, 3))
    assert torch.equal(model[1].weight, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float) -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(BadData, match="not finite: weight"):
        load_matching(model, {"weight": torch.tensor([[value, 1.0]])})


def test_another_network_is_refused_with_the_first_differences(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    save_weights(tmp_path / "w.safetensors", nn.Linear(3, 2).state_dict(), {})
    with pytest.raises(
        BadData, match=r"belongs to another network; 6 differences.*0\.bias: model \(2,\), file has none"
    ):
        load_exactly(model, read_weights(tmp_path / "w.safetensors"))


def test_float_weights_start_a_binary_network_by_name_and_nothing_is_left_out_silently(tmp_path: Path) -> None:
    torch.manual_seed(5)
    shape = {"in_channels": 1, "num_classes": 10, "image_size": 28}
    source = float_model("lenet5", **shape)
    content = dict(source.state_dict()) | {"from_elsewhere": torch.ones(2)}
    content["fc2.weight"] = torch.ones(10, 3)  # of another shape
    torch.save({"state_dict": content}, tmp_path / "float.pt")
    config = config_from(["quant=xnor", f"pretrained={tmp_path}/float.pt"])
    built = build(config, **shape)
    own = built.model.state_dict()
    for name in ("conv1.weight", "conv1.bias", "conv2.weight", "fc1.weight"):
        assert torch.equal(own[name], source.state_dict()[name]), name
    assert type(built.model.get_submodule("conv2")).__name__ == "BinaryConv2d"
    (loaded, kept, misshapen, unused) = built.remarks
    assert loaded == "pretrained: 10 tensors loaded by name"
    assert "not in the file, kept as initialised: " in kept
    assert "conv2.norm.running_mean" in kept
    assert "fc2.weight" not in kept
    assert misshapen == "pretrained: in the file with another shape, kept as initialised: fc2.weight"
    assert unused == "pretrained: in the file, not used: from_elsewhere"


def test_weights_of_which_none_fits_are_refused(tmp_path: Path) -> None:
    torch.save({"other.weight": torch.ones(2)}, tmp_path / "x.pt")
    with pytest.raises(BadData, match="none of its 1 tensors fits the network by name and shape"):
        build(config_from([f"pretrained={tmp_path}/x.pt"]), in_channels=1, num_classes=10, image_size=28)


def test_the_header_is_json_that_others_can_read(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", tensors(), CONFIG)
    content = io.BytesIO((tmp_path / "w.safetensors").read_bytes())
    header = json.loads(content.read(8 + int.from_bytes(content.getvalue()[:8], "little"))[8:])
    (said,) = header["__metadata__"].values()
    assert json.loads(json.loads(said)["config"])["seed"] == 3
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o444 == 0o444
