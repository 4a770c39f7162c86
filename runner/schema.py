"""The schema of a run: every key, its type and its range. conf/ explains the keys to people, this checks them. No torch here."""

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval, Le, Lt
from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Ge(1)]
Epochs = Annotated[int, Interval(ge=1, le=1_000_000)]
Natural = Annotated[int, Ge(0)]
NonNegative = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Fraction = Annotated[float, Ge(0), Lt(1)]
Minutes = Annotated[str, Field(pattern=r"^(\d+|\d*\.\d+) ?min$")]


class Strict(BaseModel):
    """No unknown keys, no silent conversion, no change afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True, allow_inf_nan=False)


class Schedule(Strict):
    """A value over time, from the start of its phase to the next phase that sets the same key (or for `length`)."""

    schedule: Literal["constant", "linear", "warmup", "cosine", "exponential", "step"]
    start: NonNegative = Field(alias="from")
    end: NonNegative | None = Field(default=None, alias="to")
    length: Positive | None = None
    gamma: Positive = 0.1
    every: Positive | None = None


Value = NonNegative | Schedule
Beta = Annotated[float, Interval(ge=0, lt=1)]


class Phase(Strict):
    """What changes at an epoch or a step of training; what is not named stays as it was."""

    epoch: Natural | None = None
    step: Natural | None = None
    optimizer: Literal["SGD", "Adam", "AdamW", "RMSprop"] | None = None
    lr: Value | None = None
    weight_decay: Value | None = None
    momentum: Annotated[float, Interval(ge=0, lt=1)] | None = None
    dampening: Annotated[float, Interval(ge=0, le=1)] | None = None
    nesterov: bool | None = None
    betas: Annotated[list[Beta], Field(min_length=2, max_length=2)] | None = None
    eps: Positive | None = None
    amsgrad: bool | None = None
    alpha: Beta | None = None
    centered: bool | None = None
    regularizer: Value | None = None
    quant: dict[str, Value] | None = None


COMMON = {"lr", "weight_decay"}
OPTIMIZERS: dict[str, set[str]] = {
    "SGD": {"momentum", "dampening", "nesterov"},
    "Adam": {"betas", "eps", "amsgrad"},
    "AdamW": {"betas", "eps", "amsgrad"},
    "RMSprop": {"alpha", "eps", "momentum", "centered"},
}


class RegimeConfig(Strict):
    """Optimizer and learning rate over time; `phases: null` takes the model's own."""

    epochs: Epochs
    phases: Annotated[list[Phase], Field(min_length=1)] | None


class DataPhase(Strict):
    """Batch and input size from an epoch on."""

    epoch: Natural
    batch_size: PositiveInt | None = None
    input_size: PositiveInt | None = None


class DataRegimeConfig(Strict):
    """Batch and input size over time; `phases: null` takes the model's own."""

    phases: Annotated[list[DataPhase], Field(min_length=1)] | None


class AugmentConfig(Strict):
    """What training images go through."""

    crop: Natural = 0
    flip: bool = False
    cutout: Natural = 0
    scale: Annotated[list[Annotated[float, Gt(0), Le(1)]], Field(min_length=2, max_length=2)] | None = None


class DatasetConfig(Strict):
    """Keys that every data set knows; the reader's own stand in `arguments`."""

    name: str
    input_size: PositiveInt | None
    validation: Literal["split", "test"]
    val_fraction: Annotated[float, Gt(0), Lt(1)]
    split_seed: Natural
    mean: list[float] | None
    std: list[Positive] | None
    augment: AugmentConfig
    memory: Literal["auto", "always", "never"]
    workers: Natural
    cache: str | None
    drop_last: bool
    limit: PositiveInt | None
    arguments: dict[str, Any] = {}


class TrainerConfig(Strict):
    """How a run is executed; conf/trainer/default.yaml explains the keys."""

    epochs: Epochs | None
    max_steps: PositiveInt | None
    select: Literal["val", "last"]
    label_smoothing: Fraction
    mixup: Positive | None
    cutmix: Positive | None
    distill_weight: Annotated[float, Interval(ge=0, le=1)]
    distill_temperature: Positive
    grad_clip: Positive | None
    accumulate: PositiveInt
    ema: Annotated[float, Gt(0), Lt(1)] | None
    device: Literal["auto", "cpu", "cuda"]
    threads: Annotated[int, Interval(ge=1, le=256)] | None  # where no processor has so many, libgomp ends the process
    amp: Literal["none", "bf16", "fp16"]
    compile: bool
    channels_last: bool
    backward: Literal["exact", "bf16"]
    recompute: Literal["none", "blocks", "stages"]
    sync_norm: bool
    on_nan: Literal["stop", "skip", "lower_lr"]
    checkpoint_every: PositiveInt | Minutes | None
    progress: Literal["auto", "bar", "plain", "none"]
    dashboard: Literal["write", "open", "none"]


class RuleConfig(BaseModel):
    """Which layers, and what is different for them; keys that are not listed here are settings of the quantizer."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    match: str | list[str]
    keep: bool = False
    optional: bool = False
    why: str = ""

    @property
    def patterns(self) -> list[str]:
        return [self.match] if isinstance(self.match, str) else self.match

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Named(Strict):
    """A component by name, with its arguments."""

    name: str
    arguments: dict[str, Any] = {}


class QuantConfig(Named):
    """A quantizer, its settings and its rules."""

    rules: list[RuleConfig] = []


class RunConfig(Strict):
    """A whole run, checked."""

    mode: Literal["train", "evaluate"]
    seed: Annotated[int, Interval(ge=0, lt=2**31)]
    name: str | None
    outputs: str
    checkpoint: str | None
    pretrained: str | None
    distill: str | None
    curve: str | None = None
    plugins: list[str]
    epochs: Epochs | None
    batch_size: PositiveInt | None
    lr: Positive | None
    model: Named
    quant: QuantConfig
    classifier: Named
    regularizer: Named
    dataset: DatasetConfig
    regime: RegimeConfig
    data_regime: DataRegimeConfig
    trainer: TrainerConfig

    @property
    def total_epochs(self) -> int:
        return self.trainer.epochs or self.regime.epochs
