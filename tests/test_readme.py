"""The README says what the files say: its table is made from the published rows, its choices are the ones there are."""

import csv
import re
from pathlib import Path

import pytest

from runner.compose import choices_of
from runner.pages.report import as_markdown, collect

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLES = {"lenet5_mnist.csv": "README.md", "variants_lenet5_mnist.csv": "quant/README.md"}


@pytest.mark.parametrize("name", TABLES)
def test_a_published_table_stands_where_the_rows_give_it(name: str) -> None:
    page = (ROOT / TABLES[name]).read_text(encoding="utf-8")
    assert as_markdown(collect([ROOT / "outputs" / "published" / name])) in page
    assert f"report outputs/published/{name}" in page


def table_of_steps() -> str:
    """What `bench step` has measured, as the README shows it."""
    with (ROOT / "outputs" / "published" / "bench_step_resnet18.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = ["| a training step with | time | saved for backward | peak of tensors |", "| --- | --- | --- | --- |"]
    for row in rows:
        time, low, high, saved, peak = (float(row[key]) for key in ("time", "time_low", "time_high", "saved", "peak"))
        lines.append(f"| {row['name']} | {time:.2f} [{low:.2f}, {high:.2f}] | {saved:.3f} | {peak:.2f} |")
    return "\n".join(lines)


def test_the_table_of_training_steps_is_what_was_measured() -> None:
    assert table_of_steps() in README


def test_every_published_file_is_named_on_a_page() -> None:
    pages = "".join((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "quant/README.md"))
    idle = [path.name for path in (ROOT / "outputs" / "published").iterdir() if path.name not in pages]
    assert not idle


@pytest.mark.parametrize("group", ["model", "quant", "dataset", "classifier", "regularizer"])
def test_every_choice_is_named(group: str) -> None:
    missing = [name for name in choices_of()[group] if f"`{name}`" not in README]
    assert not missing


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
