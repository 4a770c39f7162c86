"""Whatever a crash or a stranger leaves in a run folder: no exception, no wrong number, no blocked reader."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_samples import LENET, make_run

from runner.columns import METRICS
from runner.pages import records
from runner.pages.records import Memory, complete_lines, find_runs, read_run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", epochs=5, layers=LENET, drops=(3,))


def test_a_whole_run_is_read_without_complaint(run_folder: Path) -> None:
    run = read_run(run_folder)
    assert run.problems == []
    assert run.metrics["epoch"].tolist() == [0, 1, 2, 3, 4]
    assert run.metrics["phase"].tolist() == ["0", "0", "0", "1", "1"]
    assert run.layers["layer"].tolist() == list(LENET)
    assert run.quant["grad_norm"].isna().all()
    assert (run.name, run.state) == ("lenet5-lsq-cifar10-s0", "done")


def test_a_file_cut_at_any_byte_gives_only_rows_that_were_finished(run_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    content = b"".join((run_folder / "metrics.csv").read_bytes().splitlines(keepends=True)[:4])
    whole = read_run(run_folder).metrics
    ends = [position for position, byte in enumerate(content) if byte == ord("\n")]
    for cut in range(len(content)):
        path.write_bytes(content[:cut])
        metrics = read_run(tmp_path).metrics
        finished = max(sum(end < cut for end in ends) - 1, 0)
        assert metrics.equals(whole.iloc[:finished]), f"cut at byte {cut}"


def test_who_reads_again_and_again_sees_what_a_new_reader_sees(run_folder: Path) -> None:
    """Rows that come, torn tails, files that are cut back and go on with other rows, broken rows, vanish and come again."""
    path = run_folder / "timing.csv"
    header, *rows = path.read_bytes().splitlines(keepends=True)
    others = [row.replace(b",1.25,", b",2.50,") for row in rows]
    contents = [
        header, header[:9], header + rows[0], header + rows[0] + rows[1][:7], header + b"".join(rows[:2]),
        header + b"".join(rows[:4]), header + b"".join(rows[:2]), header + b"".join([*rows[:2], *others[2:]]),
        header + b"".join([*rows[:2], b"1,2,3\n", *rows[2:4]]), b"\0" * 9 + b"\n", b"other\n1\n2\n", b"",
        header + b"".join(others), header + b"".join(others) + b"\0\0\n" + rows[0],
    ]  # fmt: skip
    memory: Memory = {}
    for content in contents:
        path.write_bytes(content)
        for _ in range(2):
            known, fresh = read_run(run_folder, memory=memory), read_run(run_folder)
            assert known.timing.equals(fresh.timing), content
            assert known.problems == fresh.problems
    path.unlink()
    assert read_run(run_folder, memory=memory).problems == read_run(run_folder).problems
    path.write_bytes(header + others[0])
    assert read_run(run_folder, memory=memory).timing.equals(read_run(run_folder).timing)


def test_rows_that_were_read_are_not_read_again(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory: Memory = {}
    read_run(run_folder, memory=memory)
    row, given = "5,6" + "," * (len(METRICS) - 2), list[str]()
    monkeypatch.setattr(records, "_fields", lambda line: given.append(line) or line.split(","))
    with (run_folder / "metrics.csv").open("a") as file:
        file.write(f"{row}\n")
    assert read_run(run_folder, memory=memory).metrics["step"].tolist()[-1] == 6
    assert given == [row]


@pytest.mark.parametrize("tail", [b"\0" * 20, b"5,500," + b"\0" * 4096, b"\0\0\n", b"\0" * 9 + b"\n5,1"])
def test_a_tail_of_nul_bytes_is_no_row(run_folder: Path, tail: bytes) -> None:
    whole = read_run(run_folder).metrics
    with (run_folder / "metrics.csv").open("ab") as file:
        file.write(tail)
    assert read_run(run_folder).metrics.equals(whole)


def test_a_broken_row_is_left_out_and_named_and_the_rows_after_it_stay(run_folder: Path) -> None:
    path = run_folder / "timing.csv"
    lines = path.read_text().splitlines()
    lines[2:2] = ['1,"unclosed quote', "1,2,3", "x" * 200_000]
    path.write_text("\n".join(lines) + "\n")
    run = read_run(run_folder)
    assert run.timing["epoch"].tolist() == [0, 1, 2, 3, 4]
    assert run.problems == ["timing.csv: 3 of 8 rows are broken and left out"]


def test_text_where_a_number_belongs_is_a_hole(run_folder: Path) -> None:
    (run_folder / "metrics.csv").write_text("epoch,step,val_top1\n0,10,<b>\n1,20,inf\n")
    metrics = read_run(run_folder).metrics
    assert metrics["val_top1"].isna().tolist() == [True, False]
    assert metrics["train_loss"].isna().all()


BROKEN: dict[str, dict[str, bytes]] = {
    "empty files": dict.fromkeys(("metrics.csv", "config.yaml", "summary.json", "status.json"), b""),
    "header only": {"metrics.csv": b"epoch,step\n"},
    "half a header": {"metrics.csv": b"epoch,st"},
    "binary": dict.fromkeys(("metrics.csv", "config.yaml", "summary.json"), bytes(range(256)) * 9),
    "json is a list": {"summary.json": b"[1]", "status.json": b"3"},
    "half of a json": {"summary.json": b'{"best_val_top1": 9'},
    "deep json": {"summary.json": b"[" * 100_000, "status.json": b'{"a":' * 100_000},
    "deep yaml": {"config.yaml": b"[" * 5_000},
    "yaml bomb": {"config.yaml": b"a: &a [1,1]\nb: &b [*a,*a]\nc: [*b,*b]\n"},
    "yaml code": {"config.yaml": b"a: !!python/object/apply:os.system [exit 1]\n"},
    "repeated columns": {"metrics.csv": b"epoch,epoch,epoch\n1,2,3\n"},
}


@pytest.mark.parametrize("files", BROKEN.values(), ids=BROKEN.keys())
def test_broken_files_are_named_and_raise_nothing(tmp_path: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    run = read_run(tmp_path)
    assert any("missing" in problem for problem in run.problems)
    if not set(files) <= {"metrics.csv"}:
        assert any("missing" not in problem for problem in run.problems)
    assert len(run.metrics) <= 1


def test_a_folder_that_does_not_exist_is_an_empty_run(tmp_path: Path) -> None:
    run = read_run(tmp_path / "gone")
    assert run.state == "unknown"
    assert len(run.problems) == 6


def test_links_pipes_and_folders_in_place_of_files_are_not_opened(run_folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps({"name": "stolen"}))
    for name in ("summary.json", "metrics.csv", "status.json"):
        (run_folder / name).unlink()
    (run_folder / "summary.json").symlink_to(secret)
    os.mkfifo(run_folder / "metrics.csv")
    (run_folder / "status.json").mkdir()
    run = read_run(run_folder)
    assert run.summary == {}
    assert len(run.metrics) == 0
    assert [problem.split()[0] for problem in run.problems] == ["metrics.csv", "summary.json", "status.json"]


def test_a_reader_beside_a_writer_sees_only_true_rows(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "metrics.csv")])
    try:
        rows = 0
        deadline = time.monotonic() + 30
        while rows < 300 and time.monotonic() < deadline:
            metrics = read_run(tmp_path).metrics
            rows = len(metrics)
            assert (metrics["train_loss"] == metrics["epoch"] + 0.4375).all()
    finally:
        writer.kill()
        writer.wait()
    assert rows >= 300


WRITER = """
import sys
with open(sys.argv[1], "w") as file:
    file.write("epoch,train_loss\\n")
    for epoch in range(10**9):
        for piece in (f"{epoch},", f"{epoch}.4", "375\\n"):
            file.write(piece)
            file.flush()
"""


def test_runs_are_found_at_any_depth_and_once(tmp_path: Path) -> None:
    for name in ("runs/b", "runs/a", "sweeps/s1/0"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "status.json").write_text("{")
    (tmp_path / "runs/link").symlink_to(tmp_path / "runs/a")
    (tmp_path / "runs/loop").symlink_to(tmp_path)
    (tmp_path / "runs/empty").mkdir()
    (tmp_path / ".hidden/x").mkdir(parents=True)
    (tmp_path / ".hidden/x/metrics.csv").touch()
    assert find_runs(tmp_path) == [tmp_path / name for name in ("runs/a", "runs/b", "sweeps/s1/0")]
    assert find_runs(tmp_path / "runs/a") == [tmp_path / "runs/a"]
    assert find_runs(tmp_path / "nothing") == []


def test_runs_on_another_disk_are_found_but_not_all_that_lies_there(tmp_path: Path) -> None:
    for name in ("disk/runs/a", "disk/elsewhere/deeper/b"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "summary.json").write_text("{}")
    for name in ("outputs", "more"):
        (tmp_path / name).mkdir()
    (tmp_path / "outputs/runs").symlink_to(tmp_path / "disk/runs")
    (tmp_path / "more/there").symlink_to(tmp_path / "disk")
    (tmp_path / "more/nowhere").symlink_to(tmp_path / "not")
    assert find_runs(tmp_path / "outputs") == [tmp_path / "outputs/runs/a"]
    assert find_runs(tmp_path / "more") == [tmp_path / "more/there/runs/a"]


def test_reading_loads_no_torch() -> None:
    code = "import sys, runner.pages.records, runner.pages.page; sys.exit(bool({'torch', 'bokeh', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_complete_lines_keeps_what_is_between_broken_ones() -> None:
    assert complete_lines(b"a\r\n\0\0b\nc\n\nd") == ["a\r", "c"]
