"""The verb `report`: what runs reached, how far from float, and what they cost; mean and standard deviation over seeds.

python -m runner report outputs                         the report, as Markdown
python -m runner report outputs --format html --out DIR   DIR/report.html, the rows as CSV, every figure as SVG
python -m runner report outputs --format latex --out DIR  the same for a paper
python -m runner report outputs --format csv            one row a run: small enough to keep under outputs/published/
python -m runner report outputs/published/FILE.csv      the report of such rows, of a benchmark's, or of `verify`'s scans.csv
python -m runner report FILE.csv … --format svg --out DIR   every figure, nothing else
python -m runner report --pages README.md …             put the tables of published files into pages
python -m runner report FOLDER … --format curve         what runs of one configuration reach epoch by epoch, for `curve=FILE`
python -m runner report outputs --template FILE         a Jinja template of your own
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from runner.faults import ConfigError, Exit, Fault, nearest
from runner.files import write_atomic
from runner.pages.expected import expected_curve
from runner.pages.report_formats import FORMATS, from_template, markdown_table
from runner.pages.report_pages import with_tables
from runner.pages.report_parts import Report, make_report, results_table
from runner.pages.results import Row, as_csv, groups_of

ENDINGS = {"md": "md", "html": "html", "latex": "tex", "csv": "csv", "curve": "csv", "svg": "svg"}


def as_markdown(rows: Sequence[Row]) -> str:
    """The results table alone, one line a configuration."""
    return markdown_table(results_table(groups_of(rows)))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError([Fault("report", message)])


def report(words: Sequence[str]) -> int:
    """The verb."""
    options = _options(words)
    lost = [Fault(str(path), "is not there") for path in options.paths if not path.exists()]
    if lost:
        raise ConfigError(lost)
    if options.pages:
        return _refresh(options.paths)
    paths = options.paths or [Path("outputs")]
    content, rows = make_report(paths, _bench_folders(paths))
    if not rows and not any(path.is_file() for path in paths):
        raise ConfigError([Fault("", f"no finished run in {', '.join(map(str, paths))}")])
    if options.out is None:
        sys.stdout.write(_text(content, rows, options, pictures_in=None))
        return int(Exit.DONE)
    for path in _write(content, rows, options):
        print(path.resolve())
    return int(Exit.DONE)


def _refresh(pages: Sequence[Path]) -> int:
    for page in pages:
        try:
            text = page.read_text(encoding="utf-8")
        except (UnicodeDecodeError, IsADirectoryError) as error:
            raise ConfigError([Fault(str(page), "is no page: it holds no text")]) from error
        if (made := with_tables(text)) != text:
            write_atomic(page, made.encode(), durable=False)
        print(f"{page.resolve()}: {'written' if made != text else 'says what the files say'}")
    return int(Exit.DONE)


def _options(words: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="report", add_help=False, allow_abbrev=False)
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--format", default="md")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--template", type=Path)
    parser.add_argument("--pages", action="store_true")
    options = parser.parse_args(list(words))
    if options.format not in ENDINGS:
        close = nearest(options.format, list(ENDINGS))
        raise ConfigError(
            [Fault("--format", f"{options.format!r} is not accepted.{close} Accepted: {', '.join(ENDINGS)}")]
        )
    if options.format == "svg" and options.out is None:
        raise ConfigError([Fault("--out", "say where the figures go: --format svg --out DIR")])
    if options.pages and not options.paths:
        raise ConfigError([Fault("--pages", "say which pages: --pages README.md")])
    if options.template is not None and not options.template.is_file():
        raise ConfigError([Fault("--template", f"{options.template} is not there")])
    return options


def _text(content: Report, rows: Sequence[Row], options: argparse.Namespace, pictures_in: str | None) -> str:
    if options.template is not None:
        return from_template(options.template, content, rows)
    if options.format == "csv":
        return as_csv(rows)
    if options.format == "curve":
        return expected_curve(rows)
    return FORMATS[options.format](content, pictures_in)


def _write(content: Report, rows: Sequence[Row], options: argparse.Namespace) -> list[Path]:
    folder: Path = options.out
    if options.format == "svg":
        return _write_files(folder, {f"{picture.name}.svg": picture.svg for picture in content.pictures})
    ending = ENDINGS[options.format] if options.template is None else options.template.suffix.lstrip(".") or "txt"
    files = {f"report.{ending}": _text(content, rows, options, pictures_in="figures"), "results.csv": as_csv(rows)}
    for picture in content.pictures:
        files[f"figures/{picture.name}.svg"] = picture.svg
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    return _write_files(folder, files)


def _write_files(folder: Path, files: dict[str, str]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_atomic(folder / name, text.encode(), durable=False)
    return [folder / name for name in files]


def _bench_folders(paths: Sequence[Path]) -> list[Path]:
    """The benchmarks that lie beside the runs: in outputs/bench for outputs and for outputs/runs."""
    places = dict.fromkeys(place / "bench" for path in paths if path.is_dir() for place in (path, path.parent))
    return [place for place in places if place.is_dir()]
