"""The registry of models, and the contract between a model and everything that uses it.

A model is a function that is registered under a name:

    @register("lenet5")
    def lenet5(*, in_channels: int, num_classes: int, image_size: int, hidden: int = 500) -> nn.Module: ...

* `in_channels`, `num_classes` and `image_size` (the side of a square image, in pixels) come from the data set. The
  other keyword arguments are the model's own and are the keys of `conf/model/<name>.yaml`. Their annotations are
  read from the source text, so they use only int, float, bool, str, list, dict, None, `Literal` and `Annotated`
  with bounds, and their defaults are literals.
* The network is plain float torch. Whatever a quantizer may want to replace (convolution, linear layer,
  normalisation, activation, pooling) is an `nn.Module` that is used once per forward pass. 1x1 convolutions of a
  shortcut have `shortcut` in their name, no other layer has. A model holds none of the normalisations or sign
  functions that a quantizer adds to a layer by itself.
* Weights are drawn from torch's global generator only: the same `torch.manual_seed` gives the same network.

A model may carry three attributes, which the trainer reads with `getattr` and a config overrides:

* `regime`, `data_regime`: its training recipe, as a list of phases in the form of `conf/regime/*.yaml` and
  `conf/data_regime/*.yaml`, or as a function of the epoch that returns what holds in it, as a phase without its start.
* `input_transform`: a callable that is applied to every float batch `x_NCHW` before the network sees it.

A new model is a new file in this folder with a YAML beside the others: nothing else has to be edited.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

from torch import nn

import models

ModelFunction = TypeVar("ModelFunction", bound=Callable[..., nn.Module])
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

MODELS: dict[str, Callable[..., nn.Module]] = {}


def register(name: str) -> Callable[[ModelFunction], ModelFunction]:
    """Make the decorated function known as `name`."""

    def add(function: ModelFunction) -> ModelFunction:
        owner = MODELS.get(name)
        if owner is not None and owner.__module__ != function.__module__:
            raise ValueError(f"the model name {name!r} is already taken by {owner.__module__}")
        MODELS[name] = function
        return function

    return add


def build(name: str, *, in_channels: int, num_classes: int, image_size: int, **arguments: object) -> nn.Module:
    """The network registered as `name`, for images of `in_channels` x `image_size` x `image_size`.

    >>> build("lenet5", in_channels=1, num_classes=10, image_size=28).fc2
    Linear(in_features=500, out_features=10, bias=True)
    """
    if name not in MODELS:
        import_all()
    function = pick("model", name, dict(sorted(MODELS.items())))
    return function(in_channels=in_channels, num_classes=num_classes, image_size=image_size, **arguments)


def import_all() -> None:
    """Import every module of this folder, so that all of its models are registered."""
    for module in pkgutil.iter_modules(models.__path__, f"{models.__name__}."):
        importlib.import_module(module.name)


def pick(argument: str, key: Key, table: Mapping[Key, Value]) -> Value:
    """`table[key]`, or a ValueError that says what `argument` accepts.

    >>> pick("activation", "rellu", {"relu": 1, "prelu": 2})
    Traceback (most recent call last):
    ValueError: activation='rellu' is unknown; did you mean 'relu'? Accepted: relu, prelu
    """
    if key in table:
        return table[key]
    names = [str(known) for known in table]
    nearest = difflib.get_close_matches(str(key), names, n=1, cutoff=0.0)[0]
    raise ValueError(f"{argument}={key!r} is unknown; did you mean {nearest!r}? Accepted: {', '.join(names)}")
