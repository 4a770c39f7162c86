"""Single faults, done for real to the command line: full and read-only disks, limits, links, locks, workers, no network."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from made_data import write_images

from runner.faults import Exit, RunnerError, StorageError
from runner.folder import RunFolder, status_of
from tests.torture.commands import PATIENCE, ROOT, finished, start
from tests.torture.forks import tail
from tests.torture.needs import Skipped, need, shell
from tests.torture.scenarios import SWITCH, Scenario

SMALL = Scenario("rows", ("quant=lsq", "epochs=3", "trainer.checkpoint_every=2", SWITCH))
FILES = ("metrics.csv", "quant.csv", "weights.safetensors")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the undisturbed run leaves."""
    place = tmp_path_factory.mktemp("rows") / "reference"
    assert finished(start(SMALL.command, place)) == 0, tail(place)
    return {name: (SMALL.folder(place) / name).read_bytes() for name in FILES}


def ends_as(reference: dict[str, bytes], place: Path) -> None:
    """The same command once more, on a healthy machine, ends as if nothing had happened."""
    assert finished(start(SMALL.command, place)) == 0, tail(place)
    assert {name: (SMALL.folder(place) / name).read_bytes() for name in FILES} == reference
    assert not list(place.rglob(".*.tmp-*"))


@contextmanager
def mounted(options: str, where: Path) -> Iterator[Path]:
    """A file system, for as long as it is needed; skips loudly where that is not allowed."""
    where.mkdir(parents=True, exist_ok=True)
    try:
        need("mount", "prlimit", root=True)
        shell(f"mount {options} {where}")
    except Skipped as reason:
        pytest.skip(str(reason))
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


@pytest.mark.parametrize("size", ["120k", "nr_inodes=14,size=9m"])
def test_a_full_disk_is_told_and_costs_nothing_that_was_saved(
    tmp_path: Path, reference: dict[str, bytes], size: str
) -> None:
    limit = size if "=" in size else f"size={size}"
    with mounted(f"-t tmpfs -o {limit} tmpfs", tmp_path / "disk") as disk:
        code = finished(start(SMALL.command, disk / "run"))
        assert code == 74, tail(disk / "run")
        assert status_of(SMALL.folder(disk / "run")).get("state") != "done"
        shell(f"mount -o remount,size=64m,nr_inodes=1000 {disk}")
        ends_as(reference, disk / "run")


@pytest.mark.parametrize(
    ("limit", "says"), [("--fsize=20000", "File too large"), ("--nofile=7", "Too many open files")]
)
def test_a_limit_on_files_is_told_and_costs_nothing_that_was_saved(
    tmp_path: Path, reference: dict[str, bytes], limit: str, says: str
) -> None:
    assert finished(start(SMALL.command, tmp_path / "run", prefix=["prlimit", limit])) == 74, tail(tmp_path / "run")
    assert says in tail(tmp_path / "run")
    ends_as(reference, tmp_path / "run")


def test_a_read_only_folder_is_refused_before_torch_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    place = tmp_path / "run"
    with mounted(f"--bind {tmp_path}", tmp_path / "run") as where:
        shell(f"mount -o remount,ro,bind {where}")
        process = start([*SMALL.command, f"outputs={where / 'outputs'}"], tmp_path / "elsewhere")
        assert finished(process) == 74, tail(tmp_path / "elsewhere")
    said = (tmp_path / "elsewhere.txt").read_text()
    assert "ead-only" in said
    assert "runner.folder" in said
    assert " torch\n" not in said
    assert not (place / "outputs").exists()


def test_too_little_memory_is_told_with_a_hint(tmp_path: Path) -> None:
    words = [*SMALL.command, "model=lenet5", "dataset.size=28", "model.hidden=20000000"]
    code = finished(start(words, tmp_path / "run", prefix=["prlimit", f"--as={12 << 30}"]))
    assert code == 71, tail(tmp_path / "run")
    assert "out of memory; try a smaller batch_size" in tail(tmp_path / "run")
    (folder,) = (tmp_path / "run" / "outputs" / "runs").iterdir()
    assert (status_of(folder)["state"], status_of(folder)["exit_code"]) == ("failed", 71)


AT_ONCE = """
import os, sys
from runner.compose import config_from
from runner.faults import Locked
from runner.folder import RunFolder, run_path

configs = [config_from(["dataset=synthetic", "seed=%d" % seed, "outputs=" + sys.argv[1]]) for seed in range(20)]
(gate, opener), (hold, holder), (ear, mouth) = os.pipe(), os.pipe(), os.pipe()
for number in range(40):
    if os.fork() == 0:
        os.close(opener), os.close(holder)
        os.read(gate, 1)  # all at once: when the parent closes its end
        try:
            folder = RunFolder(run_path(configs[max(0, number - 20)]))
            os.write(mouth, b"works " + folder.path.name.encode() + b"\\n")
            os.read(hold, 1)
        except Locked as error:
            os.write(mouth, b"refused: " + str(error).encode() + b"\\n")
        os._exit(0)
os.close(opener)
said = b""
while said.count(b"\\n") < 40:
    said += os.read(ear, 1 << 16)
os.close(holder)
print(said.decode())
"""


def test_of_processes_that_start_at_once_one_works_in_a_folder(tmp_path: Path) -> None:
    """Twenty-one of one config and nineteen of others, in one moment: twenty folders, and one process in each."""
    command = [sys.executable, "-c", AT_ONCE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    lines = done.stdout.splitlines()
    works = [line.split()[1] for line in lines if line.startswith("works")]
    refused = [line for line in lines if line.startswith("refused")]
    assert len(works) == len(set(works)) == len(list((tmp_path / "runs").iterdir())) == 20
    assert len(refused) == 20
    assert all("another process works here: " in line for line in refused)


@pytest.mark.parametrize("name", ["metrics.csv", "timing.csv", "quant.csv", ".lock", "checkpoints"])
def test_a_planted_link_is_refused_and_not_followed(tmp_path: Path, name: str) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    victim.mkdir() if name == "checkpoints" else victim.write_text("mine")
    (folder / name).symlink_to(victim)
    with pytest.raises(RunnerError) as refused:
        RunFolder(folder)
    assert refused.value.code == Exit.IO
    assert not any(victim.iterdir()) if name == "checkpoints" else victim.read_text() == "mine"


def test_a_run_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "victim")
    with pytest.raises(StorageError, match="symbolic link"):
        RunFolder(tmp_path / "run")


@pytest.mark.parametrize("name", ["status.json", ".status.json.tmp-{pid}"])
def test_a_planted_link_is_replaced_not_written_through(tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name.format(pid=os.getpid())).symlink_to(victim)
    folder = RunFolder(tmp_path / "run")
    folder.status("running")
    folder.close()
    assert victim.read_text() == "mine"
    assert status_of(tmp_path / "run")["state"] == "interrupted"


def test_a_clock_that_jumps_changes_no_byte(tmp_path: Path, reference: dict[str, bytes]) -> None:
    try:
        need("faketime")
    except Skipped as reason:
        pytest.skip(str(reason))
    for shift in ("-1d", "+2d"):
        process = start(SMALL.command, tmp_path / "run", prefix=["faketime", "-f", shift])
        time.sleep(4)
        process.kill()
        finished(process)
    ends_as(reference, tmp_path / "run")


def test_without_a_network_a_download_ends_soon_and_leaves_nothing(tmp_path: Path) -> None:
    try:
        need("unshare", root=True)
        shell("unshare -n true")
    except Skipped as reason:
        pytest.skip(str(reason))
    words = ["dataset=mnist", f"dataset.root={tmp_path / 'data'}", "dataset.download=true", "trainer.progress=plain"]
    code = finished(start(words, tmp_path / "run", prefix=["unshare", "-n"]))
    assert code in {66, 78}, tail(tmp_path / "run")
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert "Traceback" not in tail(tmp_path / "run", 10_000)


# Sweeps ------------------------------------------------------------------------------------------------------------------

SWEEP = ["-m", *SMALL.command]


def states(place: Path) -> list[str]:
    return sorted(status_of(folder).get("state", "") for folder in place.glob("outputs/runs/*"))


def test_a_job_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    assert finished(start([*SWEEP, "lr=1e30,0.01"], tmp_path / "run")) == 1
    assert states(tmp_path / "run") == ["diverged", "done"]


def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    words, place = [*SWEEP, "seed=0,1,2"], tmp_path / "run"
    process = start(words, place)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and "done" not in states(place):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    finished(process)
    finished_run = next(folder for folder in place.glob("outputs/runs/*") if status_of(folder)["state"] == "done")
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*") if path.is_file()}
    assert finished(start(words, place)) == 0, tail(place)
    assert states(place) == ["done"] * 3
    assert before == {path: path.stat().st_mtime_ns for path in finished_run.rglob("*") if path.is_file()}


# With workers ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """The words of a run that decodes its images in two processes, long enough to be disturbed."""
    for split in ("train", "test"):
        write_images(tmp_path / "images" / split, ["cat", "dog"], 40, size=(24, 24))
    words = ["dataset=folder", f"dataset.root={tmp_path / 'images'}", "dataset.memory=never", "dataset.workers=2"]
    words += ["dataset.input_size=20", "model=lenet5", "model.channels=[2,3]", "model.hidden=8", "batch_size=8"]
    return [*words, "epochs=40", "trainer.progress=plain", "trainer.dashboard=none", "trainer.checkpoint_every=5"]


def folder_when_training(place: Path, process: "subprocess.Popen[bytes]") -> Path:
    """The run folder, once it holds a checkpoint."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        found = list(place.glob("outputs/runs/*/checkpoints/step-*.json"))
        if found:
            return found[0].parent.parent
        time.sleep(0.02)
    raise AssertionError(f"never got to a checkpoint: {tail(place)}")


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_group_saves_although_workers_get_it_too(
    tmp_path: Path, images: list[str], sent: signal.Signals
) -> None:
    process = start(images, tmp_path / "run")
    folder = folder_when_training(tmp_path / "run", process)
    os.killpg(process.pid, sent)
    assert finished(process) == 75, tail(tmp_path / "run")
    assert status_of(folder)["state"] == "preempted"


def test_a_killed_run_leaves_no_lock_although_its_workers_live_on(tmp_path: Path, images: list[str]) -> None:
    process = start(images, tmp_path / "run")
    folder = folder_when_training(tmp_path / "run", process)
    os.kill(process.pid, signal.SIGKILL)
    again = start(images, tmp_path / "run")
    assert finished(process) == -signal.SIGKILL
    deadline = time.monotonic() + PATIENCE
    while status_of(folder).get("pid") != again.pid and again.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    again.send_signal(signal.SIGTERM)
    assert finished(again) in {0, 75}, tail(tmp_path / "run")


def test_a_killed_worker_ends_the_run_at_once(tmp_path: Path, images: list[str]) -> None:
    process = start(images, tmp_path / "run")
    folder = folder_when_training(tmp_path / "run", process)
    workers = [pid for pid in children(process.pid) if "python" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert workers
    os.kill(workers[0], signal.SIGKILL)
    began = time.monotonic()
    assert finished(process) in {70, 74}, tail(tmp_path / "run")
    assert time.monotonic() - began < PATIENCE / 3, "it did not wait for the timeout of a batch"
    assert status_of(folder)["state"] == "failed"


def test_a_stop_while_images_are_decoded_is_prompt(tmp_path: Path) -> None:
    """Two thousand large images would take a minute; nothing of it is waited for."""
    for split in ("train", "test"):
        write_images(tmp_path / "images" / split, ["cat", "dog"], 1, size=(1500, 1500))
        for image in list((tmp_path / "images" / split).glob("*/*")):
            for number in range(500):
                image.with_stem(f"{image.stem}-{number}").hardlink_to(image)
    words = ["dataset=folder", f"dataset.root={tmp_path / 'images'}", "dataset.memory=always", "dataset.decode_size=20"]
    words += ["dataset.workers=1", "dataset.cache=null", "model=lenet5", "trainer.progress=none"]
    process, deadline = start(words, tmp_path / "run"), time.monotonic() + PATIENCE
    while not list(tmp_path.glob("run/outputs/runs/*/config.yaml")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    assert finished(process) == 75, tail(tmp_path / "run")
    assert time.monotonic() - asked < 20, "nor half of it"
    (folder,) = (tmp_path / "run" / "outputs" / "runs").iterdir()
    assert status_of(folder)["state"] == "preempted"
    assert not (folder / "layers.csv").exists(), "the data was never there"


def test_a_worker_that_hangs_ends_the_run(tmp_path: Path, images: list[str]) -> None:
    """A pipe that nobody writes to, in the place of an image: whoever opens it waits for ever."""
    victim = sorted((tmp_path / "images" / "train" / "cat").iterdir())[7]
    victim.unlink()
    os.mkfifo(victim)
    code = "import sys, runner.data.stream; runner.data.stream.TIMEOUT = 3; from runner.cli import main; main(sys.argv[1:])"
    words = [*images, "dataset.workers=1", "dataset.mean=[0.5,0.5,0.5]", "dataset.std=[0.2,0.2,0.2]"]
    log = (tmp_path / "log.txt").open("wb")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        cwd=tmp_path,
        stdout=log,
        stderr=log,
        env=environment,
        start_new_session=True,
    )
    assert finished(process) in {70, 74}, (tmp_path / "log.txt").read_text()
    assert "timed out" in (tmp_path / "log.txt").read_text()
    (folder,) = (tmp_path / "outputs" / "runs").iterdir()
    assert status_of(folder)["state"] == "failed"


def test_the_kernel_ends_a_run_for_its_memory_and_it_goes_on(tmp_path: Path) -> None:
    """A control group that a training process is put into, with next to no memory for what it asks for from then on."""
    first = Path("/sys/fs/cgroup/memory")  # version 1 of control groups; the second has all in one tree
    group = (first if first.is_dir() else first.parent) / f"torture-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if first.is_dir() else "memory.max")).write_text(str(2 << 20))
    except OSError as reason:
        pytest.skip(f"no control group can be made here: {reason}")
    words = [*SMALL.command, "epochs=200", "trainer.checkpoint_every=50"]
    try:
        process = start(words, tmp_path / "run")
        folder = folder_when_training(tmp_path / "run", process)
        (group / "cgroup.procs").write_text(str(process.pid))
        code = finished(process)
    finally:
        group.rmdir()
    if code == 0:
        pytest.skip("the run came to its end without asking for another page")
    assert code == -signal.SIGKILL, tail(tmp_path / "run")
    assert status_of(folder)["state"] == "interrupted"
    assert finished(start([*words, "trainer.progress=plain"], tmp_path / "run")) == 0, tail(tmp_path / "run")
    assert "goes on after step" in tail(tmp_path / "run", 100_000)
    assert status_of(folder)["state"] == "done"
