"""`bench`: what training and inference really cost on this machine, always as a ratio to float32 measured in the same process."""

from collections.abc import Sequence
from importlib import import_module

from runner.faults import ConfigError, Exit, Fault, also_known, nearest

KINDS = {
    "step": "one training step of every quantizer: time, bytes saved for backward, peak memory",
    "conv": "the packed binary convolution over channels and filter sizes (XNOR-Net, Fig. 4 b and c)",
    "model": "a stored network, float against packed: latency, throughput, memory",
}


def bench(words: Sequence[str]) -> int:
    """Measure one of `KINDS`: the words become a plan, the plan figures, the figures a table, CSV, JSON and a page."""
    kind = words[0] if words else ""
    if kind not in KINDS:
        listed = "; ".join(f"{name}: {meaning}" for name, meaning in KINDS.items())
        raise ConfigError([Fault("bench", f"say which: bench step|conv|model.{nearest(kind, list(KINDS))} {listed}")])
    room = import_module(f"runner.bench.{kind}")
    with also_known(room.OWN):
        plan = room.plan_of(words[1:])
    result = import_module(f"runner.bench.{kind}_contest").measure(plan)
    import_module(f"runner.bench.{kind}_report").report(plan, result, ["python", "-m", "runner", "bench", *words])
    return int(Exit.DONE)
