"""`predict FILE IMAGE …`: what a packed network sees in images, or in folders of them.

They are decoded with the limits of a data set and scaled as in training.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runner.data.locations import KINDS, is_image, listed
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
    missing = [word for word in words if not Path(word).exists()]
    if missing:
        raise MissingInput(f"no such file: {', '.join(missing)}")
    if Path(words[0]).is_dir():
        message = f"is a folder, not a packed network; export checkpoint={words[0]} format=packed writes one of a run"
        raise MissingInput(f"{words[0]}: {message}")
    images = [path for word in words[1:] for path in _images_of(Path(word))]
    import torch

    from runner.evaluate import read_packed

    model = read_packed(Path(words[0]))
    shown = min(MOST_SHOWN, len(model.classes))
    for path in images:
        best = torch.softmax(model(_image(path, model))[0], 0).topk(shown)
        said = [
            f"{printable(model.classes[i])} {100 * p:.1f} %"
            for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        print(f"{printable(str(path))}: {', '.join(said)}")
    return int(Exit.DONE)


def _images_of(path: Path) -> list[Path]:
    """An image, or the images that lie directly in a folder, by name."""
    if not path.is_dir():
        return [path]
    images = [path / name for name in sorted(listed(path)) if is_image(name)]
    if not images:
        raise MissingInput(f"{path}: a folder without images ({KINDS})")
    return images


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
