"""The sentences of a report, made of numbers that are there and of nothing else."""

from collections.abc import Iterable, Sequence
from typing import Any

from runner.pages.results import Group, by_task
from runner.statistics import Difference, spread


def discussion(groups: Sequence[Group], records: Sequence[dict[str, Any]]) -> Iterable[str]:
    """Sentences, a paragraph for each network and data set and one for each benchmark."""
    for (network, dataset, epochs), members in by_task(groups):
        sentences = [*_about_accuracy(members), *_about_cost(members)]
        runs = sum(len(group.rows) for group in members)
        yield f"{network} on {dataset}, {count(epochs, 'epoch')}, {count(runs, 'run')}: " + " ".join(sentences)
    for record in records:
        if sentence := _about_bench(record):
            yield sentence


def _about_accuracy(members: Sequence[Group]) -> Iterable[str]:
    floats = [group for group in members if group.quant == "none"]
    low_bit = [(gap, group) for group in members if group.quant != "none" and (gap := group.difference())]
    for group in floats:
        name = "float" if group.plain or len(floats) == 1 else group.name
        yield f"{name} reaches {spread([row['test_top1'] for row in group.rows])} %."
    if not low_bit:
        yield "No quantized run has a float run of the same seed to be compared with."
        return
    # By accuracy: a difference may be to a float run that failed, trained alike.
    ordered = sorted(low_bit, key=lambda pair: -(pair[1].mean("test_top1") or 0.0))
    best, worst = ordered[0], ordered[-1]
    yield f"Of the others the best is {_reached(*best)}."
    if worst is not best:
        yield f"The last is {_reached(*worst)}."
    told = [group.name for difference, group in ordered if difference.certain]
    same = [group.name for difference, group in ordered if difference.half is not None and not difference.certain]
    if told:
        yield f"The 95 % interval of the difference leaves out 0 for {_listed(told)}."
    if same:
        yield f"With these seeds {_listed(same)} cannot be told from float."
    few = [group.name for difference, group in ordered if difference.half is None]
    if few:
        yield f"Too few seeds for an interval: {_listed(few)}."


def _reached(difference: Difference, group: Group) -> str:
    accuracy = spread([row["test_top1"] for row in group.rows])
    return f"{group.name} ({accuracy} %; {difference} points, n = {difference.n})"


def _about_cost(members: Sequence[Group]) -> Iterable[str]:
    base = next((group for group in members if group.quant == "none"), None)
    wanted = (("packed_bytes", "The smallest network, packed, is that of", 1024.0, "KiB"),
              ("saved_bytes_per_sample", "Least is saved for backward by", 1024.0, "KiB an image"))  # fmt: skip
    for key, words, unit, name in wanted:
        known = [(mean, group) for group in members if (mean := group.mean(key)) is not None]
        if len(known) < 2:
            continue
        least, group = min(known, key=lambda pair: pair[0])
        usual = base.mean(key) if base else None
        ratio = f", {usual / least:.1f} times less than float" if usual and group is not base and least else ""
        yield f"{words} {group.name}: {least / unit:,.1f} {name}{ratio}."
    times = [(mean / group.epochs, group) for group in members if (mean := group.mean("train_seconds"))]
    machines = {tuple(str(row.get(key)) for key in ("cpu", "threads")) for group in members for row in group.rows}
    if len(times) > 1 and len(machines) == 1:
        (fast, first), (slow, last) = min(times, key=lambda p: p[0]), max(times, key=lambda p: p[0])
        yield f"An epoch took from {fast:.1f} s ({first.name}) to {slow:.1f} s ({last.name})."


def _about_bench(record: dict[str, Any]) -> str:
    facts, rows = record.get("facts", {}), record["rows"]
    where = f"{facts.get('threads', '?')} thread(s) of {facts.get('cpu', 'an unknown processor')}"
    if not facts:  # rows of a CSV file, which do not say where they were measured
        return ""
    if record["kind"] == "conv":
        best = max(rows, key=lambda row: row["kernel_speedup"])
        return (
            f"Packed binary convolution on {where}: up to {best['kernel_speedup']:.1f} times as fast as float32 "
            f"({best['in_channels']} channels, filter {best['kernel']} x {best['kernel']}), {best['alpha_speedup']:.1f} times "
            "with packing and scaling."
        )
    others = [row for row in rows if not row["name"].startswith(row["against"])]  # nor float32 made faster
    if not others:
        return ""
    fast, lean = min(others, key=lambda row: row["time"]), min(others, key=lambda row: row["saved"])
    return (
        f"One training step of {facts.get('model', '?')}, batch {facts.get('batch', '?')}, on {where}: the fastest quantized "
        f"step is {fast['name']}'s, {fast['time']:.2f} of the time of float32; {lean['name']} saves least for backward, "
        f"{lean['saved']:.2f} of the bytes of float32."
    )


def count(number: int, word: str) -> str:
    """A number of things, the word in the plural where it has to be."""
    return f"{number} {word}{'s' * (number != 1)}"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
