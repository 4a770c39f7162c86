"""The measuring of `bench model`: the same network as floats and packed, in turns, then layer by layer."""

import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quant.inference import PackedModel
from quant.inference.file import to_bytes
from quant.surgery import calibrate_
from runner.bench.footprint import Footprint, footprint, shipped
from runner.bench.model import Plan
from runner.bench.timing import Spread, ratio, take_turns
from runner.build import build
from runner.compose import compose_words, config_from, keys_of
from runner.data.load import Data, load
from runner.environment import environment
from runner.evaluate import load_stored
from runner.export.packed import graph_of
from runner.schema import RunConfig

TURN = 0.02  # seconds
WALKS = 30  # through all layers


@dataclass(frozen=True)
class Race:
    """One batch size: milliseconds of a forward pass, and what packed is faster by."""

    batch: int
    float_ms: float
    channels_last_ms: float
    imitated_ms: float
    packed_ms: float
    speedup: Spread
    over_best: Spread

    @property
    def packed_images_per_s(self) -> float:
        return 1e3 * self.batch / self.packed_ms


@dataclass(frozen=True)
class LayerTime:
    """One operation of the packed network at batch 1, and the layer of the same name as floats."""

    name: str
    kind: str
    packed_us: float
    float_us: float | None


@dataclass(frozen=True)
class Result:
    """All that was measured."""

    config: RunConfig
    races: list[Race]
    layers: list[LayerTime]
    float_only_us: float  # layers of the float network that have no counterpart: they are folded into others
    largest_difference: float
    memory: list[Footprint]
    facts: dict[str, Any]


def measure(plan: Plan) -> Result:
    """Build the network three times, see that all give the same, and let them run."""
    config, model, data = _trained(plan)
    torch.set_num_threads(plan.threads)
    size = data.image_size
    shape = {"in_channels": data.in_channels, "num_classes": len(data.classes), "image_size": size}
    none = config_from(["quant=none"], plan.config_dirs).quant
    plain = build(config.model_copy(update={"quant": none, "pretrained": None}), **shape).model.eval()
    content = to_bytes(graph_of(model, data, size, {"model": config.model.name, "quant": config.quant.name}))
    packed = PackedModel.from_bytes(content)
    images = torch.randn(max(plan.batches), data.in_channels, size, size)
    with torch.inference_mode():
        difference = float((packed(images[:4]) - model(images[:4])).abs().max())
        races = [_race(plain, model, packed, images[:batch], plan.turns) for batch in plan.batches]
        layers, rest = _layer_times(plain, packed, images[:1])
        mine = footprint(f"{config.model.name}, {config.quant.name} (this one)", model, images[:1], len(content))
        memory = [mine, *(shipped(plan.config_dirs) if plan.memory else [])]
    facts = environment(torch.device("cpu")) | {"kernel": packed.kernel}
    return Result(config, races, layers, rest, difference, memory, facts)


def _trained(plan: Plan) -> tuple[RunConfig, nn.Module, Data]:
    """The network of a checkpoint, or that of the config with the weights it starts with."""
    config = plan.config
    if config is None:
        raw = compose_words([*plan.words, "mode=evaluate"], plan.config_dirs).raw
        stored = load_stored(raw, keys_of(plan.words))
        return stored.config, stored.model, stored.data
    data = load(config.dataset, device=torch.device("cpu"))
    built = build(config, in_channels=data.in_channels, num_classes=len(data.classes), image_size=data.image_size)
    images = torch.randn(16, data.in_channels, data.image_size, data.image_size)
    calibrate_(built.model, images)
    return config, built.model.eval(), data


def _race(plain: nn.Module, model: nn.Module, packed: PackedModel, images: Tensor, turns: int) -> Race:
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    images_last = images.contiguous(memory_format=torch.channels_last)
    contestants: dict[str, Callable[[], object]] = {
        "float": lambda: plain(images),
        "channels_last": lambda: last(images_last),
        "imitated": lambda: model(images),
        "packed": lambda: packed(images),
    }
    times = take_turns(contestants, turns=turns, warmup=3, shortest=TURN)
    ms = {name: 1e3 * statistics.median(t.wall) for name, t in times.items()}
    best = min(("float", "channels_last"), key=ms.__getitem__)
    speedup, over_best = (ratio(times[base].wall, times["packed"].wall) for base in ("float", best))
    return Race(len(images), ms["float"], ms["channels_last"], ms["imitated"], ms["packed"], speedup, over_best)


def _layer_times(plain: nn.Module, packed: PackedModel, images: Tensor) -> tuple[list[LayerTime], float]:
    """Medians of several walks; the time of float layers that the packed network no longer has."""
    of_ops: dict[int, list[float]] = defaultdict(list)
    of_layers: dict[str, list[float]] = defaultdict(list)
    _clock_layers(plain, of_layers)
    for _ in range(WALKS):
        plain(images)
        values = packed.begin(images)
        for number, op in enumerate(packed.ops):
            start = time.perf_counter()
            op(values)
            of_ops[number].append(time.perf_counter() - start)
    floats = {name: 1e6 * statistics.median(times) for name, times in of_layers.items()}
    rows = [
        LayerTime(op.name, op.kind, 1e6 * statistics.median(of_ops[number]), floats.pop(op.name, None))
        for number, op in enumerate(packed.ops)
    ]
    return rows, sum(floats.values())


def _clock_layers(model: nn.Module, times: dict[str, list[float]]) -> None:
    """From now on, every pass notes how long each layer without layers of its own took."""
    for name, module in model.named_modules():
        if next(module.children(), None) is not None:
            continue
        started = [0.0]

        def before(_: nn.Module, __: object, clock: list[float] = started) -> None:
            clock[0] = time.perf_counter()

        def after(_: nn.Module, __: object, ___: object, name: str = name, clock: list[float] = started) -> None:
            times[name].append(time.perf_counter() - clock[0])

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
