"""Memory of a network's weights (arXiv 1603.05279, Fig. 4 a): as float64 and float32, packed as computed and as a file."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant.inference.file import to_bytes
from quant.inference.graph import Graph, Preprocessing
from quant.surgery import calibrate_
from runner.build import build
from runner.compose import choices_of, config_from
from runner.cost import cost_of
from runner.export.fold import fold
from runner.export.trace import trace
from runner.faults import RunnerError

GREY = {"lenet5"}  # for images of one channel and 28 x 28 pixels; the others: three and 32 x 32


@dataclass(frozen=True)
class Footprint:
    """Bytes. The paper compares with float64 (double)."""

    name: str
    double: int
    float32: int
    packed: int
    on_disk: int | None

    @property
    def over_float(self) -> float:
        return self.float32 / self.packed

    @property
    def over_double(self) -> float:
        return self.double / self.packed


def footprint(name: str, model: nn.Module, images: Tensor, on_disk: int | None) -> Footprint:
    """Of one network; `images` is a batch of one."""
    cost = cost_of(model, images)
    return Footprint(name, 2 * cost.float_bytes, cost.float_bytes, cost.packed_bytes, on_disk)


def shipped(config_dirs: Sequence[str]) -> list[Footprint]:
    """Every network of conf/model with quant=xnor as it ships; without those that xnor's rules do not fit."""
    found = []
    for name in choices_of()["model"]:
        channels, size = (1, 28) if name in GREY else (3, 32)
        images = torch.randn(4, channels, size, size)
        try:
            config = config_from([f"model={name}", "quant=xnor", "dataset=synthetic"], config_dirs)
            model = build(config, in_channels=channels, num_classes=10, image_size=size).model
            calibrate_(model, images)
            take = Preprocessing(channels, size, size, (0.0,) * channels, (1.0,) * channels)
            graph = Graph(fold(trace(model)), take, tuple(map(str, range(10))), {})
        except RunnerError:
            continue
        found.append(footprint(f"{name}, xnor", model, images[:1], len(to_bytes(graph))))
    return found
