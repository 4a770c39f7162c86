"""CSV files that survive: whole rows, marks to go back to, full disks, and text that stays text."""

import csv
import io
import math
import os
from pathlib import Path

import pandas as pd
import pytest
from conftest import largest_file
from hypothesis import given
from hypothesis import strategies as st

from runner.faults import BadData, StorageError
from runner.log import CsvLog, cell

COLUMNS = ["epoch", "loss", "note"]


def written(path: Path, rows: int = 5) -> CsvLog:
    log = CsvLog(path, COLUMNS)
    for epoch in range(rows):
        log.row({"epoch": epoch, "loss": 1 / (epoch + 3), "note": f"row {epoch}"})
    return log


def test_rows_are_read_back_to_the_last_bit(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    log = written(path, 50)
    log.row({"epoch": 50})
    log.close()
    rows = list(csv.DictReader(path.open()))
    assert list(rows[0]) == COLUMNS
    assert [float(row["loss"]) for row in rows[:50]] == [1 / (epoch + 3) for epoch in range(50)]
    assert math.isnan(pd.read_csv(path).loss[50])
    assert path.read_bytes().endswith(b"\n")


def test_a_file_that_is_opened_again_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    written(path, 2).close()
    again = CsvLog(path, COLUMNS)
    again.row({"epoch": 2})
    assert path.read_text().splitlines()[0] == "epoch,loss,note"
    assert len(path.read_text().splitlines()) == 4
    again.clear()
    assert path.read_text() == "epoch,loss,note\n"


def test_going_back_to_a_mark_restores_every_byte_wherever_the_last_write_was_torn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    log = written(path)
    mark, committed = log.mark(), path.read_bytes()
    log.row({"epoch": 5, "loss": 0.4375, "note": "not committed"})
    full = path.read_bytes()
    for size in range(len(committed), len(full) + 1):
        path.write_bytes(full[:size])
        CsvLog(path, COLUMNS).rewind(mark)
        assert path.read_bytes() == committed
    path.write_bytes(committed + b"\0" * 40)  # what a crash of the file system may leave
    CsvLog(path, COLUMNS).rewind(mark)
    assert path.read_bytes() == committed


def test_a_file_that_lacks_what_was_marked_is_refused_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    mark, committed = written(path).mark(), path.read_bytes()
    for size in range(1, len(committed)):
        path.write_bytes(committed[:size])
        with pytest.raises(BadData, match=r"metrics\.csv: was changed since the checkpoint"):
            CsvLog(path, COLUMNS).rewind(mark)
        assert path.read_bytes() == committed[:size]
    for position in range(len(committed)):
        changed = bytearray(committed)
        changed[position] ^= 1
        path.write_bytes(changed)
        with pytest.raises(BadData):
            CsvLog(path, COLUMNS).rewind(mark)


def test_a_mark_is_only_moved_by_what_is_before_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    log = written(path)
    first = log.mark()
    log.row({"epoch": 5})
    assert log.mark() != first
    log.rewind(first)
    assert log.mark() == first
    log.row({"epoch": 6, "note": "after going back"})
    assert path.read_text().splitlines()[-1] == "6,,after going back"


def test_a_row_that_meets_a_limit_is_not_left_half_there(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    log = written(path)
    before = path.read_bytes()
    with largest_file(len(before) + 10), pytest.raises(StorageError, match="File too large"):
        log.row({"epoch": 5, "note": "x" * 500})
    assert path.read_bytes() == before
    log.row({"epoch": 5, "note": "x" * 500})
    assert len(pd.read_csv(path)) == 6


def fill(log: CsvLog) -> None:
    for epoch in range(5, 5000):
        log.row({"epoch": epoch, "note": "x" * 200})


def test_a_row_that_meets_a_full_disk_is_not_left_half_there(small_disk: Path) -> None:
    log = written(small_disk / "metrics.csv")
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 200_000)
    with pytest.raises(StorageError, match="No space left") as caught:
        fill(log)
    assert "run the same command again" in str(caught.value)
    assert all(len(row) == 3 for row in csv.reader((small_disk / "metrics.csv").open()))
    assert (small_disk / "metrics.csv").read_bytes().endswith(b"\n")
    rows = len(pd.read_csv(small_disk / "metrics.csv"))
    filler.unlink()
    log.row({"epoch": 9})
    assert len(pd.read_csv(small_disk / "metrics.csv")) == rows + 1


def test_a_link_in_the_place_of_the_file_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "metrics.csv").symlink_to(victim)
    with pytest.raises(StorageError):
        CsvLog(tmp_path / "metrics.csv", COLUMNS)
    assert victim.read_text() == "precious"


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="none"):
        CsvLog(tmp_path / "none" / "metrics.csv", COLUMNS)


def test_a_file_has_the_rights_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        CsvLog(tmp_path / "metrics.csv", COLUMNS).close()
    finally:
        os.umask(before)
    assert (tmp_path / "metrics.csv").stat().st_mode & 0o777 == 0o644


def test_a_key_that_is_no_column_is_a_mistake_of_ours(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="has no column"):
        CsvLog(tmp_path / "metrics.csv", COLUMNS).row({"lsos": 1})


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@given(st.lists(TEXT, min_size=2, max_size=4))
def test_any_text_stays_in_its_cell(texts: list[str]) -> None:
    line = ",".join(cell(text) for text in texts) + "\n"
    (row,) = csv.reader(io.StringIO(line, newline=""))
    for text, found in zip(texts, row, strict=True):
        assert found.removeprefix("'") == text.removeprefix("'")
        assert not found.startswith(("=", "+", "-", "@", "\t", "\r"))


@given(st.floats(allow_nan=False) | st.integers())
def test_any_number_is_itself_again(number: float) -> None:
    assert type(number)(cell(number)) == number


def test_a_file_keeps_the_columns_it_began_with_although_the_program_has_got_more_since(tmp_path: Path) -> None:
    old = CsvLog(tmp_path / "metrics.csv", ("epoch", "loss"))
    old.row({"epoch": 0, "loss": 0.5})
    old.close()
    new = CsvLog(tmp_path / "metrics.csv", ("epoch", "phase", "loss"))
    new.row({"epoch": 1, "phase": 3, "loss": 0.25})
    assert (tmp_path / "metrics.csv").read_text() == "epoch,loss\n0,0.5\n1,0.25\n"
    new.clear()
    new.row({"epoch": 0, "phase": 0, "loss": 0.125})
    assert (tmp_path / "metrics.csv").read_text() == "epoch,phase,loss\n0,0,0.125\n"
    new.close()
