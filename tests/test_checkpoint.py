"""Checkpoints: whatever is cut, flipped, planted or refused by the disk, what is loaded is what was saved."""

import io
import json
import os
import pickle
import random
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import largest_file

from runner import files
from runner.checkpoint import SCHEMA, Checkpoints, dumps, load, loads, read_manifest
from runner.faults import BadData, Preempted, StorageError
from runner.files import sha256

State = dict[str, Any]
FACTS = {"config": {"seed": 0}, "logs": {"metrics.csv": {"offset": 10, "sha256": "x"}}, "rate": 0.1 + 0.2}


def state(step: int) -> State:
    weight = torch.full((40, 50), float(step)) + torch.arange(50) / 7
    return {"model": {"weight": weight, "count": torch.tensor(step)}, "progress": {"step": step}, "ema": None}


def best(step: int) -> tuple[int, State]:
    return step, {"weight": torch.full((10, 10), float(step))}


def saved(folder: Path, *steps: int, best_at: int = 1) -> Checkpoints:
    checkpoints = Checkpoints(folder)
    for step in steps:
        checkpoints.save(step, state(step), best(best_at) if step >= best_at else None, FACTS)
    return checkpoints


def newest(folder: Path) -> tuple[int, list[str]]:
    """The step that is taken up, and the warnings on the way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = Checkpoints(folder).newest()
    assert found is not None
    step = found.state["progress"]["step"]
    assert torch.equal(found.state["model"]["weight"], state(step)["model"]["weight"])
    return step, [str(one.message) for one in caught]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    saved(tmp_path, 3, best_at=3)
    found = Checkpoints(tmp_path).newest()
    assert found is not None
    assert torch.equal(found.state["model"]["weight"], state(3)["model"]["weight"])
    assert found.best is not None
    assert torch.equal(found.best["weight"], best(3)[1]["weight"])
    assert {key: found.manifest[key] for key in FACTS} == FACTS
    assert found.manifest["schema"] == SCHEMA


def test_there_may_be_none_yet(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path).newest() is None
    saved(tmp_path, 1, best_at=99)
    found = Checkpoints(tmp_path).newest()
    assert found is not None
    assert found.best is None


def test_the_last_two_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2, 3, 10, best_at=2)
    assert names(tmp_path) == {"step-3.json", "step-3.pt", "step-10.json", "step-10.pt", "best-2.pt"}
    checkpoints.save(11, state(11), best(11), FACTS)
    assert "best-2.pt" in names(tmp_path), "the checkpoint before still needs it"
    checkpoints.save(12, state(12), best(11), FACTS)
    assert names(tmp_path) == {"step-11.json", "step-11.pt", "step-12.json", "step-12.pt", "best-11.pt"}


def test_what_a_kill_leaves_behind_is_swept(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    good = names(tmp_path)
    for name in (".step-9.pt.tmp-1", ".step-9.json.tmp-77", "step-9.pt", "best-9.pt"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    assert newest(tmp_path) == (5, [])
    assert names(tmp_path) == good | {"notes.txt"}


@pytest.mark.parametrize("name", ["step-9.pt", "step-9.json", "best-8.pt"])
def test_a_cut_file_is_walked_past_with_a_warning(tmp_path: Path, name: str) -> None:
    for percent in range(0, 100, 5):
        folder = tmp_path / str(percent)
        folder.mkdir()
        checkpoints = saved(folder, 5, best_at=5)
        checkpoints.save(9, state(9), best(8), FACTS)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) * percent // 100])
        step, told = newest(folder)
        assert step == 5
        assert len(told) == 1
        assert name in told[0]
        assert newest(folder) == (5, []), "the damaged one is gone"


def test_a_missing_file_is_walked_past(tmp_path: Path) -> None:
    for name in ("step-9.pt", "best-9.pt"):
        saved(tmp_path, 5, best_at=5).save(9, state(9), best(9), FACTS)
        (tmp_path / name).unlink()
        step, told = newest(tmp_path)
        assert (step, len(told)) == (5, 1)
        assert f"{name}: is missing" in told[0]


def test_no_flipped_bit_is_accepted(tmp_path: Path) -> None:
    """Bits of the data and of the manifest alike; torch.load alone takes most of them for weights."""
    saved(tmp_path, 9, best_at=9)
    draw = random.Random(0)
    originals = {name: (tmp_path / name).read_bytes() for name in ("step-9.pt", "step-9.json", "best-9.pt")}
    for index in range(300):
        name = list(originals)[index % 3]
        changed = bytearray(originals[name])
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        (tmp_path / name).write_bytes(changed)
        with pytest.raises(BadData, match="9"):
            load(tmp_path / "step-9.json")
        (tmp_path / name).write_bytes(originals[name])
    load(tmp_path / "step-9.json")


def test_where_no_checkpoint_is_whole_nothing_is_thrown_away(tmp_path: Path) -> None:
    saved(tmp_path, 5, 9)
    for name in ("step-5.pt", "step-9.pt"):
        (tmp_path / name).write_bytes(b"x" + (tmp_path / name).read_bytes()[1:])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.warns(UserWarning, match="going back"), pytest.raises(BadData, match="no checkpoint in it is whole"):
        Checkpoints(tmp_path).newest()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_damaged_checkpoints_do_not_count_among_those_kept(tmp_path: Path) -> None:
    saved(tmp_path, 5, 9)
    (tmp_path / "step-9.pt").write_bytes(b"")
    checkpoints = Checkpoints(tmp_path)
    with pytest.warns(UserWarning, match=r"step-9\.pt"):
        assert checkpoints.newest() is not None
    checkpoints.save(7, state(7), best(1), FACTS)
    assert {"step-5.json", "step-5.pt", "step-7.json", "step-7.pt"} <= names(tmp_path)


def rewritten(path: Path, **facts: Any) -> None:
    """Change a manifest as a program would: its checksum is right again."""
    manifest = {key: value for key, value in json.loads(path.read_bytes()).items() if key != "check"} | facts
    manifest["check"] = sha256(json.dumps(manifest, sort_keys=True).encode())
    path.write_text(json.dumps(manifest))


def test_a_newer_format_is_refused_and_left_alone(tmp_path: Path) -> None:
    """It is no damage: walking past it would undo what a newer version did."""
    saved(tmp_path, 5, 9)
    rewritten(tmp_path / "step-9.json", schema=SCHEMA + 1)
    before = names(tmp_path)
    with pytest.raises(BadData, match=f"format {SCHEMA + 1}, this program reads format {SCHEMA}"):
        Checkpoints(tmp_path).newest()
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    "name",
    [
        "step-9.pt/../step-9.pt",
        "step-9.pt\n",
        "x\0",
        "../../etc/passwd",
        "/etc/passwd",
        "a/../step-9.pt",
        "",
        ".",
        "..",
        None,
        5,
        ["step-9.pt"],
    ],
)
def test_a_manifest_names_files_beside_it_only(tmp_path: Path, name: Any) -> None:
    saved(tmp_path, 9)
    rewritten(tmp_path / "step-9.json", file=name)
    with pytest.raises(BadData, match="names no data file beside it"):
        load(tmp_path / "step-9.json")
    saved(tmp_path, 9)
    rewritten(tmp_path / "step-9.json", best={"step": 1, "file": name, "sha256": "x"})
    with pytest.raises(BadData, match="names no data file beside it"):
        load(tmp_path / "step-9.json")


NO_MANIFESTS = [b"", b"[]", b"5", b"null", b"{}", b'{"check": "x"}', b"[" * 100_000, b"\xff\xfe", b'{"schema": 1}']


@pytest.mark.parametrize("content", NO_MANIFESTS)
def test_a_manifest_that_is_none_is_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "step-1.json").write_bytes(content)
    with pytest.raises(BadData, match=r"step-1\.json"):
        read_manifest(tmp_path / "step-1.json")


def test_an_error_of_the_disk_is_not_taken_for_damage(tmp_path: Path) -> None:
    saved(tmp_path, 5, 9)
    (tmp_path / "step-9.pt").unlink()
    (tmp_path / "step-9.pt").mkdir()
    before = names(tmp_path)
    with pytest.raises(StorageError, match="Is a directory"):
        Checkpoints(tmp_path).newest()
    assert names(tmp_path) == before


# Files that mean harm ----------------------------------------------------------------------------------------------------


class Harm:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize(
    "error", [Preempted("TERM"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=str
)
def test_what_breaks_off_decoding_is_not_taken_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    made = saved(tmp_path, 1, 2)
    monkeypatch.setattr("torch.load", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        Checkpoints(tmp_path).newest()
    assert made.manifests() == Checkpoints(tmp_path).manifests() != []


def test_code_in_a_file_is_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    buffer = io.BytesIO()
    torch.save({"model": Harm(marker)}, buffer)
    legacy = io.BytesIO()
    torch.save({"model": Harm(marker)}, legacy, _use_new_zipfile_serialization=False)
    for name, content in {"a.pt": buffer, "a.pth": buffer, "a.bin": legacy, "b.pt": legacy}.items():
        (tmp_path / name).write_bytes(content.getvalue())
        with pytest.raises(BadData, match="not a checkpoint that can be trusted"):
            loads(tmp_path / name)
    (tmp_path / "c.pt").write_bytes(pickle.dumps(Harm(marker)))
    with pytest.raises(BadData):
        loads(tmp_path / "c.pt")
    saved(tmp_path, 9)
    (tmp_path / "step-9.pt").write_bytes(buffer.getvalue())
    rewritten(tmp_path / "step-9.json", sha256=sha256(buffer.getvalue()))
    with pytest.raises(BadData):
        load(tmp_path / "step-9.json")
    assert not marker.exists()


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    plain = io.BytesIO(dumps({"x": torch.zeros(2_000_000)}))
    bomb = io.BytesIO()
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))
    assert len(bomb.getvalue()) < 20_000
    (tmp_path / "bomb.pt").write_bytes(bomb.getvalue())
    with pytest.raises(BadData, match="not a checkpoint that can be trusted"):
        loads(tmp_path / "bomb.pt")


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x04", b"no archive", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(BadData):
        loads(tmp_path / "x.pt")


def test_a_state_is_a_dictionary(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save([torch.zeros(1)], buffer)
    (tmp_path / "x.pt").write_bytes(buffer.getvalue())
    with pytest.raises(BadData, match="holds a list"):
        loads(tmp_path / "x.pt")


def test_a_planted_link_is_not_written_through(tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "checkpoints"
    victim.write_text("precious")
    folder.mkdir()
    for name in ("step-1.pt", "step-1.json", f".step-1.pt.tmp-{os.getpid()}", f".step-1.json.tmp-{os.getpid()}"):
        (folder / name).symlink_to(victim)
    saved(folder, 1, best_at=9)
    assert victim.read_text() == "precious"
    assert newest(folder) == (1, [])


# A disk that says no -----------------------------------------------------------------------------------------------------

CALLS = ["open", "write", "fsync", "replace", "close"]


@pytest.mark.parametrize("call", CALLS)
def test_whichever_call_fails_the_checkpoint_before_stays_whole(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call of a save, one after the other: the save fails as a whole, and what is taken up is whole."""
    real, failed, nth = getattr(os, call), True, 0
    while failed:
        folder = tmp_path / f"{call}-{nth}"
        folder.mkdir()
        checkpoints, count = saved(folder, 1, 2, best_at=1), 0

        def failing(*args: Any, _nth: int = nth, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == _nth + 1:
                if call == "close":
                    real(*args, **kwargs)
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        monkeypatch.setattr(files.os, call, failing)
        try:
            checkpoints.save(3, state(3), best(3), FACTS)
            failed = False
        except StorageError as error:
            failed = "No space left" in str(error)
            assert failed
        finally:
            monkeypatch.setattr(files.os, call, real)
        step, told = newest(folder)
        assert step in ({2, 3} if failed else {3}), "the one before, or the new one where only its last sync failed"
        assert not told
        assert not [name for name in names(folder) if ".tmp-" in name]
        nth += 1
    assert nth > 2, "some calls did fail"


def test_a_full_disk_costs_the_new_checkpoint_only(small_disk: Path) -> None:
    checkpoints, step, told = Checkpoints(small_disk), 0, ""
    while not told and step < 100:
        step += 1
        size = torch.zeros(900 * step)
        try:
            checkpoints.save(step, state(step) | {"size": size}, best(1), FACTS)
        except StorageError as error:
            told = str(error)
    assert "bytes: No space left on device; free some space and run the same command again" in told
    assert newest(small_disk) == (step - 1, [])
    assert not [name for name in names(small_disk) if ".tmp-" in name]
    Checkpoints(small_disk).save(step, state(step), best(1), FACTS)
    assert newest(small_disk) == (step, [])


def test_a_limit_on_the_size_of_files_costs_the_new_checkpoint_only(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    with largest_file(5_000), pytest.raises(StorageError, match="File too large"):
        checkpoints.save(2, state(2), best(1), FACTS)
    assert newest(tmp_path) == (1, [])
