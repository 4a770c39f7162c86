"""What a report says, before any format: tables, figures, and sentences that are made of numbers which are there."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from runner.pages.records import read_run
from runner.pages.report_pictures import Picture, pictures
from runner.pages.report_records import Table, bench_records, record_of, record_tables
from runner.pages.report_words import count, discussion
from runner.pages.results import Group, Row, by_task, collect, groups_of
from runner.pages.settings import flatten, shown
from runner.statistics import spread

NOT_RUN = "not run"
MOST_HOLES = 40
MOST_CONFIGS = 50
HEADINGS = (
    "network", "data", "quantizer", "epochs", "n", "test accuracy, %", "minus float, points",
    "saved for backward, KiB an image", "peak memory, MiB", "packed (computed), KiB", "training, s an epoch",
)  # fmt: skip
HYPER = (
    "regime.phases",
    "data_regime.phases",
    "dataset.augment",
    "dataset.val",
    "trainer.",
    "quant.",
    "classifier.",
    "regularizer.",
)
NO_HYPER = ("trainer.threads", "trainer.device", "trainer.progress", "trainer.dashboard", "trainer.checkpoint_every")
ENVIRONMENT = ("cpu", "threads", "torch", "code")


@dataclass
class Report:
    """All parts, in the order of reading; each is made when somebody asks for it, from rows and from folders of runs."""

    groups: list[Group]
    records: list[dict[str, Any]]

    @cached_property
    def results(self) -> Table:
        return results_table(self.groups)

    @cached_property
    def discussion(self) -> list[str]:
        return list(discussion(self.groups, self.records))

    @cached_property
    def pictures(self) -> list[Picture]:
        return list(pictures(self.groups, self.records))

    @cached_property
    def measured(self) -> list[Table]:
        return [table for record in self.records for table in record_tables(record)]

    @cached_property
    def tables(self) -> list[Table]:
        return [*self.measured, *(_settings_tables(self.groups) if self.groups else ())]

    @cached_property
    def holes(self) -> list[str]:
        return _at_most(MOST_HOLES, list(_holes(self.groups, self.records))) if self.groups else []


def make_report(paths: Sequence[Path], bench: Sequence[Path] = ()) -> tuple[Report, list[Row]]:
    """Everything that can be said about these run folders and files, and about the benchmarks found in the folders `bench`."""
    records = {path: record for path in paths if path.is_file() and (record := record_of(path))}
    rows = collect(path for path in paths if path not in records)
    return Report(groups_of(rows), [*records.values(), *bench_records(bench)]), rows


def results_table(groups: Sequence[Group]) -> Table:
    """One line a configuration; columns of which nothing is known are left out."""
    lines = [_line(group) for group in groups]
    filled = [index for index in range(len(HEADINGS)) if any(line[index] for line in lines)]
    rows = [[line[index] for index in filled] for line in lines]
    return Table("Results", [HEADINGS[index] for index in filled], rows)


def _line(group: Group) -> list[str]:
    unknown = "" if group.quant == "none" else "no float run"
    difference = str(group.difference() or unknown)
    return [
        group.network, group.dataset, group.name, str(group.epochs), str(len(group.rows)),
        spread([row["test_top1"] for row in group.rows]), difference,
        _mean(group, "saved_bytes_per_sample", 1024, "{:.1f}"), _mean(group, "peak_memory_bytes", 2**20, "{:,.0f}"),
        _mean(group, "packed_bytes", 1024, "{:,.0f}"), _mean(group, "train_seconds", group.epochs, "{:.1f}"),
    ]  # fmt: skip


def _mean(group: Group, key: str, unit: float, form: str) -> str:
    mean = group.mean(key)
    return "" if mean is None else form.format(mean / unit)


def _settings_tables(groups: Sequence[Group]) -> Iterable[Table]:
    """Hyper-parameters that all configurations share, those in which they differ, and what it all was measured on."""
    compared = groups if len(groups) <= MOST_CONFIGS else ()  # a table of more columns says nothing
    names = [f"{group.network} {group.dataset} {group.name}" for group in compared]
    configs = {
        name if names.count(name) == 1 else f"{name}, {count(group.epochs, 'epoch')}": _hyper(group)
        for name, group in zip(names, compared, strict=True)
    }
    keys = list(dict.fromkeys(key for config in configs.values() for key in config))
    same = {key for key in keys if len({config.get(key) for config in configs.values()}) == 1}
    if same:
        yield Table(
            "Hyper-parameters of all runs",
            ["key", "value"],
            [[k, next(iter(configs.values()))[k]] for k in keys if k in same],
        )
    differing = [key for key in keys if key not in same]
    if differing:
        rows = [[key, *(config.get(key, "—") for config in configs.values())] for key in differing]
        yield Table("Hyper-parameters that differ", ["key", *configs], rows)
    if cut := [[group.name, group.label] for group in groups if group.name != group.label]:
        yield Table("Names in full", ["name", "settings"], cut)
    rows = [
        [key, ", ".join(sorted({str(row.get(key, "")) for group in groups for row in group.rows}))]
        for key in ENVIRONMENT
    ]
    yield Table("Environment", ["what", "value"], rows)


def _hyper(group: Group) -> dict[str, str]:
    """From the config of one run; what was set where only a CSV is left."""
    row = group.rows[0]
    if "folder" in row:
        flat = flatten(read_run(row["folder"], health=False).config)
        chosen = {key: shown(value) for key, value in flat.items() if key.startswith(HYPER)}
        return {k: v for k, v in chosen.items() if v != "null" and not k.startswith(NO_HYPER) and ".rules." not in k}
    return {"epochs": str(group.epochs), "quant": group.quant} | group.words


def _at_most(most: int, items: list[str]) -> list[str]:
    return items if len(items) <= most else [*items[:most], f"and {len(items) - most} more"]


def _holes(groups: Sequence[Group], records: Sequence[dict[str, Any]]) -> Iterable[str]:
    """Configurations that other networks, data sets or seeds have, and benchmarks that were not run."""
    for kind in ("conv", "step"):
        if all(record["kind"] != kind for record in records):
            yield f"bench {kind}: {NOT_RUN}"
    names = {group.label: group.name for group in groups}
    for (network, dataset, epochs), members in by_task(groups):
        here = {group.label: {row["seed"] for row in group.rows} for group in members}
        seeds = sorted(set().union(*here.values()))
        for label, name in names.items():
            if label not in here:
                yield f"{network}, {dataset}, {count(epochs, 'epoch')}, {name}: {NOT_RUN}"
            elif lost := [seed for seed in seeds if seed not in here[label]]:
                yield f"{network}, {dataset}, {count(epochs, 'epoch')}, {name}, seed {', '.join(map(str, lost))}: {NOT_RUN}"
