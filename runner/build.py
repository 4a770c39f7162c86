"""The only place where a config becomes objects: model, fixed classifier, pretrained weights, quantizer, device."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import nn

from models.base import build as build_float_model
from quant.base import QuantizedLayer, find
from quant.classifier import find as find_classifier
from quant.recompute import recompute_
from quant.regularizer import Penalty, Regularizer
from quant.regularizer import find as find_regularizer
from quant.surgery import LayerRow, Rule, multiplies, quantize_, quantized_layers
from runner.config import with_batch_size, with_peak
from runner.faults import BadData, ConfigError, Fault, refuse
from runner.relations import data_phase_faults, phase_faults
from runner.schema import DataPhase, Phase, QuantConfig, RunConfig
from runner.weights import Match, load_matching, read_weights

P = TypeVar("P", Phase, DataPhase)


@dataclass
class Built:
    """A network ready to train, and what is to be said about it."""

    model: nn.Module
    rows: list[LayerRow]
    remarks: list[str] = field(default_factory=list)
    calibrated: list[str] = field(default_factory=list)
    """Layers whose steps and ranges came with the pretrained weights."""


def build(config: RunConfig, *, in_channels: int, num_classes: int, image_size: int) -> Built:
    """Model → classifier → pretrained → quantizer. Raises ConfigError for what a component refuses."""
    for plugin in config.plugins:
        importlib.import_module(plugin)
    torch.manual_seed(config.seed)
    shape = {"in_channels": in_channels, "num_classes": num_classes, "image_size": image_size}
    model = asking("model", build_float_model, config.model.name, **shape, **config.model.arguments)
    asking("classifier", lambda: find_classifier(config.classifier.name)(**config.classifier.arguments).apply_(model))
    weights = read_weights(Path(config.pretrained)) if config.pretrained else None
    loaded = load_matching(model, weights.tensors) if weights else set()
    rows = asking("quant", quantize_, model, quantizer_of(config.quant), rules_of(config.quant))
    remarks, calibrated = _trained_otherwise_(model, config), []
    if weights:
        loaded |= load_matching(model, weights.tensors)
        if not loaded:
            count = len(weights.tensors)
            raise BadData(f"{config.pretrained}: none of its {count} tensors fits the network by name and shape")
        remarks += Match.of(loaded, model.state_dict(), weights.tensors).lines()
        calibrated = [name for name, layer in quantized_layers(model).items() if _has_come_whole(name, layer, loaded)]
        if calibrated:
            remarks.append(f"pretrained: steps and ranges of {len(calibrated)} layers are those of the file")
    return Built(model, rows, remarks, calibrated)


def _has_come_whole(name: str, layer: QuantizedLayer, loaded: set[str]) -> bool:
    """Whether a layer that sets steps or ranges has been handed all its tensors, and they are of its own number of bits."""
    sets = type(layer).calibrate_ is not QuantizedLayer.calibrate_
    own = layer.state_dict().keys() if sets and isinstance(layer, nn.Module) else ()
    return bool(own) and all(f"{name}.{key}" in loaded for key in own) and layer.has_fitting_levels()


def _trained_otherwise_(model: nn.Module, config: RunConfig) -> list[str]:
    """Set what `trainer.backward` and `trainer.recompute` ask for; what is to be said about it."""
    remarks, trainer = [], config.trainer
    if trainer.backward == "bf16":
        layers = [layer for layer in quantized_layers(model).values() if multiplies(layer)]
        done = [layer for layer in layers if layer.backward_in_bf16_()]
        if not done:
            why = f"{config.quant.name} has no layer whose operands bfloat16 holds exactly; accepted: exact"
            raise ConfigError([Fault("trainer.backward", why)])
        remarks.append(f"gradients rounded to bfloat16 in front of {len(done)} of {len(layers)} quantized products")
    if trainer.recompute != "none":
        parts = asking("trainer", recompute_, model, trainer.recompute)
        remarks.append(f"computed again in backward: {', '.join(parts)}")
    return remarks


def quantizer_of(config: QuantConfig) -> Any:
    """The quantizer with its settings."""
    return asking("quant", lambda: find(config.name)(**config.arguments))


def regularizer_of(config: RunConfig) -> Regularizer:
    """The regularizer with its settings."""
    found: Regularizer = asking(
        "regularizer", lambda: find_regularizer(config.regularizer.name)(**config.regularizer.arguments)
    )
    return found


def watch(regularizer: Regularizer, model: nn.Module) -> Penalty:
    """Attach a regularizer; a model without anything to watch is a fault of the config."""
    penalty: Penalty = asking("regularizer", regularizer.attach, model)
    return penalty


def rules_of(config: QuantConfig) -> list[Rule]:
    """The rules as surgery reads them."""
    return [
        Rule(match=r.patterns, keep=r.keep, optional=r.optional, why=r.why, settings=r.settings) for r in config.rules
    ]


def phases_of(config: RunConfig, model: nn.Module) -> tuple[Sequence[Phase], Sequence[DataPhase]]:
    """The regimes: the config's, or the model's own where the config leaves them to it."""
    phases, data = config.regime.phases, config.data_regime.phases
    if phases is None:
        phases = _own(model, "regime", Phase, config.total_epochs)
        refuse(phase_faults("regime of the model", phases))
        phases = with_peak(phases, config.lr) if config.lr else phases
    if data is None:
        data = _own(model, "data_regime", DataPhase, config.total_epochs)
        refuse(data_phase_faults("data_regime of the model", data))
        data = with_batch_size(data, config.batch_size) if config.batch_size else data
    _refuse_idle_schedules(phases, model, config.quant.name)
    return phases, data


def _refuse_idle_schedules(phases: Sequence[Phase], model: nn.Module, quantizer: str) -> None:
    """A schedule that would reach no buffer: the method takes such a value, but not with these settings."""
    buffers = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    faults = [
        Fault(
            f"regime.phases.{index}.quant.{key}",
            f"no layer of {quantizer} has a {key} to drive with these settings",
        )
        for index, phase in enumerate(phases)
        for key in (phase.quant or {}).keys() - buffers
    ]
    refuse(faults)


def _own(model: nn.Module, name: str, phase: type[P], epochs: int) -> list[P]:
    """The model's own phases: a list, or a function of the epoch, asked for each."""
    found = getattr(model, name, None)
    if found is None:
        kind = type(model).__name__
        raise ConfigError([Fault(name, f"{name}=model, but {kind} carries no attribute `{name}`; choose another")])
    raw = [{"epoch": epoch} | found(epoch) for epoch in range(epochs)] if callable(found) else found
    try:
        return [phase.model_validate(p) for p in raw]
    except ValidationError as error:
        raise ConfigError([Fault(f"{name} of the model", str(error))]) from error


def asking(section: str, make: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a component; what it refuses is a fault of the config."""
    try:
        return make(*args, **kwargs)
    except ValueError as error:
        raise ConfigError([Fault(section, str(error))]) from error
