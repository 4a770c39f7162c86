"""The contract of a quantizer, and the registry that finds every one of them.

A quantizer is a *rewrite of layers*: it is handed a plain float layer and gives back its own layer, built from that one
(`Quantizer.layer`). `quant.surgery.quantize_` walks a model and does so under ordered rules.

To add a method: one file in this folder with a class as below, and one YAML in conf/quant/ with the same keys. No other changes.

    @register("mine")
    @dataclass(frozen=True, kw_only=True)
    class Mine(Quantizer):
        bits: Literal[2, 3, 4] = 4                       # a key of conf/quant/mine.yaml
        handles = (nn.Conv2d, nn.Linear)

        def layer(self, module: nn.Module) -> nn.Module: ...
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from quant.registry import Registry
from quant.settings import check_fields

FLOAT = 32  # bits of a tensor that a method leaves alone


@dataclass(frozen=True)
class Precision:
    """Bits of a layer's weights, of the activations it reads, and of the gradient that passes back through it."""

    weight: int = FLOAT
    act: int = FLOAT
    grad: int = FLOAT


class QuantizedLayer:
    """What the trainer may ask of a layer that a quantizer built. A mixin for nn.Module; every default means 'nothing to do'.

    `forward` has no Python side effects: state lives in buffers and parameters, so a layer compiles, resumes and distributes.
    """

    precision: Precision = Precision()
    remark: str = ""
    """What the preflight table adds to the reason that a rule gives for this layer."""
    no_decay: ClassVar[tuple[str, ...]] = ()
    """Names of this layer's parameters that weight decay leaves alone (`alpha`, `act_quantizer.step`)."""

    def project_(self) -> None:
        """Put the parameters back where the method wants them (centre, clamp). Called once after every optimizer step."""

    def calibrate_(self, x: Tensor) -> None:
        """Set steps and ranges from `x`, the first input that this layer sees. Called once, before step 0 of a new run."""

    def has_fitting_levels(self) -> bool:
        """Whether the steps and ranges that were loaded into this layer are for the levels that it has."""
        return True

    def backward_in_bf16_(self) -> bool:
        """From now on compute the products of backward in bfloat16. False where that would round more than the gradient."""
        return False

    def weight_codes(self) -> Tensor | None:
        """The integer codes of the weights as they are now, int8 or int16, in the shape of the weight."""
        return None

    def health(self, x: Tensor) -> dict[str, float]:
        """Figures of health for one input batch: `clip_ratio` (share of activations outside the range), `step_size`."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Quantizer(ABC):
    """Settings of a method. A frozen dataclass: its fields are the keys of its YAML, checked before anything is built.

    Raises ValueError for a value that the annotation of its field does not accept. A method with a `__post_init__` of its own
    calls this one, too.
    """

    name: ClassVar[str] = ""
    handles: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d, nn.Linear)
    """Exact types of the layers that `layer` rewrites; a subclass of them has a reason to be one and is left alone."""
    scheduled: ClassVar[tuple[str, ...]] = ()
    """Names of buffers that a regime's phase may drive through `quant: {name: value or schedule}`."""

    def __post_init__(self) -> None:
        check_fields(self, self.name or type(self).__name__)

    @abstractmethod
    def layer(self, module: nn.Module) -> nn.Module | None:
        """The layer that replaces `module`, taking over its parameters; None to leave this one as it is.

        Raises ValueError, naming what is accepted, where the settings make no sense for this module.
        """


QUANTIZERS: Registry[type[Quantizer]] = Registry("quantizer")
register, find = QUANTIZERS.register, QUANTIZERS.find
