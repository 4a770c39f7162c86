"""`predict FILE IMAGE …`: what a packed network sees in images. Decoded with the limits of a data set, scaled as in training."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runner.faults import BadData, ConfigError, Exit, Fault, MissingInput, printable

if TYPE_CHECKING:
    from torch import Tensor

    from quant.inference import PackedModel

MOST_SHOWN = 5


def predict(words: Sequence[str]) -> int:
    """Print the likeliest classes of every image, with their probabilities."""
    if len(words) < 2 or any("=" in word and not Path(word).exists() for word in words):
        message = (
            "give a packed network and one image or more: predict FILE IMAGE … (export format=packed writes the file)"
        )
        raise ConfigError([Fault("predict", message)])
    missing = [word for word in words if not Path(word).is_file()]
    if missing:
        raise MissingInput(f"no such file: {', '.join(missing)}")
    import torch

    from runner.evaluate import read_packed

    model = read_packed(Path(words[0]))
    shown = min(MOST_SHOWN, len(model.classes))
    for word in words[1:]:
        best = torch.softmax(model(_image(Path(word), model))[0], 0).topk(shown)
        said = [
            f"{printable(model.classes[i])} {100 * p:.1f} %"
            for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        print(f"{printable(word)}: {', '.join(said)}")
    return int(Exit.DONE)


def _image(path: Path, model: "PackedModel") -> "Tensor":
    """One image as the network takes it: its central square at the side of the training images, normalised, resized."""
    import torch

    from runner.data.augment import Normalise, resize
    from runner.data.datasets import Files
    from runner.data.decode import BadImageError, centre_box, opened, to_array

    take = model.preprocessing
    one = Files(path.parent, "predict", (path.name,), torch.zeros(1, dtype=torch.int64))
    try:
        with opened(one, path.name) as image:
            pixels = to_array(image, take.channels, take.pixels, centre_box(*image.size, take.crop))
    except BadImageError as bad:
        raise BadData(f"{path}: {bad.reason}") from bad
    normalise = Normalise.of(take.mean, take.std, torch.device("cpu"))
    return resize(normalise(torch.tensor(pixels)[None]), take.size)
