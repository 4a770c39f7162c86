"""A trained network as a packed file for `quant.inference`."""

from torch import nn

from quant.inference.file import to_bytes
from quant.inference.graph import Graph, Preprocessing
from runner.data.load import Data
from runner.data.sources import MemorySource, Source, StreamSource
from runner.evaluate import Stored
from runner.export.fold import fold
from runner.export.trace import trace

WHICH_IMAGES = (  # of the keys that all data sets have: those that decide which images are measured, and what of them is seen
    "name", "input_size", "validation", "val_fraction", "split_seed", "memory", "augment",
)  # fmt: skip


def packed_bytes(stored: Stored) -> bytes:
    """The content of the file."""
    config, data = stored.config, stored.data
    dataset = config.dataset.model_dump(include=set(WHICH_IMAGES)) | config.dataset.arguments
    about = {
        "model": config.model.name,
        "quant": config.quant.name,
        "batch_size": stored.sizes["batch_size"],
        "dataset": {key: value for key, value in dataset.items() if key != "download"},
    }
    return to_bytes(graph_of(stored.model, data, stored.sizes["input_size"], about))


def graph_of(model: nn.Module, data: Data, size: int, about: dict[str, object]) -> Graph:
    """The folded graph of a trained network, and how its images are made."""
    pixels, crop = _square(data.val, size)
    take = Preprocessing(data.in_channels, size, pixels, data.mean, data.std, crop)
    return Graph(fold(trace(model)), take, data.classes, about)


def _square(source: Source, size: int) -> tuple[int, float]:
    """`pixels` and `crop` of the images that a source measures on, fed at that size."""
    if isinstance(source, StreamSource):
        return source.content.decode_size or size, source.test_crop
    assert isinstance(source, MemorySource)
    return source.content.pixels.shape[2], 1.0
