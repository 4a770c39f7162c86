"""The README says what the files say: its table is made from the published rows, its choices are the ones there are."""

import re
from pathlib import Path

import pytest

from runner.compose import choices_of
from runner.pages.report import as_markdown, collect

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "outputs" / "published").glob("lenet5_*.csv")), ids=lambda path: path.name)
def test_a_published_table_stands_in_the_readme_as_the_rows_give_it(path: Path) -> None:
    assert as_markdown(collect([path])) in README
    assert f"report outputs/published/{path.name}" in README


@pytest.mark.parametrize("group", ["model", "quant", "dataset", "classifier", "regularizer"])
def test_every_choice_is_named(group: str) -> None:
    missing = [name for name in choices_of()[group] if f"`{name}`" not in README]
    assert not missing


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
