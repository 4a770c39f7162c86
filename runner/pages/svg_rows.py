"""Charts as SVG with a name and a value in every row: bars of ratios, and dots with their intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from runner.pages.svg import LETTER, SHAPES, WIDTH, Scale, document, figure, heading

ROW = 42


@dataclass(frozen=True)
class Dot:
    """A row: its name, a value between two ends, and the three in words."""

    label: str
    value: float
    low: float
    high: float
    words: str


def dots(title: str, x_label: str, rows: Sequence[Dot], level: float) -> str:
    """A name over every dot, the value in words at the right end, whiskers, and a line at `level`."""
    height = 84 + ROW * len(rows)
    low, high = min(level, *(row.low for row in rows)), max(level, *(row.high for row in rows))
    room = 0.04 * (high - low or 1)
    x, foot = Scale(low - room, high + room, 24, WIDTH - 24), height - 48
    parts = [
        heading(title, 24),
        f'<path class="front" d="M{x(level):.1f} 30V{foot}"/>',
        f'<path class="axis" d="M{x.start} {foot}H{x.end}" fill="none"/>',
        f'<text class="quiet" x="{WIDTH / 2}" y="{height - 10}" text-anchor="middle">{escape(x_label)}</text>',
    ]
    for tick in x.ticks():
        parts.append(f'<path class="axis" d="M{x(tick):.1f} {foot}v5"/>')
        parts.append(
            f'<text class="quiet" x="{x(tick):.1f}" y="{foot + 19}" text-anchor="middle">{figure(tick)}</text>'
        )
    for index, row in enumerate(rows):
        y = 48 + ROW * index
        parts.append(f'<text class="label" x="24" y="{y}">{escape(row.label)}</text>')
        parts.append(f'<text class="label" x="{WIDTH - 24}" y="{y}" text-anchor="end">{escape(row.words)}</text>')
        parts.append(f'<path class="s0" stroke-width="2" d="M{x(row.low):.1f} {y + 14}H{x(row.high):.1f}"/>')
        parts.append(f'<path class="f0" transform="translate({x(row.value):.1f} {y + 14})" d="{SHAPES[0]}"/>')
    said = "; ".join(f"{row.label}: {row.words}" for row in rows)
    return document("\n".join(parts), height, f"{title}. {x_label}. {said}")


def bars(
    title: str, labels: Sequence[str], values: Sequence[float], ranges: Sequence[tuple[float, float] | None]
) -> str:
    """Horizontal bars from 0 with the value at the end of each, whiskers where there is a range, a line at 1."""
    left = min(300.0, 20 + LETTER * 1.15 * max(map(len, labels)))
    height = 50 + 24 * len(labels)
    reach = max([*values, 1.0, *(r[1] for r in ranges if r)])
    x = Scale(0, reach, left, WIDTH - 64)
    parts = [heading(title, 16)]
    for index, (label, value, spread) in enumerate(zip(labels, values, ranges, strict=True)):
        y = 36 + 24 * index
        parts.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(label)}</text>')
        parts.append(f'<rect class="f0" x="{left}" y="{y}" width="{x(value) - left:.1f}" height="18" opacity=".75"/>')
        if spread:
            parts.append(f'<path class="axis" d="M{x(spread[0]):.1f} {y + 9}H{x(spread[1]):.1f}" stroke-width="2"/>')
        after = x(max(value, spread[1] if spread else value)) + 6
        parts.append(f'<text x="{after:.1f}" y="{y + 13}">{figure(value)}</text>')
    parts.append(f'<path class="front" d="M{x(1):.1f} 30V{height - 10}"/>')
    said = "; ".join(f"{label}: {figure(value)}" for label, value in zip(labels, values, strict=True))
    return document("\n".join(parts), height, f"{title}. {said}")
