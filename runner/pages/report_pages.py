"""Tables in pages that are written by hand, made anew from published files: no number in them is typed.

    <!-- table: outputs/published/lenet5_mnist.csv -->
    … whatever stands here is replaced …
    <!-- end -->

The file is seen from where the command is given. Behind it may stand a quantizer, whose rows are then shown beside those of
float alone, or the name of one figure of a file of scans.
"""

import re
from pathlib import Path

from runner.faults import ConfigError, Fault
from runner.pages.report_formats import markdown_table
from runner.pages.report_parts import make_report, results_table
from runner.pages.report_records import Table

BLOCK = re.compile(r"(<!-- table: (\S+)(?: (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(page: str) -> str:
    """The page with every marked table as its file gives it. Raises ConfigError where there is no such file or part."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{markdown_table(_table(Path(found[2]), found[3]))}\n{found[4]}", page)


def _table(path: Path, part: str | None) -> Table:
    if not path.is_file():
        raise ConfigError([Fault(str(path), "is not there: the file of a marked table")])
    report, _ = make_report([path])
    if report.groups:
        groups = [group for group in report.groups if part is None or group.plain or group.quant == part]
        if part is None or any(group.quant == part for group in groups):
            return results_table(groups)
    for table in report.measured:
        if part in (None, table.caption):
            return table
    raise ConfigError([Fault(str(path), f"has no {part}")])
