"""The charts of a comparison: empty figures that compare.js fills, because what they show depends on filters and colours."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from bokeh.models import BasicTicker, ColumnDataSource, DataRange1d, FixedTicker, HoverTool
from bokeh.plotting import figure

from runner.pages.entries import COSTS, Cost, Costs
from runner.pages.figures import Sheet, amounts, set_type

# Bokeh fills in values, not names: what is called differently from case to case has its name in its value.
LINE_TIP = [("", "@label"), ("n", "@n"), ("", "@{axis}: $snap_x{0,0.[00]}"), ("mean", "$snap_y{%.6g}")]
POINT_TIP = [("", "@label"), ("n", "@n"), ("", "@{goal}: @{shown_y}"), ("", "@{cost}: @{shown_x}")]


def curve_chart(sheet: Sheet) -> str:
    """Mean curves with bands over seeds."""
    plot = sheet.plot(DataRange1d(), logarithmic=False)
    plot.xaxis.axis_label = "epochs completed"
    empty: dict[str, Any] = {"xs": [], "ys": [], "colour": [], "alpha": []}
    bands = ColumnDataSource(dict(empty), name="bands")
    plot.patches("xs", "ys", source=bands, fill_color="colour", fill_alpha="alpha", line_alpha=0)
    lines = ColumnDataSource(empty | {key: [] for key in ("dash", "label", "n", "axis")}, name="lines")
    drawn = plot.multi_line(
        "xs", "ys", source=lines, line_color="colour", line_dash="dash", line_alpha="alpha", line_width=2.2
    )
    marks = ColumnDataSource({key: [] for key in ("x", "y", "colour", "marker", "size", "alpha")}, name="marks")
    plot.scatter("x", "y", source=marks, color="colour", marker="marker", alpha="alpha", size="size")
    plot.add_tools(
        HoverTool(
            renderers=[drawn], tooltips=LINE_TIP, line_policy="nearest", formatters={"$snap_y": "printf"},
            mode="mouse", point_policy="follow_mouse",
        )
    )  # fmt: skip
    return sheet.host(plot, "curves", "Curves", "major", "Curves of every configuration.")


def cost_charts(sheet: Sheet, costs: Iterable[Costs]) -> list[str]:
    """Accuracy against every cost; compare.js hides those that are unknown, or the same for all."""
    costs = list(costs)
    return [
        _cost_chart(sheet, key, cost, np.array([found for one in costs if (found := one[key]) is not None]))
        for key, cost in COSTS.items()
    ]


def _cost_chart(sheet: Sheet, key: str, cost: Cost, known: "np.ndarray[Any, Any]") -> str:
    logarithmic = bool(known.size and known.min() > 0 and known.max() / known.min() > 8)
    plot = figure(
        x_range=DataRange1d(range_padding=0.12), y_range=DataRange1d(range_padding=0.15),
        x_axis_type="log" if logarithmic else "auto", sizing_mode="stretch_both", toolbar_location=None, tools="",
        min_border_left=62, min_border_right=14, background_fill_alpha=0, border_fill_alpha=0, outline_line_alpha=0,
    )  # fmt: skip
    set_type(plot)
    plot.yaxis.name = "reached"
    plot.xaxis.axis_label = f"{cost.unit}, logarithmic" if logarithmic else cost.unit
    plot.xaxis.formatter = amounts()
    plot.xaxis.ticker = plot.xgrid.ticker = (
        FixedTicker(ticks=[], name=f"ticks-{key}") if logarithmic else BasicTicker(desired_num_ticks=3)
    )
    front = ColumnDataSource({"x": [], "y": []}, name=f"front-{key}")
    plot.step("x", "y", source=front, mode="after", line_width=1.5, line_dash="dotted").tags = ["quiet"]
    columns = "x y low high colour marker size alpha label n shown_x shown_y cost goal".split()
    unseen = {"x": 1, "y": 0, "low": 0, "high": 0, "colour": "black", "marker": "circle", "alpha": 0, "size": 1}
    rows: dict[str, Any] = {
        column: [unseen.get(column, "")] for column in columns
    }  # a chart of nothing would have no ranges
    points = ColumnDataSource(rows, name=f"points-{key}")
    plot.segment("x", "low", "x", "high", source=points, line_color="colour", line_alpha="alpha", line_width=1.5)
    drawn = plot.scatter("x", "y", source=points, color="colour", marker="marker", alpha="alpha", size="size")
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=POINT_TIP))
    return sheet.host(plot, f"cost-{key}", cost.title, "even-part", f"Accuracy against {cost.title}.")
