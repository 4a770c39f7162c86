"""`bench step`: one training step of every quantizer against float32 of the same network, in turns in one process.

    python -m runner bench step                                every quantizer as it ships, ResNet-18, batch 64, one thread
    python -m runner bench step model=lenet5 dataset=digits batch=32 quant=xnor,lsq
    python -m runner bench step quant=lsq quant.weight_bits=2,4 trainer.compile=false,true    all four
    python -m runner bench step variant="quant=actgrad quant.bits=2 quant.norm=quantized" variant="quant=xnor"
    python -m runner bench step device=cuda base="trainer.amp=bf16 trainer.compile=true" trainer.amp=bf16 trainer.compile=true

Every key of a run may be given; commas make combinations. A `variant` is a row of its own on the same network and data. Short
forms: `batch` (batch_size), `threads` and `device` (trainer.…). `n`: turns; `base`: what float32 itself is trained with.
"""

import re
import shlex
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from runner.compose import choices_of, config_from, expand, split_options
from runner.faults import ConfigError, Fault, refuse
from runner.schema import RunConfig

TURNS = 9
SHORT = {"batch": "batch_size", "threads": "trainer.threads", "device": "trainer.device"}
OWN = ("n", "variant", "base", *SHORT)
USUAL = ("model=resnet18", "dataset=synthetic", "batch_size=64", "trainer.threads=1")
METHOD = re.compile(r"\+*(quant|regularizer|trainer)[.=](?!device=|threads=)")  # how a network is trained, not which
BESIDE = (  # measured unasked, besides every quantizer as it ships
    "quant=xnor trainer.recompute=stages",
    "quant=xnor trainer.backward=bf16",
    "quant=xnor trainer.backward=bf16 trainer.recompute=stages",
    "quant=actgrad quant.bits=2 quant.norm=quantized",
    "quant=lsq quant.norm_input=kept",
    "quant=lsq trainer.channels_last=true",
    "quant=lsq trainer.backward=bf16",
    "quant=lsq trainer.backward=bf16 trainer.channels_last=true",
    "quant=8bit-rangebn trainer.backward=bf16",
    "quant=none trainer.channels_last=true",
)
COMPILED = ("quant=none trainer.compile=true", "quant=lsq trainer.compile=true")  # the same, where there is a compiler


@dataclass(frozen=True)
class Contender:
    """One row of the table: its name, its config, and the name of the float32 step that it is compared with."""

    name: str
    config: RunConfig
    base: str


@dataclass(frozen=True)
class Plan:
    """Everybody who takes part, float32 first, and how many turns each has."""

    contenders: list[Contender]
    turns: int


def plan_of(words: Sequence[str]) -> Plan:
    """Who takes part. Raises ConfigError for whatever is wrong with any of them; nothing heavy is loaded."""
    own, rest, config_dirs = _sorted_out(words)
    turns = own["n"][-1] if own["n"] else str(TURNS)
    if not turns.isdigit() or int(turns) < 1:
        raise ConfigError([Fault("n", f"{turns!r}: give a whole number of turns, 9 or more for figures to be quoted")])
    keys = {word.partition("=")[0] for word in rest}
    jobs = expand([*(word for word in USUAL if word.partition("=")[0] not in keys), *rest])
    lines = list(jobs) if "quant" in keys else []
    variants = own["variant"] if own["variant"] or lines else _usual_rows("model" in keys)
    grounds = (
        [network(job) for job in jobs] if lines else jobs
    )  # without a quantizer of theirs, all words are for all rows
    lines += [[*ground, *shlex.split(variant)] for variant in variants for ground in grounds]
    base = shlex.split(" ".join(own["base"]))
    contenders = _contenders(lines, base, config_dirs)
    refuse(_not_measured(contender.config for contender in contenders))
    _refuse_mixed([contender.config for contender in contenders])
    return Plan(contenders, int(turns))


def network(words: Iterable[str]) -> list[str]:
    """The words that say which network is trained on which data, without those that say how."""
    return [word for word in words if not METHOD.match(word)]


def _sorted_out(words: Sequence[str]) -> tuple[dict[str, list[str]], list[str], list[str]]:
    """Words of this verb, words of a run with short forms written out, folders of configs."""
    overrides, config_dirs = split_options(words)
    own: dict[str, list[str]] = {key: [] for key in OWN if key not in SHORT}
    rest: list[str] = []
    for word in overrides:
        key, equals, value = word.partition("=")
        if key in own:
            own[key].append(value)
        else:
            rest.append(f"{SHORT.get(key, key)}{equals}{value}")
    return own, rest, config_dirs


def _usual_rows(of_another_model: bool) -> list[str]:
    shipped = [f"quant={name}" for name in choices_of()["quant"] if name != "none"]
    beside = [row for row in BESIDE if not (of_another_model and "recompute" in row)]  # it may have no stages
    compiled = COMPILED if any(map(shutil.which, ("g++", "clang++"))) else ()
    return [*shipped, *beside, *compiled]


def _contenders(lines: Sequence[Sequence[str]], base: Sequence[str], config_dirs: Sequence[str]) -> list[Contender]:
    """A contender a line, each behind its own float32; a line that says the same as another is left out."""
    shared = [word for word in lines[0] if all(word in line for line in lines) and not word.startswith("quant=")]
    found: list[Contender] = []
    faults: list[Fault] = []
    for line in lines:
        ground = network(line)
        plain = _name([word for word in ground if word not in shared]) or "float32"
        rows = [
            (plain, [*ground, "quant=none", *base], plain),
            (_name([w for w in line if w not in shared]), line, plain),
        ]
        for name, words, against in rows:
            try:
                config = config_from(words, config_dirs)
            except ConfigError as error:
                faults += error.faults
                continue
            if all(config != other.config for other in found):
                found.append(Contender(name, config, against))
    refuse({str(fault): fault for fault in faults}.values())
    return found


def _name(words: Sequence[str]) -> str:
    """`quant=lsq trainer.compile=true` -> `lsq compile=true`."""
    ordered = sorted(words, key=lambda word: not word.startswith("quant="))
    short = " ".join(re.sub(r"^\+*(quant=|quant\.|trainer\.)", "", word) for word in ordered)
    return re.sub(r"^none\b", "float32", short)


def _not_measured(configs: Iterable[RunConfig]) -> Iterable[Fault]:
    """What comes before a step or asks another network: a row that left it out unsaid would be wrong."""
    said = {
        key
        for config in configs
        for key, value in (
            ("trainer.mixup", config.trainer.mixup), ("trainer.cutmix", config.trainer.cutmix), ("distill", config.distill),
        )
        if value is not None
    }  # fmt: skip
    return [Fault(key, "is no part of the step that is measured; accepted here: null") for key in sorted(said)]


def _refuse_mixed(configs: Sequence[RunConfig]) -> None:
    """One process has one number of threads, and turns are taken on one device."""
    for key in ("device", "threads"):
        values = {getattr(config.trainer, key) for config in configs}
        if len(values) > 1:
            raise ConfigError([Fault(f"trainer.{key}", f"must be the same for all, not {', '.join(map(str, values))}")])
