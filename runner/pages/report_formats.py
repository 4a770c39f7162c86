"""A report as Markdown, HTML or LaTeX, or through a template of somebody's own."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from runner.faults import ConfigError, Fault
from runner.pages.page import Column, still_page, table, text
from runner.pages.report_parts import Report
from runner.pages.report_records import Table
from runner.pages.report_words import count
from runner.pages.results import Row

LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "—": "---", "<": r"\textless{}",
    ">": r"\textgreater{}",
}  # fmt: skip


def markdown(report: Report, pictures_in: str | None) -> str:
    """Markdown; figures only where they are files beside it."""
    parts = ["# Results\n", *(markdown_table(each) for each in _of_runs(report))]
    if report.discussion:
        parts += ["## What the numbers say\n", *(f"{_markdown(paragraph)}\n" for paragraph in report.discussion)]
    if pictures_in:
        parts += [
            "## Figures\n",
            *(f"![{_markdown(p.caption)}]({pictures_in}/{p.name}.svg)\n" for p in report.pictures),
        ]
    if report.holes:
        parts += ["## Not run\n", "".join(f"- {_markdown(hole)}\n" for hole in report.holes)]
    for each in report.tables:
        parts += [f"## {each.caption}\n", markdown_table(each)]
    return "\n".join(parts)


def _of_runs(report: Report) -> list[Table]:
    """The table of the runs, where there are any."""
    return [report.results] if report.groups else []


def markdown_table(each: Table) -> str:
    """Cells between bars."""
    lines = [list(each.headings), ["---"] * len(each.headings), *each.rows]
    return "".join("| " + " | ".join(map(_cell, line)) + " |\n" for line in lines)


def _cell(value: str) -> str:
    return _markdown(value).replace("|", r"\|")


def _markdown(value: str) -> str:
    """One line in which nothing is a tag, a link, a picture or emphasis."""
    letters = r"[<>`*\[\]]" if "](" in value or "][" in value else r"[<>`*]"
    return re.sub(f"({letters})", r"\\\1", " ".join(value.split()))


def html(report: Report, pictures_in: str | None) -> str:
    """One page with its figures inside; nothing in it can run."""
    parts = [f'<div class="results">{_html_table(each)}</div>' for each in _of_runs(report)]
    parts += ["<h2>What the numbers say</h2>"] if report.discussion else []
    parts += [f"<p>{text(paragraph)}</p>" for paragraph in report.discussion]
    figures = "".join(
        f'<figure><div class="picture" tabindex="0" role="region" aria-label="{text(p.name)}">{p.svg}</div>'
        f"<figcaption>{text(p.caption)}</figcaption></figure>"
        for p in report.pictures
    )
    parts.append(f'<h2>Figures</h2><div class="pictures">{figures}</div>' if figures else "")
    if report.holes:
        parts.append("<h2>Not run</h2><ul>" + "".join(f"<li>{text(hole)}</li>" for hole in report.holes) + "</ul>")
    parts += [f"<h2>{text(each.caption)}</h2>{_html_table(each)}" for each in report.tables]
    runs = sum(len(group.rows) for group in report.groups)
    counts = f"{count(runs, 'run')}, {count(len(report.groups), 'configuration')}; mean ± standard deviation over seeds"
    header = f"<header><h1>Results</h1><p>{counts}</p></header>"
    return still_page("Results", f'{header}<main class="report">{"".join(parts)}</main>')


def _html_table(each: Table) -> str:
    columns = [Column(str(index), heading, numeric=False) for index, heading in enumerate(each.headings)]
    rows: list[dict[str, object]] = [{str(index): cell for index, cell in enumerate(row)} for row in each.rows]
    return table(columns, rows, each.caption)


def latex(report: Report, pictures_in: str | None) -> str:
    """Sections to be put into a paper: booktabs for tables, the svg package for figures."""
    parts = [r"% needs \usepackage{booktabs,longtable} and, for the figures, \usepackage{svg}", r"\section*{Results}"]
    parts += [_latex_table(each) for each in _of_runs(report)]
    parts += [f"{_latex(paragraph)}\n" for paragraph in report.discussion]
    for picture in report.pictures if pictures_in else ():
        graphic = rf"\includesvg[width=\linewidth]{{{pictures_in}/{picture.name}}}"
        parts.append(rf"\begin{{figure}}\centering{graphic}\caption{{{_latex(picture.caption)}}}\end{{figure}}")
    if report.holes:
        items = "\n".join(rf"\item {_latex(hole)}" for hole in report.holes)
        parts.append(f"\\subsection*{{Not run}}\n\\begin{{itemize}}\n{items}\n\\end{{itemize}}")
    parts += [rf"\subsection*{{{_latex(each.caption)}}}" + "\n" + _latex_table(each) for each in report.tables]
    return "\n\n".join(parts) + "\n"


def _latex_table(each: Table) -> str:
    width = len(each.headings)
    form = "l" * width if width < 4 else "lll" + "r" * (width - 3)
    lines = [" & ".join(map(_latex, row)) + r" \\" for row in each.rows]
    head = " & ".join(map(_latex, each.headings)) + r" \\"
    return "\n".join(
        [rf"\begin{{longtable}}{{{form}}}", r"\toprule", head, r"\midrule", *lines, r"\bottomrule", r"\end{longtable}"]
    )


def _latex(value: str) -> str:
    """Text in which no character is a command.

    >>> print(_latex("50 % of a_b \\\\x"))
    50 \\% of a\\_b \\textbackslash{}x
    """
    return "".join(LATEX.get(letter, letter) for letter in " ".join(value.split()))


FORMATS: dict[str, Callable[[Report, str | None], str]] = {"md": markdown, "html": html, "latex": latex}


def from_template(path: Path, report: Report, rows: Sequence[Row]) -> str:
    """A Jinja template; it may read results, discussion, pictures, tables, holes, groups and rows, and run nothing.

    Strings are escaped where the template's name ends in .html or .svg; a filter `latex` escapes for LaTeX.
    """
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    escaping = path.suffix in (".html", ".htm", ".svg", ".xml")
    environment = ImmutableSandboxedEnvironment(autoescape=escaping, undefined=StrictUndefined)
    environment.filters["latex"] = _latex
    parts = ("results", "discussion", "pictures", "tables", "holes", "groups")
    known: dict[str, Any] = {part: getattr(report, part) for part in parts} | {"rows": list(rows)}
    try:
        return environment.from_string(path.read_text(encoding="utf-8")).render(known)
    except (TemplateError, TypeError, ValueError) as error:
        raise ConfigError([Fault("--template", f"{path}: {error}")]) from error
