"""The charts of a run page and of a regime's timeline: which columns they show, and where time has got to.

A row of metrics.csv speaks of what an epoch ended with, so it stands where that epoch ended: epoch e at e + 1
epochs completed. A setting such as the learning rate held from the row before up to its own.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from runner.pages.charts import Panel, Series, add_curves, add_heat_map, keep_phases
from runner.pages.expected import expected_band
from runner.pages.figures import Axis, Sheet
from runner.pages.page import Column, number, plain, table, text
from runner.pages.records import Run

MOST_POINTS = 2_000
MOST_CELLS = 20_000
TIME_UNITS = ((7200.0, 3600.0, "h"), (120.0, 60.0, "min"), (0.0, 1.0, "s"))

PANELS = (
    Panel(
        "loss",
        "Loss",
        (
            Series("train_loss", "train", "train", "dashed", "square"),
            Series("val_loss", "val", "val", "solid", "circle"),
        ),
        size="major",
        phase_names="above",
    ),
    Panel(
        "accuracy",
        "Accuracy",
        (
            Series("train_top1", "train top-1", "train", "dashed", "square"),
            Series("val_top1", "val top-1", "val", "solid", "circle"),
            Series("val_top5", "val top-5", "extra", "dotted", "triangle"),
        ),
        "%",
        "major",
        phase_names="below",
    ),
    Panel("lr", "Learning rate", (Series("lr", "learning rate"),), step="before", from_zero=True),
    Panel("batch_size", "Batch size", (Series("batch_size", "batch size"),), "images", step="before", from_zero=True),
    Panel("input_size", "Input size", (Series("input_size", "input size"),), "px", step="before", from_zero=True),
    Panel("speed", "Speed", (Series("images_per_s", "images/s"),), "images/s", from_zero=True),
)
TIMELINE_PANELS = (
    Panel("lr", "Learning rate", (Series("lr", "learning rate"),), "", "major", "after", True, "above"),
    Panel("momentum", "Momentum", (Series("momentum", "momentum"),), "", "minor", "after", True),
    Panel("weight_decay", "Weight decay", (Series("weight_decay", "weight decay"),), "", "minor", "after", True),
    Panel("batch_size", "Batch size", (Series("batch_size", "batch size"),), "images", "minor", "after", True),
    Panel("input_size", "Input size", (Series("input_size", "input size"),), "px", "minor", "after", True),
)
HEALTH = {
    "clip_ratio": "Clipped values (share)",
    "step_size": "Step size",
    "flip_rate": "Flipped codes (share)",
    "code_entropy": "Code entropy (bits)",
    "grad_norm": "Gradient norm",
    "near_threshold": "Near a rounding threshold (share)",
}


def curve_section(run: Run) -> tuple[str, Sheet]:
    """The curves of a run as HTML, and the sheet that describes their figures."""
    points, axes = _positions(run.metrics, run.timing)
    sheet = Sheet(axes)
    if points.empty:
        why = "The run is over, but none of its epochs can be read" if run.state == "done" else "No epoch has ended yet"
        return f"<h2>Curves</h2><p>{why}.</p>", sheet
    keep_phases(sheet, _phases(points, axes))
    sheet.keep("points", _with_start(_thinned(points), axes).assign(x=lambda shown: shown["x_epoch"]))
    best, band = {"accuracy": _best_point(points)}, {"accuracy": expected_band(run.expected, points)}
    panels, constant = _worth_drawing(PANELS, points)
    charts = [
        add_curves(sheet, panel, _in_words(panel, points), best.get(panel.key), band.get(panel.key)) for panel in panels
    ]
    return f'<h2>Curves</h2>{_controls(axes)}<div class="panels">{"".join(charts)}</div>{constant}', sheet


def timeline_section(rows: pd.DataFrame, end: Mapping[str, float]) -> tuple[str, Sheet]:
    """The curves of a regime as HTML, and the sheet that describes their figures; rows say what holds from there on."""
    driven = [key for key in map(str, rows.columns) if key.startswith("quant.")]
    every = (*TIMELINE_PANELS, *(_driven(key) for key in driven))
    columns = ["epoch", "step", *(panel.series[0].column for panel in every)]
    points = rows.reindex(columns=columns).apply(pd.to_numeric, errors="coerce")
    points["phase"] = rows["phase"].astype(str) if "phase" in rows else ""
    points = _with_drops(_with_end(points, end))
    names = [name for name in ("epoch", "step") if len(points) and points[name].notna().all()]
    axes = {name: Axis(name, float(points[name].max())) for name in names}
    points = points.assign(**{f"x_{name}": points[name] for name in names})
    sheet = Sheet(axes)
    if not axes:
        return "<p>There is no point to draw.</p>", sheet
    shown = _thinned(points)
    keep_phases(sheet, _phases_from(points, axes))
    sheet.keep("points", shown.assign(x=shown[f"x_{names[0]}"]))
    panels, constant = _worth_drawing(every, points)
    charts = [add_curves(sheet, panel, _in_words(panel, points)) for panel in panels]
    return f'{_controls(axes)}<div class="even">{"".join(charts)}</div>{constant}', sheet


def _driven(key: str) -> Panel:
    """The chart of a setting of the quantizer that the regime drives, such as `quant.sharpness`."""
    return Panel(key.replace(".", "_"), key, (Series(key, key),), "", "minor", "after", True)


def _worth_drawing(panels: Sequence[Panel], points: pd.DataFrame) -> tuple[list[Panel], str]:
    """The panels that have something to draw, and a sentence with the settings that never change."""
    drawn, said = [], []
    for panel in panels:
        found = set(points[[series.column for series in panel.series]].to_numpy(dtype=float).ravel())
        values = {value for value in found if math.isfinite(value)}
        if panel.step and panel.size == "minor" and len(found) == len(values) == 1:
            said.append(f"{panel.title.lower()} <b>{text(plain(*values))} {panel.unit}</b>".replace(" </b>", "</b>"))
        elif values:
            drawn.append(panel)
    return drawn, f'<p class="constant">The same throughout: {", ".join(said)}.</p>' if said else ""


def _with_end(points: pd.DataFrame, end: Mapping[str, float]) -> pd.DataFrame:
    """The points and one more at the end, up to which the last one holds."""
    return pd.concat([points, points.iloc[[-1]].assign(**end)], ignore_index=True) if len(points) else points


def _with_drops(points: pd.DataFrame) -> pd.DataFrame:
    """The points, and before each at which a setting is no more one that says up to where it held."""
    known = points.drop(columns=["epoch", "step", "phase"]).notna()
    gone = (known & ~known.shift(-1, fill_value=True)).any(axis=1)
    held = points[gone].assign(**{name: points[name].shift(-1)[gone] for name in ("epoch", "step")})
    return pd.concat([points, held]).sort_index(kind="stable").reset_index(drop=True)


def health_section(run: Run, sheet: Sheet) -> str:
    """Maps of quantizer health, layer x time, one to look at and the others to choose; empty where there is none."""
    kinds = [kind for kind in HEALTH if run.quant[kind].notna().any()]
    points, axes = _positions(run.metrics, run.timing)
    cells = run.quant.merge(_spans(points, axes), on="epoch") if kinds and len(points) else pd.DataFrame()
    if cells.empty:
        return ""
    layers = list(dict.fromkeys(run.quant["layer"]))
    labels = short_labels(layers)
    step = math.ceil(len(cells) / MOST_CELLS)
    cells = cells[(cells["epoch"] % step == 0) | (cells["epoch"] == cells["epoch"].max())]
    cells = cells.assign(row=cells["layer"].map(labels), left=cells["left_epoch"], right=cells["right_epoch"])
    sheet.keep("health", cells)
    maps = "".join(
        add_heat_map(sheet, kind, HEALTH[kind], list(labels.values()), hidden=index > 0)
        for index, kind in enumerate(kinds)
    )
    options = "".join(f'<option value="plot-health-{kind}">{text(HEALTH[kind])}</option>' for kind in kinds)
    choice = f'<p class="choice"><label>Show <select data-figures>{options}</select></label></p>'
    return f'<h2>Quantizer health</h2>{choice}<div class="heat">{maps}</div>'


def last_health(run: Run) -> str:
    """The figures of the last epoch as a table; empty where there is none."""
    kinds = [kind for kind in HEALTH if run.quant[kind].notna().any()]
    if not kinds:
        return ""
    last = run.quant[run.quant["epoch"] == run.quant["epoch"].max()]
    columns = [Column("layer", "layer", numeric=False), *(Column(kind, HEALTH[kind]) for kind in kinds)]
    rows = [{str(key): value for key, value in row.items()} for row in last.to_dict("records")]
    caption = f"Quantizer health after epoch {plain(last['epoch'].max())}; all epochs are in quant.csv"
    numbers = table(columns, rows, caption, sortable=True, tall=True)
    return f"<details><summary>The last epoch as a table</summary>{numbers}</details>"


def _positions(metrics: pd.DataFrame, timing: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, Axis]]:
    """Metrics beside timing, with x_<axis> for every axis that is known for all rows."""
    beside = timing.drop(columns="step").drop_duplicates("epoch", keep="last")
    points = metrics.dropna(subset=["epoch"]).merge(beside, on="epoch", how="left")
    if points.empty:
        return points, {}
    spent = (points["seconds"] + points["eval_seconds"].fillna(0)).cumsum()
    total = number(spent.iloc[-1]) or 0.0
    _, unit, symbol = next(entry for entry in TIME_UNITS if total >= entry[0])
    places = {
        "epoch": ("epochs completed", points["epoch"] + 1),
        "step": ("optimizer steps", points["step"]),
        "time": (f"time spent ({symbol})", spent / unit),
    }
    axes = {}
    for name, (label, position) in places.items():
        if position.notna().all():
            points[f"x_{name}"] = position
            axes[name] = Axis(label, float(position.max()))
    return points, axes


def _with_start(points: pd.DataFrame, axes: dict[str, Axis]) -> pd.DataFrame:
    """The points after one at zero, from which the settings of the first row held."""
    start = points.iloc[:1].copy()
    measured = [series.column for panel in PANELS if panel.step is None for series in panel.series]
    start[measured] = np.nan
    start[[f"x_{name}" for name in axes]] = 0.0
    return pd.concat([start, points], ignore_index=True)


def _spans(points: pd.DataFrame, axes: dict[str, Axis]) -> pd.DataFrame:
    """From where to where each epoch reached, on every axis."""
    spans = points[["epoch"]].copy()
    for name in axes:
        spans[f"left_{name}"] = points[f"x_{name}"].shift(fill_value=0.0)
        spans[f"right_{name}"] = points[f"x_{name}"]
    return spans


def _phases(points: pd.DataFrame, axes: dict[str, Axis]) -> pd.DataFrame:
    """One row a phase, in order, with its borders on every axis."""
    if points.empty:
        return pd.DataFrame()
    spans = _spans(points, axes).assign(phase=points["phase"])
    return _merged_phases(spans, axes)


def _phases_from(points: pd.DataFrame, axes: dict[str, Axis]) -> pd.DataFrame:
    spans = points[["phase"]].copy()
    for name in axes:
        spans[f"left_{name}"] = points[f"x_{name}"]
        spans[f"right_{name}"] = points[f"x_{name}"].shift(-1).fillna(axes[name].end)
    return _merged_phases(spans, axes)


def _merged_phases(spans: pd.DataFrame, axes: dict[str, Axis]) -> pd.DataFrame:
    runs = spans.groupby((spans["phase"] != spans["phase"].shift()).cumsum())
    merged = runs[["phase"]].first()
    for name in axes:
        merged[f"left_{name}"] = runs[f"left_{name}"].first()
        merged[f"right_{name}"] = runs[f"right_{name}"].last()
    first = next(iter(axes), None)
    if first is None:
        return merged.iloc[:0]
    left, right = merged[f"left_{first}"], merged[f"right_{first}"]
    return merged.assign(left=left, right=right, label=_phase_labels(merged["phase"], (right - left) / right.max()))


def _phase_labels(phases: "pd.Series[str]", shares: "pd.Series[float]") -> list[str]:
    """What stands beside each phase: its number, or its name where the phase is wide enough for one."""
    widest = int(np.argmax(shares)) if len(shares) else 0
    labels = [f"phase {phase}" if index == widest else phase[:16] for index, phase in enumerate(phases)]
    return [label if share >= 0.011 * len(label) else "" for label, share in zip(labels, shares, strict=True)]


def _best_point(points: pd.DataFrame) -> pd.DataFrame | None:
    if not points["val_top1"].notna().any():
        return None
    best = points.loc[[points["val_top1"].idxmax()]]
    places = best[[column for column in best if str(column).startswith("x_")]]
    return places.assign(x=best["x_epoch"], y=best["val_top1"])


def _thinned(points: pd.DataFrame) -> pd.DataFrame:
    chosen = np.unique(np.linspace(0, len(points) - 1, min(len(points), MOST_POINTS)).astype(int))
    return points.iloc[chosen]


def _in_words(panel: Panel, points: pd.DataFrame) -> str:
    """What a chart shows, for those who cannot see it."""
    parts = []
    for series in panel.series:
        known = points[series.column].dropna()
        if len(known):
            parts.append(f"{series.label} from {plain(float(known.iloc[0]))} to {plain(float(known.iloc[-1]))}")
    return f"Chart of {panel.heading} over {len(points)} points: {', '.join(parts)}. All values are in the table."


def _controls(axes: dict[str, Any]) -> str:
    """The choice of the x axis and the zoom, as ordinary form elements."""
    names = {"epoch": "epoch", "step": "step", "time": "time"}
    choices = "".join(
        f'<label><input type="radio" name="axis" value="{name}"{" checked" if index == 0 else ""}>{names[name]}</label>'
        for index, name in enumerate(axes)
    )
    return (
        f'<div class="controls"><fieldset><legend>Horizontal axis</legend>{choices}</fieldset>{zoom_buttons()}'
        '<span class="small quiet mouse">Drag to zoom, double-click to see everything; '
        "with a chart in focus, keys + - ← → Esc.</span></div>"
    )


def zoom_buttons() -> str:
    """Buttons that move the x axis of all charts, for those who do not drag."""
    moves = (("closer", "+"), ("wider", "−"), ("earlier", "‹"), ("later", "›"), ("reset", "Reset"))  # noqa: RUF001
    labels = {"closer": "Zoom in", "wider": "Zoom out", "earlier": "Move earlier", "later": "Move later"}
    buttons = "".join(
        f'<button type="button" data-move="{move}" aria-label="{labels.get(move, "Show everything")}">{sign}</button>'
        for move, sign in moves
    )
    return f'<div class="buttons" role="group" aria-label="Zoom all charts">{buttons}</div>'


def short_labels(names: Sequence[str], longest: int = 21) -> dict[str, str]:
    """Names cut to what fits beside a chart, still different from each other.

    >>> short_labels(["conv1", "features.denseblock1.conv1", "features.denseblock2.conv1"], 12)
    {'conv1': 'conv1', 'features.denseblock1.conv1': '…lock1.conv1', 'features.denseblock2.conv1': '…lock2.conv1'}
    """
    labels: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        label = base = name if len(name) <= longest else "…" + name[len(name) - longest + 1 :]
        copies = 1
        while label in taken:
            copies += 1
            label = f"{base} ({copies})"
        labels[name] = label
        taken.add(label)
    return labels
