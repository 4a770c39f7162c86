"""Charts as SVG, written without a browser: for papers, reports and pictures in a README.

Letters are text, lines are paths, colours are those of page.css, and follow the reader's light or dark scheme where the
picture is shown by a browser. What stands on an axis, what a series is called, is escaped.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 640, 380
LEFT, RIGHT, BOTTOM = 70, 18, 48
LETTER = 6.7  # the mean width of a letter of the 12 px type, where the reader has a wide one
LINE = 18
CROWD = 100  # names that find a place, and a reader
DASHES = ("", "7 3", "2 3", "9 3 2 3", "14 4", "4 2 1 2")
SHAPES = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z", "M-4 -4h8v8h-8z", "M0 -5l5 9h-10z", "M0 -5.5l5 5.5l-5 5.5l-5 -5.5z",
    "M0 5l5 -9h-10z", "M-1.5 -5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5v-3h3.5z",
)  # fmt: skip
LIGHT = ("#0065a3", "#c04f00", "#00785a", "#a23b7e", "#8a6d00", "#1f8fc4", "#3d4654", "#7a3b12")
DARK = ("#62bdf0", "#f39a4a", "#35c79f", "#e58bc4", "#e3c64a", "#9db4ff", "#c3cad4", "#d19a80")
STYLE = (
    "text{font:12px system-ui,-apple-system,'Segoe UI',Roboto,'Liberation Sans',Arial,sans-serif;fill:#16191d;"
    "font-variant-numeric:tabular-nums}.label{paint-order:stroke;stroke:#fff;stroke-width:3px}.title{font-size:14px;font-weight:600}.quiet{fill:#555d68}.axis{stroke:#8a929d}"
    ".grid{stroke:#e6e9ed}.ground{fill:#fff}.front{stroke:#555d68;stroke-dasharray:2 3;fill:none;stroke-width:1.5}"
)
STYLE_DARK = (
    "text{fill:#e9ecf0}.label{stroke:#181c22}.quiet{fill:#a3acb8}.axis{stroke:#707a87}.grid{stroke:#272e37}"
    ".ground{fill:#181c22}.front{stroke:#a3acb8}"
)


@dataclass(frozen=True)
class Series:
    """One curve or one set of points: `low` and `high` make a band around a curve, whiskers at points."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    lines: bool = True


@dataclass(frozen=True)
class Scale:
    """From values to pixels."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.logarithmic else (self.low, self.high)
        at = math.log10(value) if self.logarithmic else value
        return self.start + (at - low) / (high - low or 1) * (self.end - self.start)

    def ticks(self, most: int = 7) -> list[float]:
        """Round values along it."""
        if not self.logarithmic:
            return round_values(self.low, self.high, most)
        return round_powers(self.low, self.high, most, ((1, 2, 5), (1,)))


@dataclass
class Chart:
    """Axes with series on them, drawn by `svg`."""

    title: str
    x_label: str
    y_label: str
    series: list[Series] = field(default_factory=list)
    logarithmic: str = ""  # the axes that are: x, y, xy
    front: Sequence[tuple[float, float]] = ()  # a line of steps behind the points
    from_zero: bool = False
    level: float | None = None  # a line across
    counted: bool = False  # the x axis has whole numbers

    def svg(self) -> str:
        """The picture. A chart of points carries its labels at the points, one of curves a legend."""
        points = all(not series.lines for series in self.series)
        legend = [] if points else _legend_lines([series.label for series in self.series])
        top = 34 + LINE * len(legend)
        height = HEIGHT + LINE * max(len(legend) - 1, 0)
        x, y = self._scales(top, height - BOTTOM)
        parts = [
            heading(self.title, LEFT - 46),
            *_legend(legend),
            *self._axes(x, y, height),
        ]
        if self.level is not None:
            parts.append(f'<path class="front" d="M{x.start} {y(self.level):.1f}H{x.end}"/>')
        if self.front:
            parts.append(f'<path class="front" d="{_steps([(x(a), y(b)) for a, b in self.front])}"/>')
        for index, series in enumerate(self.series):
            parts += _drawn(series, index, x, y)
        if points:
            parts += _labels(self.series, self.front, x, y)
        return document("\n".join(parts), height, self._in_words())

    def _scales(self, top: float, bottom: float) -> tuple[Scale, Scale]:
        xs = [value for series in self.series for value in series.x]
        ys = [v for series in self.series for values in (series.y, series.low, series.high) for v in values]
        ys += [] if self.level is None else [self.level]
        low, high = (min(xs), max(xs)) if xs else (0.0, 1.0)
        points = any(not series.lines for series in self.series)  # with names beside them
        if "x" in self.logarithmic:
            low, high = _wider(low, high, 0.06, 0.2 if points else 0.06)
        elif points:
            low, high = low - 0.06 * (high - low or 1), high + 0.16 * (high - low or 1)
        x = Scale(low, high, LEFT, WIDTH - RIGHT, "x" in self.logarithmic)
        bottom_y, top_y = (min(ys), max(ys)) if ys else (0.0, 1.0)
        if "y" in self.logarithmic:
            return x, Scale(*_wider(bottom_y, top_y, 0.06, 0.06), bottom, top, logarithmic=True)
        room = 0.06 * (top_y - bottom_y or abs(top_y) or 1)
        return x, Scale(0.0 if self.from_zero else bottom_y - room, top_y + room, bottom, top)

    def _axes(self, x: Scale, y: Scale, height: float) -> Iterable[str]:
        for tick in y.ticks(6):
            yield f'<path class="grid" d="M{x.start} {y(tick):.1f}H{x.end}"/>'
            yield f'<text class="quiet" x="{x.start - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{figure(tick)}</text>'
        yield f'<path class="axis" d="M{x.start} {y.start}H{x.end}" fill="none"/>'
        for tick in (tick for tick in x.ticks() if tick == int(tick) or not self.counted):
            yield f'<path class="axis" d="M{x(tick):.1f} {y.start}v5"/>'
            yield f'<text class="quiet" x="{x(tick):.1f}" y="{y.start + 19}" text-anchor="middle">{figure(tick)}</text>'
        middle = (x.start + x.end) / 2
        yield f'<text class="quiet" x="{middle}" y="{height - 10}" text-anchor="middle">{escape(self.x_label)}</text>'
        middle = (y.start + y.end) / 2
        place = f'x="15" y="{middle}" transform="rotate(-90 15 {middle})" text-anchor="middle"'
        yield f'<text class="quiet" {place}>{escape(self.y_label)}</text>'

    def _in_words(self) -> str:
        known = [s for s in self.series if len(s.x)]
        told = _named(known, self.front)
        said = "; ".join(f"{s.label}: {figure(s.x[-1])}, {figure(s.y[-1])}" for s in told)
        others = f"; and {len(known) - len(told)} more" if len(told) < len(known) else ""
        return f"{self.title}. {self.y_label} over {self.x_label}. {said}{others}"


def heading(title: str, left: float) -> str:
    """The title of a picture, bold, in smaller letters where it would not fit."""
    size = 14 * min(1.0, (WIDTH - left - 16) / (LETTER * 1.35 * max(len(title), 1)))
    smaller = f' style="font-size:{size:.1f}px"' if size < 14 else ""
    return f'<text class="title" x="{left:g}" y="20"{smaller}>{escape(title)}</text>'


def _wider(low: float, high: float, before: float, after: float) -> tuple[float, float]:
    """The ends of a logarithmic axis, with room for marks: shares of its length, and a little where it has none."""
    return low / (high / low) ** before / 1.05, high * (high / low) ** after * 1.05


def figure(value: float) -> str:
    """A number as short as it can stand on an axis.

    >>> figure(1200), figure(0.25), figure(3e6), figure(99.30000001)
    ('1,200', '0.25', '3M', '99.3')
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def round_values(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between two values.

    >>> round_values(0, 10, 6)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    rough = (high - low or 1) / max(most - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def round_powers(low: float, high: float, most: int, choices: Sequence[Sequence[int]]) -> list[float]:
    """Powers of ten times the first `choices` of factors that are no more than `most` between two values; else some of the last.

    >>> round_powers(0.001, 0.05, 6, [(1, 2, 5), (1,)])
    [0.001, 0.002, 0.005, 0.01, 0.02, 0.05]
    """
    exponents = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    for factors in choices:
        found = [float(f"{factor}e{exponent}") for exponent in exponents for factor in factors]
        found = [value for value in found if low * 0.999 <= value <= high * 1.001]
        if len(found) <= most:
            return found
    return found[:: math.ceil(len(found) / most)]


def _drawn(series: Series, index: int, x: Scale, y: Scale) -> Iterable[str]:
    places = [(x(a), y(b)) for a, b in zip(series.x, series.y, strict=True)]
    colour, shape = index % len(LIGHT), SHAPES[index % len(SHAPES)]
    if series.lines:
        if len(series.low) == len(series.x) > 1:
            edge = [*zip(series.x, series.high, strict=True), *reversed([*zip(series.x, series.low, strict=True)])]
            outline = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in edge)
            yield f'<path class="f{colour}" opacity=".14" d="M{outline}z"/>'
        line = "L".join(f"{a:.1f} {b:.1f}" for a, b in places)
        dash = f' stroke-dasharray="{DASHES[index % len(DASHES)]}"' if DASHES[index % len(DASHES)] else ""
        yield f'<path class="s{colour}" fill="none" stroke-width="2"{dash} d="M{line}"/>'
    else:
        for a, low, high in zip(series.x, series.low, series.high, strict=False):
            yield f'<path class="s{colour}" stroke-width="1.5" d="M{x(a):.1f} {y(low):.1f}V{y(high):.1f}"/>'
    for a, b in places[:: max(1, math.ceil(len(places) / 10))]:
        yield f'<path class="f{colour}" transform="translate({a:.1f} {b:.1f})" d="{shape}"/>'


def _named(series: Sequence[Series], front: Sequence[tuple[float, float]]) -> Sequence[Series]:
    """Those whose names somebody may want to read: in a great crowd the ones on the front."""
    return series if len(series) <= CROWD else [one for one in series if (one.x[0], one.y[0]) in front]


def _labels(series: Sequence[Series], front: Sequence[tuple[float, float]], x: Scale, y: Scale) -> Iterable[str]:
    """Names beside points: to the right, left, above or below, wherever nothing else is written yet; none in a crowd."""
    taken = [(x(a) - 6, y(b) - 6, x(a) + 6, y(b) + 6) for s in series for a, b in zip(s.x, s.y, strict=True)]
    taken += [(x(s.x[0]) - 2, y(s.high[0]), x(s.x[0]) + 2, y(s.low[0])) for s in series if len(s.high) and len(s.low)]
    taken += [(x(a), y(b) - 1, x(c), y(b) + 1) for (a, b), (c, _) in pairwise(front)]
    for one in _named(series, front):
        width = LETTER * len(one.label)
        a, b = x(one.x[0]), y(one.y[0])
        rows = [0, -13, 13, -26, 26, -39, 39, -52, 52]
        spots = [(a + 9 if right else a - 9 - width, b + row) for row in rows for right in (True, False)]
        inside = [s for s in spots if s[0] >= LEFT and s[0] + width <= WIDTH - 4 and y.end + 6 <= s[1] <= y.start - 6]
        free = [s for s in inside if not any(_overlap((s[0], s[1] - 6, s[0] + width, s[1] + 6), box) for box in taken)]
        if not free:
            continue
        left, middle = free[0]
        taken.append((left, middle - 6, left + width, middle + 6))
        # The true width is the font's: the end that is beside the point stays there.
        place = f'x="{left:.1f}"' if left > a else f'x="{left + width:.1f}" text-anchor="end"'
        yield f'<text class="label" {place} y="{middle + 4:.1f}">{escape(one.label)}</text>'


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _legend_lines(labels: Sequence[str]) -> list[list[tuple[int, float, str]]]:
    """Number, place and text of every entry, line by line."""
    lines: list[list[tuple[int, float, str]]] = [[]]
    at = LEFT - 46.0
    for index, label in enumerate(labels):
        width = 52 + LETTER * len(label)
        if lines[-1] and at + width > WIDTH - RIGHT:
            lines.append([])
            at = LEFT - 46.0
        lines[-1].append((index, at, label))
        at += width
    return lines


def _legend(lines: Sequence[Sequence[tuple[int, float, str]]]) -> Iterable[str]:
    for row, line in enumerate(lines):
        for index, at, label in line:
            y, colour = 38 + LINE * row, index % len(LIGHT)
            dash = f' stroke-dasharray="{DASHES[index % len(DASHES)]}"' if DASHES[index % len(DASHES)] else ""
            yield f'<path class="s{colour}" stroke-width="2"{dash} d="M{at} {y}h28"/>'
            yield f'<path class="f{colour}" transform="translate({at + 14} {y})" d="{SHAPES[index % len(SHAPES)]}"/>'
            yield f'<text x="{at + 34}" y="{y + 4}">{escape(label)}</text>'


def _steps(places: Sequence[tuple[float, float]]) -> str:
    first, *rest = places
    return f"M{first[0]:.1f} {first[1]:.1f}" + "".join(f"H{a:.1f}V{b:.1f}" for a, b in rest)


def document(body: str, height: float, words: str) -> str:
    """The whole picture, with `words` for those who do not see it."""
    light = "".join(f".s{i}{{stroke:{c}}}.f{i}{{fill:{c}}}" for i, c in enumerate(LIGHT))
    dark = "".join(f".s{i}{{stroke:{c}}}.f{i}{{fill:{c}}}" for i, c in enumerate(DARK))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img"><title>{escape(words)}</title><style>{STYLE}{light}'
        f"@media (prefers-color-scheme: dark){{{STYLE_DARK}{dark}}}</style>"
        f'<rect class="ground" width="{WIDTH}" height="{height}" rx="8"/>\n{body}\n</svg>\n'
    )
