"""What runs of a recipe reach epoch by epoch, and the band that a page draws of it: is this run right, at its second epoch?"""

import csv
import io
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from runner.columns import EXPECTED
from runner.faults import ConfigError, Fault
from runner.pages.records import read_run
from runner.pages.results import Row, groups_of
from runner.statistics import prediction

if TYPE_CHECKING:
    import pandas as pd

    from runner.pages.charts import Band


def expected_curve(rows: Sequence[Row]) -> str:
    """The course of validation accuracy over runs that differ in their seed, as CSV.

    `low` and `high`: where one more run falls with 95 % probability; how far runs lie apart is known from an epoch and the two
    beside it. Raises ConfigError for runs of several configurations, for a single run, and for rows without their folders.
    """
    groups = groups_of(rows)
    if len(groups) > 1:
        labels = "; ".join(f"{group.network} {group.dataset} {group.label}, {group.epochs} epochs" for group in groups)
        raise ConfigError([Fault("--format", f"curve takes runs of one configuration, not {labels}")])
    courses = [read_run(row["folder"]).metrics["val_top1"].dropna().tolist() for row in rows if "folder" in row]
    if len(courses) < 2:
        raise ConfigError(
            [Fault("--format", "curve takes the folders of at least two runs: they say how far seeds lie apart")]
        )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(EXPECTED)
    epochs = list(zip(*courses, strict=False))
    for epoch, values in enumerate(epochs):
        low, high = prediction(values, [*epochs[max(epoch - 1, 0) : epoch], *epochs[epoch + 1 : epoch + 2]])
        ends = (fmean(values), max(low, 0.0), min(high, 100.0))
        writer.writerow([epoch, *(f"{end:.3f}" for end in ends), len(values)])
    return text.getvalue()


def expected_band(expected: "pd.DataFrame", points: "pd.DataFrame") -> "Band | None":
    """The band behind the accuracy of a run, as far as it has come and the recipe knows; None where it knows nothing."""
    from runner.pages.charts import Band

    places = [column for column in points if str(column).startswith("x_")]
    known = points[["epoch", *places]].merge(expected[["epoch", "low", "high", "n"]].dropna(), on="epoch")
    if known.empty:
        return None
    label = f"val top-1 of the recipe, n = {known['n'].min():.0f}"
    return Band(known.assign(x=known["x_epoch"]), label, "val")
