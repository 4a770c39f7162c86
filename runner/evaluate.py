"""Figures of a stored model. Its config is stored with it; words on the command line change what they name."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quant.inference import BadPackedFile, PackedModel, looks_packed
from quant.inference.attributes import whole
from runner.build import build, phases_of
from runner.compose import keys_of
from runner.config import check, flat
from runner.data.load import Data, load
from runner.environment import environment, pick_device, prepare
from runner.faults import BadData, ConfigError, Fault, MissingInput, shortened
from runner.files import write_json
from runner.regime import data_setting_at, epochs_begun, first_steps
from runner.schema import DatasetConfig, RunConfig
from runner.screen import Screen
from runner.train import evaluate
from runner.weights import Weights, load_exactly, read_weights

PLAIN = {"amp": "none", "compile": False, "recompute": "none", "backward": "exact"}  # what only training asks for
KEPT_HERE = ("cache", "download")  # keys of a data set that a stored config has no say in
SPLIT = ("test_fraction", "test_seed", "validation", "val_fraction", "split_seed")  # which images are trained on
SCALE = ("mean", "std")  # belong to the weights, whatever images they are tried on


@dataclass(frozen=True)
class Stored:
    """A trained network as its run left it, and the data that its config names."""

    config: RunConfig
    model: nn.Module
    data: Data
    weights: Weights
    sizes: dict[str, int]  # batch and input size


def load_stored(raw: Mapping[str, Any], said: Sequence[str]) -> Stored:
    """Read, check and build what `checkpoint` names.

    `raw` is what the command line composes, `said` the keys that it names: these change the stored config.
    """
    weights = read_weights(Path(str(raw["checkpoint"])))
    config = check(_with_stored(raw, weights, said))
    device = pick_device(config.trainer.device)
    prepare(config.seed, config.trainer.threads, device)
    data = _load_fitting(config.dataset, device, weights.source, said)
    built = build(
        config.model_copy(update={"pretrained": None}),
        in_channels=data.in_channels,
        num_classes=len(data.classes),
        image_size=data.image_size,
    )
    load_exactly(built.model, weights)
    model = built.model.to(device).eval()
    return Stored(config, model, data, weights, _sizes(config, model, data))


def _load_fitting(config: DatasetConfig, device: torch.device, source: Path, said: Sequence[str]) -> Data:
    """The data set. Raises BadData where its images have other channels than the stored mean and deviation are of."""
    try:
        return load(config, device=device)
    except ConfigError as error:
        scale = {f"dataset.{key}" for key in SCALE}
        if scale & set(said) or not scale & {fault.path for fault in error.faults}:
            raise
        count = len(config.mean or ())
        raise BadData(f"{source}: made for {count} channels, which the images of {config.name} do not have") from error


def evaluate_stored(raw: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Measure validation and test set; print the figures, save them beside the weights, and return them.

    `words`: the command line that composes to `raw`.
    """
    path = Path(str(raw["checkpoint"]))
    if path.is_file() and looks_packed(path):
        return _evaluate_packed(path, raw, words)
    stored = load_stored(raw, keys_of(words))
    source = stored.weights.source
    target = (source if source.is_dir() else source.parent) / "evaluation.json"
    screen = Screen(stored.config.trainer.progress)
    _warn_of_trained_images(stored.weights.config.get("dataset"), stored.config, screen)
    facts = {"weights": str(source), "words": _changes(words)}
    return _measured(stored.model, stored.data, stored.sizes, facts, stored.config, target, screen)


def _changes(words: Sequence[str]) -> list[str]:
    """The words that may change a figure: without those that only say what to measure."""
    return [word for word, key in zip(words, keys_of(words), strict=True) if key not in ("mode", "checkpoint")]


def _warn_of_trained_images(stored: Any, config: RunConfig, screen: Screen) -> None:
    """Where the images of the run are split otherwise than in training: `stored` is what the file says of its data set."""
    now = flat(config)["dataset"]
    if not isinstance(stored, dict) or any(stored.get(key) != now.get(key) for key in ("name", "root")):
        return
    other = [f"dataset.{key}" for key in SPLIT if key in stored and stored[key] != now.get(key)]
    if other:
        what = "images that the network was trained on may be among those measured"
        screen.say(f"warning: {', '.join(other)}: not as in training; {what}")


def _evaluate_packed(path: Path, raw: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """The same of a packed network, with the preprocessing and the data set that its file names; on the CPU."""
    model, said = read_packed(path), keys_of(words)
    config = check(_with_data_of(model, raw, said))
    device, screen = torch.device("cpu"), Screen(config.trainer.progress)
    prepare(config.seed, config.trainer.threads, device)
    data = load(config.dataset, device=device)
    take = model.preprocessing
    if data.in_channels != take.channels or len(data.classes) != len(model.classes):
        given = f"{data.in_channels} channels and {len(data.classes)} classes"
        raise BadData(
            f"{path}: made for {take.channels} channels and {len(model.classes)} classes, the data set has {given}"
        )
    said_size = raw["batch_size"] if "batch_size" in said else None
    sizes = {"batch_size": said_size or _batch_size_of(model, path), "input_size": take.size}
    screen.say(f"packed network: {model.nbytes:,} bytes of tensors, kernel {model.kernel}" + why_float(model))
    _warn_of_trained_images(model.about.get("dataset"), config, screen)
    facts, target = {"weights": str(path), "words": _changes(words)}, path.with_name(f"{path.name}.evaluation.json")
    return _measured(Wrapped(model), data, sizes, facts, config, target, screen)


def _batch_size_of(model: PackedModel, path: Path) -> int:
    """That of its run, as its file says. Raises BadData where that is no batch size."""
    size = model.about.get("batch_size", 128)
    wanted = whole(1)(size)
    if wanted is not None:
        raise BadData(f"{path}: about.batch_size is {shortened(size)}, accepted: {wanted}")
    return int(size)


def why_float(model: PackedModel) -> str:
    """Why no packed kernels are used, in brackets; nothing where they are."""
    return f" ({model.why_float})" if model.why_float else ""


def read_packed(path: Path) -> PackedModel:
    """Load a packed network. Raises MissingInput, or BadData for whatever is wrong with it."""
    if not path.is_file():
        raise MissingInput(f"{path}: no such file; give a packed network (export … format=packed writes one)")
    try:
        return PackedModel.load(path)
    except BadPackedFile as error:
        raise BadData(str(error)) from error


class Wrapped(nn.Module):
    """A function of images as a module, to be measured like any other network."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


def _with_data_of(model: PackedModel, raw: Mapping[str, Any], said: Sequence[str]) -> dict[str, Any]:
    """The config of the command line with the data set of a packed file, changed by what was said of it.

    The file says which images; how they are read, whether they may be downloaded and where copies are kept stays as it is here.
    """
    merged: dict[str, Any] = copy.deepcopy(dict(raw))
    stored = model.about.get("dataset")
    if isinstance(stored, dict) and "dataset" not in said and isinstance(raw["dataset"], dict):
        here = {key: raw["dataset"][key] for key in DatasetConfig.model_fields.keys() & raw["dataset"].keys()}
        given = {key: value for key, value in stored.items() if key not in KEPT_HERE}
        merged["dataset"] = copy.deepcopy(here | given)
        _overlay(raw, merged, [key for key in said if key.startswith("dataset.")])
    if isinstance(merged["dataset"], dict):
        merged["dataset"] |= {"mean": list(model.preprocessing.mean), "std": list(model.preprocessing.std)}
    return merged


def _measured(
    model: nn.Module,
    data: Data,
    sizes: dict[str, int],
    facts: dict[str, Any],
    config: RunConfig,
    target: Path,
    screen: Screen,
) -> dict[str, Any]:
    """The figures, said and saved with the facts that tell them from others."""
    val, test = evaluate(model, data.val, sizes), evaluate(model, data.test, sizes)
    figures = {
        **facts,
        "dataset": config.dataset.name,
        **{f"val_{k}": v for k, v in vars(val).items()},
        **{f"test_{k}": v for k, v in vars(test).items()},
        "environment": environment(pick_device(config.trainer.device), plugins=config.plugins),
    }
    screen.say(f"validation: loss {val.loss:.4f}, top1 {val.top1:.2f} %, top5 {val.top5:.2f} %")
    screen.say(f"test: loss {test.loss:.4f}, top1 {test.top1:.2f} %, top5 {test.top5:.2f} %")
    write_json(target, figures)
    screen.say(f"saved: {target.resolve()}")
    return figures


def _sizes(config: RunConfig, model: nn.Module, data: Data) -> dict[str, int]:
    """Batch and input size of the last epoch: those of the run's own test, so that the figures agree to the last digit."""
    phases = phases_of(config, model)[1]
    begun = epochs_begun(first_steps(config, phases, len(data.train)), config.trainer.max_steps)
    epochs = begun or config.total_epochs  # none, where fewer images than a batch are left of those trained on
    setting = data_setting_at(phases, epochs - 1)
    return {
        "batch_size": setting["batch_size"],
        "input_size": setting["input_size"] or data.image_size,
    }


def _with_stored(raw: Mapping[str, Any], weights: Weights, said: Sequence[str]) -> dict[str, Any]:
    """The stored config, with what was said on the command line on top; the command line alone for a foreign file.

    A file may come from anybody: whether data may be downloaded and where copies are kept stays as it is here.
    """
    if not weights.config:
        return dict(raw)
    merged: dict[str, Any] = copy.deepcopy(weights.config)
    if merged.get("plugins") and "plugins" not in said:
        message = f"the stored model needs {merged['plugins']}; a plugin is code, so say plugins= to have it run"
        raise ConfigError([Fault("plugins", message)])
    stored = merged["trainer"]  # keys that came later have no say in what is stored
    merged["trainer"] = {**raw["trainer"], **stored, **PLAIN}
    here = {"cache": None, "download": False} | (raw["dataset"] if isinstance(raw["dataset"], dict) else {})
    merged["dataset"] |= {key: here[key] for key in KEPT_HERE if key in merged["dataset"]}
    _overlay(raw, merged, [*said, "mode", "checkpoint", "trainer.progress"])
    if "dataset" in said and isinstance(merged["dataset"], dict):
        kept = [key for key in SCALE if not any(word.startswith(f"dataset.{key}") for word in said)]
        merged["dataset"] |= {key: weights.config["dataset"][key] for key in kept}
    return merged


def _overlay(raw: Mapping[str, Any], merged: dict[str, Any], keys: Sequence[str]) -> None:
    """Lay what the command line says at some places over a stored config."""
    for key in keys:
        try:
            _copy(raw, merged, key.split("."))
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                [Fault(key, "changes nothing of a stored model: its config has no such place")]
            ) from error


def _copy(source: Any, target: Any, path: list[str]) -> None:
    """Copy what lies at `path`, or the smallest part around it that both have."""
    index: Any = int(path[0]) if isinstance(source, list) else path[0]
    below = source[index]
    if len(path) > 1 and isinstance(below, dict | list) and type(target[index]) is type(below):
        _copy(below, target[index], path[1:])
    else:
        target[index] = below
