"""The figures of a report: accuracy against cost, curves, and what the benchmarks measured."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Any

from runner.pages import svg
from runner.pages.records import read_metrics
from runner.pages.report_records import scan_figures
from runner.pages.report_words import count
from runner.pages.results import Group, Task, by_task
from runner.pages.svg_rows import Dot, bars, dots

LONGEST = 50  # letters beside a point
LONGEST_ROW = 62  # and over a row
MOST_CURVES = 20  # in one chart


@dataclass
class Picture:
    """A figure: a name for its file, what is said below it, and itself.

    Names come from runs; one that is no plain file name loses its letters to their digest.

    >>> Picture("resnet-cifar10-4-packed", "", "").name, Picture("../../etc/x", "", "").name
    ('resnet-cifar10-4-packed', 'etc-x-56da1a2e')
    """

    name: str
    caption: str
    svg: str

    def __post_init__(self) -> None:
        plain = re.sub(r"[^A-Za-z0-9_.+-]+|\.\.+", "-", self.name).strip("-.")[:80]
        if plain != self.name:
            self.name = f"{plain}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}".replace("--", "-")


def pictures(groups: Sequence[Group], records: Sequence[dict[str, Any]]) -> Iterable[Picture]:
    """All of them, those of the runs first."""
    yield from _accuracy_pictures(groups)
    yield from _variant_pictures(groups)
    for task, members in by_task(groups):
        if picture := _curves(task, members):
            yield picture
    for record in records:
        yield from bench_pictures(record)


def _on(task: Task) -> str:
    return f"{task[0]} on {task[1]}, {count(task[2], 'epoch')}"


def _file(task: Task, what: str) -> str:
    """The name of a figure about one network, data set and length."""
    return re.sub("[ =]", "-", "-".join([*map(str, task), what]))


def _accuracy_pictures(groups: Sequence[Group]) -> Iterable[Picture]:
    costs = {
        "packed_bytes": ("packed size", "packed size, KiB"),
        "saved_bytes_per_sample": ("bytes saved for backward", "saved for backward, KiB an image"),
    }
    for task, members in by_task(groups):
        for key, (name, axis) in costs.items():
            known = [(mean / 1024, group) for group in members if (mean := group.mean(key))]
            if len(known) < 2:
                continue
            series = [_point(cost, group) for cost, group in known]
            chart = svg.Chart(
                f"{_on(task)}: accuracy and {name}", axis, "test accuracy, %", series,
                logarithmic="x" if max(cost for cost, _ in known) > 8 * min(cost for cost, _ in known) else "",
                front=pareto([(cost, one.y[0]) for (cost, _), one in zip(known, series, strict=True)]),
            )  # fmt: skip
            caption = (
                f"{_on(task)}: test accuracy (mean, ± standard deviation over seeds) against {name}; "
                "dotted: the Pareto front."
            )
            yield Picture(_file(task, key.split("_")[0]), caption, chart.svg())


def _variant_pictures(groups: Sequence[Group]) -> Iterable[Picture]:
    """Where several settings of one quantizer were run: how far each is from float, as sure as the seeds allow."""
    for task, members in by_task(groups):
        for quant in dict.fromkeys(group.quant for group in members):
            rows = [row for group in members if group.quant == quant and (row := _beside_float(group))]
            if len(rows) < 2:
                continue
            name = quant.replace("none", "float32")
            title = f"{_on(task)}: settings of {name} beside float"
            drawn = dots(title, "test accuracy minus float, points: mean over seeds, 95 % interval", rows, level=0.0)
            caption = f"{_on(task)}: settings of {name}, test accuracy minus that of float, seed by seed."
            yield Picture(_file(task, quant), caption, drawn)


def _beside_float(group: Group) -> Dot | None:
    gap = group.difference()
    if gap is None or gap.half is None:
        return None
    ends = gap.mean - gap.half, gap.mean + gap.half
    return Dot(_short(group, LONGEST_ROW), gap.mean, *ends, f"{gap}, n = {gap.n}")


def _point(cost: float, group: Group) -> svg.Series:
    values = [row["test_top1"] for row in group.rows]
    mean = sum(values) / len(values)
    sd = stdev(values) if len(values) > 1 else 0.0
    return svg.Series(_short(group), [cost], [mean], [mean - sd], [mean + sd], lines=False)


def _short(group: Group, longest: int = LONGEST) -> str:
    """As short as it can stand beside a point: W and A are the bits of weights and activations."""
    short = re.sub(r"\bact_bits=", "A", re.sub(r"\bweight_bits=", "W", group.name.replace("quant.", "")))
    return group.cut(re.sub(r"^none\b", "float32", short), longest)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other point beats at the same or a lower cost.

    >>> pareto([(3, 5), (1, 2), (2, 1), (2, 4)])
    [(1, 2), (2, 4), (3, 5)]
    """
    front: list[tuple[float, float]] = []
    for cost, reached in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or reached > front[-1][1]:
            front.append((cost, reached))
    return front


def _curves(task: Task, members: Sequence[Group]) -> Picture | None:
    """Mean validation accuracy with a band over seeds, of runs whose folders are there."""
    best = sorted(members, key=lambda group: -(group.mean("test_top1") or 0.0))[:MOST_CURVES]
    series = [one for group in members if group in best and (one := _curve(group))]
    if not series or all(len(one.x) < 2 for one in series):
        return None
    of_best = f" of the {MOST_CURVES} best configurations" if len(members) > MOST_CURVES else ""
    title = f"{_on(task)}: validation accuracy{of_best}"
    chart = svg.Chart(title, "epochs completed", "validation top-1, %", series, counted=True)
    return Picture(_file(task, "curves"), f"{title}, mean and ± standard deviation over seeds.", chart.svg())


def _curve(group: Group) -> svg.Series | None:
    curves = [read_metrics(row["folder"])["val_top1"].dropna().tolist() for row in group.rows if "folder" in row]
    length = min(map(len, curves), default=0)
    if not length:
        return None
    columns = [[curve[epoch] for curve in curves] for epoch in range(length)]
    means = [sum(column) / len(column) for column in columns]
    sds = [stdev(column) if len(column) > 1 else 0.0 for column in columns]
    low = [mean - sd for mean, sd in zip(means, sds, strict=True)]
    high = [mean + sd for mean, sd in zip(means, sds, strict=True)]
    return svg.Series(_short(group), list(range(1, length + 1)), means, low, high)


def bench_pictures(record: dict[str, Any]) -> Iterable[Picture]:
    """Bars of training steps, curves of convolutions, lines of scans."""
    draw = {"step": _step_pictures, "conv": _conv_pictures, "scan": _scan_pictures}.get(record["kind"])
    yield from draw(record["name"], record["rows"], record.get("facts", {})) if draw else ()


def _step_pictures(name: str, rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> Iterable[Picture]:
    title = f"{facts['model']}, batch {facts['batch']}: " if facts else ""
    labels = [row["name"] for row in rows]
    ranges = [(row["time_low"], row["time_high"]) for row in rows]
    for key, words in (("time", "time of a training step"), ("saved", "bytes saved for backward")):
        spreads = ranges if key == "time" else [None] * len(rows)
        picture = bars(f"{title}{words}, float32 = 1", labels, [row[key] for row in rows], spreads)
        yield Picture(f"{name}-{key}", f"{title}{words} as a ratio to float32 measured in the same process.", picture)


def _scan_pictures(name: str, rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> Iterable[Picture]:
    for figure, points in scan_figures(rows).items():
        first, labels = points[0], dict.fromkeys(point["series"] for point in points)
        lines = {label: [point for point in points if point["series"] == label] for label in labels}
        series = [svg.Series(label, [p["x"] for p in line], [p["y"] for p in line]) for label, line in lines.items()]
        logarithmic = [a for a in "xy" if a in first["logarithmic"] and all(point[a] > 0 for point in points)]
        chart = svg.Chart(
            first["title"], first["x_label"], first["y_label"], series,
            logarithmic="".join(logarithmic), level=None if first["level"] == "" else first["level"],
        )  # fmt: skip
        yield Picture(figure, f"{first['title']}.", chart.svg())


def _conv_pictures(name: str, rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> Iterable[Picture]:
    drawn = (("kernel_speedup", "kernel"), ("alpha_speedup", "with packing and alpha"), ("alpha_k_speedup", "with alpha and K"),
             ("paper", "formula of the paper"))  # fmt: skip
    for part, axis, key in (("channels", "input channels", "in_channels"), ("filter", "filter width", "kernel")):
        mine = sorted((row for row in rows if row["figure"] == part), key=lambda row: row[key])
        if mine:
            series = [
                svg.Series(words, [row[key] for row in mine], [row[column] for row in mine]) for column, words in drawn
            ]
            chart = svg.Chart(
                f"Binary convolution: speedup over {part}", axis, "speedup over float32", series,
                logarithmic="x" if part == "channels" and len(mine) > 1 else "", from_zero=True, level=1.0,
            )  # fmt: skip
            yield Picture(
                f"{name}-{part}", f"Speedup of the packed binary convolution over float32, by {axis}.", chart.svg()
            )
