"""The shell of every page the runner writes: one self-contained HTML file that works without a network.

Whatever comes from a run (names, labels, config values) is data and passes through `text`. Behind that stands
a content security policy: a page may run the scripts it was written with, known by their hashes, and
may fetch nothing, so that a string that slipped through could neither run nor call home.
"""

import base64
import hashlib
import html
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from runner.faults import StorageError
from runner.files import write_atomic

NOTHING = "—"


def text(value: object) -> str:
    """Any value as HTML that shows it and does nothing else.

    >>> text('<img src=x onerror="alert(1)">')
    '&lt;img src=x onerror=&quot;alert(1)&quot;&gt;'
    """
    return html.escape(str(value), quote=True)


def number(value: object) -> float | None:
    """A finite number, or None for everything else (a flag is not a number)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def plain(value: object) -> str:
    """A number as a person would write it, everything else as its text.

    >>> plain(0.1), plain(25000.0), plain(3e-05), plain(float("nan"))
    ('0.1', '25,000', '3e-05', '')
    """
    figure = number(value)
    if figure is None:
        return "" if value is None or isinstance(value, float) else str(value)
    return f"{figure:,.0f}" if figure.is_integer() and abs(figure) < 1e15 else f"{figure:.6g}"


def amount(value: object, unit: str = "") -> tuple[str, str]:
    """A count with a decimal prefix, figure and unit apart: 1,234,567 becomes ('1.23', 'M')."""
    figure = number(value)
    if figure is None:
        return NOTHING, ""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(figure) >= size:
            scaled = figure / (1e3 if prefix == "k" else size)
            return f"{scaled:.3g}" if abs(scaled) < 1e3 else f"{scaled:,.0f}", f"{prefix} {unit}".rstrip()
    return f"{figure:,.0f}" if figure.is_integer() or abs(figure) >= 1e3 else f"{figure:.3g}", unit


def size(value: object) -> tuple[str, str]:
    """Bytes in binary units, figure and unit apart.

    >>> size(1536), size(900), size(None)
    (('1.5', 'KiB'), ('900', 'B'), ('—', ''))
    """
    figure = number(value)
    if figure is None:
        return NOTHING, ""
    power = min(int(math.log2(figure)) // 10, 4) if figure >= 1 else 0
    scaled = figure / 1024**power
    return f"{scaled:,.0f}" if scaled >= 100 else f"{scaled:.3g}", ("B", "KiB", "MiB", "GiB", "TiB")[power]


def duration(value: object) -> tuple[str, str]:
    """Seconds in the unit a person would choose, figure and unit apart.

    >>> duration(42.0), duration(5400), duration(0.25)
    (('42', 's'), ('1 h 30', 'min'), ('0.25', 's'))
    """
    figure = number(value)
    if figure is None:
        return NOTHING, ""
    if figure < 120:
        return f"{figure:.3g}", "s"
    minutes = round(figure / 60)
    if minutes < 120:
        return (f"{minutes // 60} h {minutes % 60}" if minutes > 89 else str(minutes)), "min"
    if minutes < 2880:
        return f"{minutes // 60} h {minutes % 60}", "min"
    return f"{minutes // 1440} d {minutes % 1440 // 60}", "h"


@dataclass(frozen=True)
class Column:
    """One column of a table: its key in the rows, its heading, whether it holds numbers, and how these are written."""

    key: str
    heading: str
    numeric: bool = True
    wide: bool = False
    form: str = ""


def table(
    columns: Sequence[Column],
    rows: Iterable[dict[str, object]],
    caption: str,
    *,
    sortable: bool = False,
    tall: bool = False,
) -> str:
    """A plain HTML table that a screen reader can walk; its first column names the row."""
    heads = "".join(_heading(column, sortable) for column in columns)
    body = "\n".join("<tr>" + "".join(_cells(columns, row)) + "</tr>" for row in rows)
    return (
        f'<div class="scroll{" tall" if tall else ""}" tabindex="0" role="region" aria-label="{text(caption)}">'
        f"<table><caption>{text(caption)}</caption><thead><tr>{heads}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _heading(column: Column, sortable: bool) -> str:
    label = text(column.heading)
    inner = f'<button type="button">{label}</button>' if sortable else label
    return f'<th scope="col"{" class=number" if column.numeric else ""}>{inner}</th>'


def _cells(columns: Sequence[Column], row: dict[str, object]) -> Iterable[str]:
    for index, column in enumerate(columns):
        value = row.get(column.key)
        tag, scope = ("th", ' scope="row"') if index == 0 else ("td", "")
        if column.numeric:
            key = number(value)
            shown = format(key, column.form) if column.form and key is not None else plain(value)
            yield f'<{tag}{scope} class="number" data-sort="{"" if key is None else key}">{text(shown)}</{tag}>'
        else:
            wide = ' class="wide"' if column.wide else ""
            yield f"<{tag}{scope}{wide}>{text(plain(value))}</{tag}>"


def embedded_json(value: object) -> str:
    """JSON that may stand inside a script element: no string of it can end that element."""
    encoded = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
    return encoded.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def page(title: str, body: str, figures: str, scripts: Sequence[str] = ("page.js",), connect: str = "") -> str:
    """The whole file: style, body, Bokeh, the figures as JSON (from `embedded_json`), and the page's scripts.

    `connect`: where the scripts of a live page may connect to; a file connects to nothing.
    """
    from bokeh.resources import Resources

    library = "\n".join(Resources(mode="inline", components=["bokeh"], log_level="warn").js_raw)
    sources = [library, *(_own(name) for name in scripts)]
    allowed = " ".join(f"'sha256-{_digest(source)}'" for source in sources)
    policy = f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"
    policy += f"; connect-src {connect}" if connect else ""
    run = "\n".join(f"<script>{source}</script>" for source in sources)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{text(title)}</title>
<link rel="icon" href="data:,">
<style>
{_own("page.css")}</style>
</head>
<body>
{body}
<noscript><p class="notice">The curves need JavaScript; every number of them is in the tables.</p></noscript>
<script type="application/json" id="figures">{figures}</script>
{run}
</body>
</html>
"""


def still_page(title: str, body: str) -> str:
    """A page without scripts, in the same look."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<link rel="icon" href="data:,">
<style>
{_own("page.css")}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _own(name: str) -> str:
    return (files("runner.pages") / name).read_text(encoding="utf-8")


def _digest(source: str) -> str:
    return base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def write_page(path: Path, content: str) -> Path:
    """Write a page whole or not at all. Raises StorageError, also where somebody put a link in its place."""
    if path.is_symlink():
        raise StorageError(f"{path}: is a symbolic link; pages are not written through links")
    write_atomic(path, content.encode("utf-8", errors="replace"), durable=False)
    return path
