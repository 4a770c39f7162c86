"""`bench model`: a whole network, float32 against packed: latency, throughput, where the time goes, memory.

    python -m runner bench model checkpoint=outputs/runs/NAME                a trained run
    python -m runner bench model model=resnet18 quant=xnor                   the same network untrained: time needs no training
    python -m runner bench model model=lenet5 dataset=digits quant=xnor batch=1,64 threads=2

float32 is the plain network (quant=none) as torch runs it, eager, and the same in channels_last; the trained network itself,
which imitates low precision in floats, is measured besides. `n`: turns; `memory=false` leaves out the shipped networks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from runner.compose import config_from, own_words, split_options
from runner.faults import ConfigError, Fault, refuse_missing
from runner.schema import RunConfig

USUAL = ("model=resnet18", "quant=xnor", "dataset=synthetic")
OWN = {"n": "9", "batch": "1,64", "threads": "1", "memory": "true"}


@dataclass(frozen=True)
class Plan:
    """What the command line says."""

    turns: int
    batches: tuple[int, ...]
    threads: int
    memory: bool
    words: list[str]  # of a run: model=, quant=, checkpoint= …
    config_dirs: list[str]
    config: RunConfig | None  # None: that of the checkpoint


def plan_of(words: Sequence[str]) -> Plan:
    """Read the words of this verb; the others are those of a run. Raises ConfigError, or MissingInput for a checkpoint."""
    overrides, config_dirs = split_options(words)
    said, rest = own_words(overrides, OWN)
    own = OWN | said
    faults = [
        Fault(key, f"{own[key]!r}: give whole numbers from 1")
        for key in ("n", "batch", "threads")
        if not all(part.isdigit() and int(part) for part in own[key].split(","))
    ]
    if own["memory"] not in ("true", "false"):
        faults.append(Fault("memory", f"{own['memory']!r}: give true or false"))
    if faults:
        raise ConfigError(faults)
    keys = {word.partition("=")[0]: word.partition("=")[2] for word in rest}
    given = keys.get("checkpoint")
    if given is not None:
        refuse_missing(given)
    if given is None:
        rest = [*(word for word in USUAL if word.partition("=")[0] not in keys), *rest]
    rest = [*rest, "trainer.device=cpu"]
    config = config_from(rest, config_dirs) if given is None else None
    batches = tuple(int(batch) for batch in own["batch"].split(","))
    return Plan(int(own["n"]), batches, int(own["threads"]), own["memory"] == "true", rest, config_dirs, config)
