"""What `bench conv` found: a table on screen, CSV, JSON, and a page whose sentences are made of the numbers."""

import csv
import io
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.bench.conv import QUOTED, Plan
from runner.bench.conv_figures import speedups
from runner.bench.page import Charts, facts_table, write_bench_page
from runner.files import write_atomic, write_json
from runner.pages.page import Column, table, text
from runner.screen import Screen

if TYPE_CHECKING:
    from runner.bench.conv_contest import Result, Row

COLUMNS = {
    "measured for": "figure",
    "in": "in_channels",
    "out": "out_channels",
    "image": "size",
    "filter": "kernel",
    "batch": "batch",
    "layout": "layout",
    "path": "path",
    "paper": "paper",
    "machine": "machine",
    "kernel": "kernel_speedup",
    "call": "call_speedup",
    "alpha": "alpha_speedup",
    "alpha, K": "alpha_k_speedup",
    "of limit": "share_of_limit",
    "inside": "share_inside",
    "kernel / best": "kernel_over_best",
    "alpha / best": "alpha_over_best",
    "best float": "best_float",
    "kernel, µs": "kernel_us",
    "torch, µs": "torch_us",
}
SIZES = ("in_channels", "out_channels", "size", "kernel", "batch")
MEANING = (
    "Speedups over float32 conv2d of torch, medians of turns. paper: the formula of XNOR-Net; machine: the same with this "
    "processor's own ratio of limits instead of 64; kernel: bits in, float32 out, machine code alone; call: the same as a call "
    "from Python; alpha: float32 in, float32 out, times alpha. of limit: share of the processor's limit, products with the "
    "padding counted (the kernel skips kernel rows that lie in it); inside: without them. best float: the fastest float "
    "library at hand."
)
WIDTHS = {
    "avx512": " Three instructions take in 512 signs, one takes in 16 floats: vectors serve floats as well as signs.",
    "avx2": " Two instructions take in 128 signs, one takes in 16 floats or 8: vectors serve floats as well as signs.",
    "portable": "",
}


def report(plan: Plan, result: "Result", command: Sequence[str]) -> None:
    """Show the rows and write them into outputs/bench."""
    rows, facts = result
    screen, folder = Screen("plain"), Path(plan.outputs) / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"conv-batch{plan.batch}-threads{plan.threads}" + (f"-{plan.path}" if plan.path else "")
    title = "Packed binary convolution"
    subtitle = f"{plan.threads} thread(s) of {facts['cpu']}, torch {facts['torch']}, batch {plan.batch}, {plan.n} turns"
    shown = [_shown(row) for row in rows]
    columns = [
        column
        for column in COLUMNS
        if column not in ("layout", "path", "image", "call", "kernel / best", "alpha / best")
    ]
    screen.table(f"{title}: {subtitle}", columns, [[row[COLUMNS[column]] for column in columns] for row in shown])
    screen.say(MEANING)
    story = sentences(rows, facts)
    for sentence in story:
        screen.say(sentence)
    write_atomic(folder / f"{stem}.csv", as_csv(rows).encode(), durable=False)
    record = {"command": command, "facts": facts, "story": story, "rows": [asdict(row) for row in rows]}
    write_json(folder / f"{stem}.json", record)
    path = _page(folder / f"{stem}.html", title, subtitle, rows, facts | {"command": shlex.join(command)}, story)
    screen.say(f"written: {path.resolve()}, and .csv and .json beside it")


def sentences(rows: Sequence["Row"], facts: dict[str, Any]) -> list[str]:
    """Why the measured height is what it is: every number comes from the rows."""
    ratio, quoted = facts["limit_ratio"], _row_at(rows, QUOTED[:4])
    found = [
        "The paper counts one operation on 64 signs as much as one product of floats. Without any memory, this processor does "
        f"{facts['sign_limit']:,.0f} GMAC/s (1e9 products a second) of signs, by exclusive or, count and add, and "
        f"{facts['float_limit']:,.0f} of float32, by multiplying and adding in one: {ratio:.1f} times as many, not 64."
        f"{WIDTHS[rows[0].path]}"
    ]
    if quoted is not None:
        found += [
            f"At {quoted.in_channels} channels and {quoted.kernel} x {quoted.kernel} the formula gives {quoted.paper:.2f}; with "
            f"{ratio:.1f} instead of 64 it gives {quoted.machine:.1f}. Measured: {quoted.kernel_speedup:.1f} for the kernel "
            f"alone, {quoted.call_speedup:.1f} as a call from Python, {quoted.alpha_speedup:.1f} from float32 to float32 with "
            f"alpha, {quoted.alpha_k_speedup:.1f} with alpha and K.",
            f"The kernel reaches {quoted.share_of_limit:.0%} of its limit, torch {quoted.torch_rate / facts['float_limit']:.0%} "
            f"of that of floats; so the ratio of the two need not be {ratio:.1f}. The fastest float library here, "
            f"{quoted.best_float}, takes {quoted.best_float_us / quoted.torch_us:.0%} of torch's time: over it the kernel is "
            f"{quoted.kernel_over_best:.1f} times as fast, and {quoted.alpha_over_best:.1f} times from float32 to float32.",
        ]
    channels = [row for row in rows if row.figure == "channels"]
    if quoted is not None and len(channels) > 2:
        few, many = channels[0], channels[-1]
        found.append(
            f"Few channels: a word holds 32, so that one costs as much as 32 (measured {few.kernel_speedup:.1f}, formula "
            f"{few.paper:.1f}; float32, too, is slow there). Many channels: at {many.in_channels} torch does "
            f"{many.torch_rate:.0f} GMAC/s, at {quoted.in_channels} {quoted.torch_rate:.0f}; where these differ, the ratio "
            f"({many.kernel_speedup:.1f}) tells as much about float32 as about the kernel."
        )
    return found


def _row_at(rows: Sequence["Row"], shape: tuple[int, ...]) -> "Row | None":
    """The row of the shape that the paper quotes; of several, one that was measured to be quoted."""
    like = rows[0].batch, rows[0].layout, rows[0].path
    found = [r for r in rows if (r.in_channels, r.out_channels, r.size, r.kernel) == shape]
    found = [r for r in found if (r.batch, r.layout, r.path) == like]
    return max(found, key=lambda row: row.figure == "quoted", default=None)


def _shown(row: "Row") -> dict[str, Any]:
    """Rounded for people."""
    rounded = {k: round(v, 1) if isinstance(v, float) else v for k, v in asdict(row).items()}
    where = f"{row.path} {row.layout}" if row.figure == "quoted" else row.figure
    return rounded | {
        "figure": where,
        "share_of_limit": f"{row.share_of_limit:.0%}",
        "share_inside": f"{row.share_inside:.0%}",
        "paper": round(row.paper, 2),
    }


def as_csv(rows: Sequence["Row"]) -> str:
    """Every column; five digits are more than a measurement has."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(asdict(rows[0]))
    for row in rows:
        writer.writerow([f"{value:.5g}" if isinstance(value, float) else value for value in asdict(row).values()])
    return lines.getvalue()


def _page(
    path: Path, title: str, subtitle: str, rows: Sequence["Row"], facts: dict[str, Any], story: Sequence[str]
) -> Path:
    charts = Charts()
    figures = [
        speedups(charts, "channels", "Speedup over channels, filter 3 x 3 (Fig. 4 b)", rows, "in_channels", facts),
        speedups(charts, "filter", "Speedup over filter size, 256 channels (Fig. 4 c)", rows, "kernel", facts),
        speedups(charts, "lenet5", "LeNet-5's second convolution, float32 to float32", rows, "kernel", facts),
    ]
    numeric = {
        heading
        for heading in COLUMNS
        if heading not in ("measured for", "layout", "path", "best float", "of limit", "inside")
    }
    measured = table(
        [
            Column(
                key,
                heading,
                numeric=heading in numeric,
                form="" if key in SIZES else ",.2f" if key == "paper" else ",.1f",
            )
            for heading, key in COLUMNS.items()
        ],
        [_shown(row) for row in rows],
        "All shapes",
        sortable=True,
        tall=True,
    )
    peers = facts.pop("peers", None)
    sections = [
        *(f"<p>{text(sentence)}</p>" for sentence in story),
        f'<div class="even">{"".join(figures)}</div>',
        f"<h2>Measured</h2><p>{text(MEANING)}</p>{measured}",
        _peers_table(peers) if peers else "",
        facts_table({key: f"{v:.4g}" if isinstance(v, float) else v for key, v in facts.items()}),
    ]
    return write_bench_page(path, title, subtitle, sections, charts)


def _peers_table(peers: Sequence[dict[str, Any]]) -> str:
    columns = [
        Column("name", "kernel", numeric=False), Column("shape", "shape", numeric=False),
        Column("rate", "1e9 products/s"), Column("ours_over_it", "this kernel / it"),
        Column("note", "note", numeric=False, wide=True),
    ]  # fmt: skip
    return f"<h2>Other packed kernels</h2>{table(columns, peers, 'Measured here, in turns with this kernel')}"
