"""Sweeps: what is done is skipped, what is killed goes on, failures are told, and every launcher that can run here does."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import ttest_rel

from runner.compose import config_from
from runner.faults import ConfigError
from runner.folder import status_of
from runner.screen import Screen
from runner.statistics import interval, paired_difference
from runner.sweeps import launch
from runner.sweeps.gpu_slots import free_slot, visible_gpus
from runner.sweeps.jobs import Composer, Folders, Job, jobs_of
from runner.sweeps.sweep import _own_words, sweep
from runner.sweeps.table import Standing, Watch, standing
from tests.conftest import ROOT
from tests.torture.commands import finished, start
from tests.torture.forks import tail
from tests.torture.scenarios import Scenario, fingerprint

SMALL = Scenario("small", ("quant=none", "epochs=4", "dataset.samples=40", "trainer.checkpoint_every=4"))
KILLS = 20 if "TORTURE" in os.environ else 2


def states(place: Path) -> list[str]:
    return sorted(status_of(folder).get("state", "") for folder in place.glob("outputs/runs/*"))


def runs(place: Path) -> list[Path]:
    return sorted(place.glob("outputs/runs/*"))


# Jobs -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        ["quant=lsq", "model=resnet18", "dataset=synthetic", "seed=3", "lr=0.01"],
        ["quant=xnor", "regime.phases.0.lr=0.02", "quant.gradient=paper", "name='a b'", "epochs=7"],
        ["experiment=resnet18_cifar10_8bit", "dataset=synthetic", "batch_size=32"],
        ["regime=cosine", "dataset.augment={crop: 2, flip: true}", "trainer.epochs=${seed}", "seed=4"],
    ],
)
def test_a_config_laid_over_another_is_the_config_of_all_words(line: list[str]) -> None:
    composer = Composer([])
    composer.config([word for word in line if "/" not in word][:1] + line[1:])
    assert composer.config(line) == config_from(line)
    assert composer.config([*line, "seed=9"]) == config_from([*line, "seed=9"])


def test_seeds_are_written_out_and_jobs_know_what_they_share(tmp_path: Path) -> None:
    retry, words = _own_words(["quant=none,xnor", "seeds=3", "sweep.retry=failed", f"outputs={tmp_path}"])
    jobs = jobs_of(words, [])
    assert retry == "failed"
    assert [job.seed for job in jobs] == [0, 1, 2, 0, 1, 2]
    assert [job.label for job in jobs][:2] == ["quant=none seed=0", "quant=none seed=1"]
    assert {job.configuration for job in jobs} == {"quant=none", "quant=xnor"}


@pytest.mark.parametrize("words", [["seeds=0"], ["seeds=x"], ["seeds=2", "seed=1"], ["sweep.retry=all"]])
def test_words_of_a_sweep_that_mean_nothing_are_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError):
        _own_words(words)


def test_faults_of_all_jobs_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        jobs_of(["quant=none,xnorr", "lr=0.1,-1", f"outputs={tmp_path}"], [])
    assert "xnorr" in str(error.value)
    assert "lr" in str(error.value)


def test_remembered_folders_are_forgotten_when_a_file_that_decides_them_changes(tmp_path: Path) -> None:
    own = tmp_path / "conf" / "quant"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text((ROOT / "conf/quant/lsq.yaml").read_text())
    words, dirs = ["quant=mine", "seed=0,1", f"outputs={tmp_path}"], [str(tmp_path / "conf")]
    before = jobs_of(words, dirs)
    assert Folders(words, dirs).get(before[0].words) == before[0].path
    (own / "mine.yaml").write_text(re.sub("weight_bits: .", "weight_bits: 7", (own / "mine.yaml").read_text(), count=1))
    assert Folders(words, dirs).get(before[0].words) is None
    assert jobs_of(words, dirs)[0].path != before[0].path


def test_jobs_of_several_roots_and_of_roots_with_blanks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert jobs_of(["seed=0,1", "outputs='my runs'"], [])[0].log.parent == Path("my runs/sweeps/logs")
    assert [path.name for path in tmp_path.iterdir()] == ["my runs"]
    jobs = jobs_of(["quant=none", "outputs=a,b"], [])
    assert [str(job.sweeps) for job in jobs] == ["a/sweeps", "b/sweeps"]


def test_what_is_one_run_is_done_once_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["quant=none", "trainer.checkpoint_every=1,2", f"outputs={tmp_path}"]
    (job, same) = jobs_of(words, [])
    assert job.path == same.path
    written(job.path, "done", 3)
    assert sweep(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1 jobs" in said
    assert "left out, as nothing that can change a number tells it from another: 'trainer.checkpoint_every=2'" in said


def test_ten_thousand_jobs_that_are_done_are_skipped_quickly(tmp_path: Path) -> None:
    words = ["seed=range(0,10000)", "quant=none", f"outputs={tmp_path}"]
    known = Folders(words, [])
    for seed in range(10_000):
        path = tmp_path / "runs" / f"run-{seed}"
        path.mkdir(parents=True)
        (path / "status.json").write_text('{"state": "done", "epochs": 1}')
        known.paths["\n".join([f"seed={seed}", *words[1:]])] = str(path)
    known.new = True
    known.save()
    done = subprocess.run(
        [sys.executable, "-m", "runner", "-m", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "10000 of 10000 jobs done" in done.stdout


# What is shown ------------------------------------------------------------------------------------------------------------


def written(path: Path, state: str, epochs: int = 0) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "status.json").write_text(json.dumps({"state": state, "epochs": 4, "reason": "why\nmore"}))
    rows = "".join(f"{epoch},90.{epoch}\n" for epoch in range(epochs))
    (path / "metrics.csv").write_text(f"epoch,best_val_top1\n{rows}3,9")  # the last line is torn
    return path


def test_a_folder_says_how_its_job_stands(tmp_path: Path) -> None:
    assert standing(tmp_path / "nothing") == Standing("waiting")
    assert standing(written(tmp_path / "a", "preempted", 2)) == Standing("preempted", 0.5, 90.1, "why")
    assert standing(written(tmp_path / "b", "done", 3)) == Standing("done", 1.0, 90.2, "why")
    assert standing(written(tmp_path / "c", "preempted")) == Standing("preempted", 0.0, None, "why")


def test_the_table_follows_the_folders(tmp_path: Path) -> None:
    jobs = [Job((f"seed={n}",), (f"seed={n}",), tmp_path / str(n)) for n in range(4)]
    written(jobs[0].path, "done", 4)
    written(jobs[1].path, "failed", 1)
    screen = Screen("bar")
    watch = Watch({job: standing(job.path) for job in jobs}, jobs[1:], screen)
    watch.began -= 10
    assert [one.state for one in watch.now.values()] == ["done", "waiting", "waiting", "waiting"]
    assert watch.look() == []
    written(jobs[1].path, "done", 4)
    written(jobs[2].path, "preempted", 2)
    assert watch.look() == [jobs[1], jobs[2]]
    left = watch.seconds_left()
    assert left is not None
    assert left == pytest.approx(10 / 1.25 * 1.5, rel=0.05), "1.25 jobs in 10 s, 1.5 are left"
    with screen.console.capture() as shown:
        screen.console.print(watch)
    assert "seed=2  preempted     50%" in shown.get()
    assert "4 jobs: 2 done, 1 preempted, 1 waiting; 12 s left" in shown.get()


def test_intervals_are_those_of_a_paired_t_test() -> None:
    ours, theirs = {0: 97.0, 1: 96.2, 2: 97.9, 7: 95.0}, {0: 95.1, 1: 96.0, 2: 95.5, 9: 99.0}
    known = ttest_rel([ours[n] for n in range(3)], [theirs[n] for n in range(3)]).confidence_interval(0.95)
    low, high = interval([ours[n] - theirs[n] for n in range(3)])
    assert (low, high) == pytest.approx((known.low, known.high))
    assert str(paired_difference(ours, theirs)) == f"+1.50 [{low:+.2f}, {high:+.2f}]"
    assert paired_difference({0: 1.0}, {1: 2.0}) is None


# Real sweeps --------------------------------------------------------------------------------------------------------------


def test_failures_are_listed_and_tried_again_only_when_asked(tmp_path: Path) -> None:
    words = ["-m", *SMALL.command, "lr=1e30,0.01"]
    assert finished(start(words, tmp_path / "run")) == 1
    assert states(tmp_path / "run") == ["diverged", "done"]
    failed = next(folder for folder in runs(tmp_path / "run") if status_of(folder)["state"] == "diverged")
    before = (failed / "status.json").stat().st_mtime_ns
    assert finished(start(words, tmp_path / "run")) == 1
    assert "not finite" in tail(tmp_path / "run") or "loss is" in tail(tmp_path / "run")
    assert (failed / "status.json").stat().st_mtime_ns == before
    assert finished(start([*words, "sweep.retry=failed"], tmp_path / "run")) == 1
    assert (failed / "status.json").stat().st_mtime_ns != before


def test_a_folder_that_cannot_be_used_ends_its_job_and_the_sweep(tmp_path: Path) -> None:
    folder = SMALL.folder(tmp_path / "run")
    folder.parent.mkdir(parents=True)
    folder.symlink_to(tmp_path)
    assert finished(start(["-m", *SMALL.command, "seed=0"], tmp_path / "run")) == 1
    assert "symbolic link" in tail(tmp_path / "run")


def test_a_sweep_whose_parent_is_killed_again_and_again_ends_as_one_that_was_not(tmp_path: Path) -> None:
    words = ["-m", *SMALL.command, "seeds=3"]
    began = time.monotonic()
    assert finished(start(words, tmp_path / "alone")) == 0, tail(tmp_path / "alone")
    seconds, rng, place = time.monotonic() - began, random.Random(0), tmp_path / "killed"
    for _ in range(KILLS):
        parent = start(words, place)
        time.sleep(rng.uniform(0.2, 0.6) * seconds)
        os.kill(parent.pid, signal.SIGKILL)  # the parent alone: its jobs have to notice
        finished(parent)
    assert finished(start(words, place)) == 0, tail(place)
    assert [path.name for path in runs(place)] == [path.name for path in runs(tmp_path / "alone")]
    for one, other in zip(runs(place), runs(tmp_path / "alone"), strict=True):
        assert fingerprint(one).differences(fingerprint(other)) == []


def test_a_job_that_is_killed_is_told_and_goes_on_with_the_same_command(tmp_path: Path) -> None:
    words = ["-m", *SMALL.command, "epochs=300", "seed=0,1"]
    sweep = start(words, tmp_path / "run")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("run/outputs/runs/*/checkpoints/step-*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(int(status_of(runs(tmp_path / "run")[0])["pid"]), signal.SIGKILL)
    assert finished(sweep) == 1
    assert "killed by SIGKILL" in tail(tmp_path / "run")
    assert sorted(set(states(tmp_path / "run"))) == ["done", "interrupted"]
    assert finished(start(words, tmp_path / "run")) == 0, tail(tmp_path / "run")
    assert states(tmp_path / "run") == ["done", "done"]


# Launchers ----------------------------------------------------------------------------------------------------------------


def installed(launcher: str) -> Any:
    module = launch.EXTRAS[launcher][0]
    return pytest.mark.skipif(not launch._is_there(module), reason=f"needs the extra {launch.EXTRAS[launcher][1]!r}")


@pytest.mark.parametrize(
    ("launcher", "settings"),
    [
        pytest.param("joblib", ["hydra.launcher.n_jobs=2"], marks=installed("joblib")),
        pytest.param("submitit_local", ["hydra.launcher.timeout_min=10"], marks=installed("submitit_local")),
        pytest.param(
            "ray",
            ["+hydra.launcher.ray.init.num_cpus=2", "+hydra.launcher.ray.init.include_dashboard=false"],
            marks=[
                installed("ray"),
                pytest.mark.skipif(
                    "CLUSTER" not in os.environ, reason="starts a Ray cluster of two workers: set CLUSTER=1"
                ),
            ],
        ),
    ],
)
def test_a_launcher_runs_the_jobs(tmp_path: Path, launcher: str, settings: list[str]) -> None:
    words = ["-m", *SMALL.command, "seed=0,1", f"hydra/launcher={launcher}", *settings]
    assert finished(start(words, tmp_path / "run")) == 0, tail(tmp_path / "run")
    assert states(tmp_path / "run") == ["done", "done"]
    assert not list(tmp_path.glob("run/outputs/sweeps/.jobs-*")), "nothing is left behind"


SBATCH = """#!/bin/bash
cp "$1" "$(dirname "$0")/script"
export SLURM_JOB_ID=77 SLURM_ARRAY_JOB_ID=77 SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_JOB_NUM_NODES=1
export SLURM_JOB_NODELIST=here
for task in 0 1; do SLURM_ARRAY_TASK_ID=$task bash "$1" >/dev/null 2>&1 & done
echo "Submitted batch job 77"
"""
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do [[ $1 == --output || $1 == --error ]] && shift; shift; done
exec "$@"
"""


@installed("submitit_slurm")
def test_slurm_is_asked_for_what_the_config_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm itself is not here: two scripts take a batch job and run it. Hydra's launcher and submitit are the real ones."""
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", "#!/bin/bash\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    words = ["-m", *SMALL.command, "seed=0,1", "hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu"]
    words += ["hydra.launcher.gpus_per_node=1", "hydra.launcher.timeout_min=90", "hydra.launcher.array_parallelism=8"]
    assert finished(start(words, tmp_path / "run")) == 0, tail(tmp_path / "run")
    assert states(tmp_path / "run") == ["done", "done"]
    script = (tmp_path / "script").read_text()
    for line in ("--partition=gpu", "--gpus-per-node=1", "--time=90", "--array=0-1%2"):
        assert f"#SBATCH {line}" in script, script


def test_a_launcher_that_is_missing_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(launch.EXTRAS, "joblib", ("hydra_plugins_not_there.joblib", "joblib"))
    with pytest.raises(ConfigError, match=r"\.\[joblib\]"):
        launch.check_launcher(["hydra/launcher=joblib"])
    with pytest.raises(ConfigError, match="Did you mean 'joblib'"):
        launch.check_launcher(["hydra/launcher=jobblib"])
    with pytest.raises(ConfigError, match="runner search"):
        launch.check_launcher(["hydra/sweeper=optuna"])


def test_a_gpu_is_given_to_one_job_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where the locks lie
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "test-a, test-b")
    devices = visible_gpus()
    first, second = free_slot(devices), free_slot(devices)
    assert first is not None
    assert second is not None
    assert [first[1], second[1]] == devices
    code = f"from runner.sweeps.gpu_slots import free_slot; print(free_slot({devices!r}))"
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert other.stdout == "None\n", "another process gets none"
    os.close(first[0])
    third = free_slot(devices)
    assert third is not None
    assert third[1] == devices[0]
    os.close(second[0])
    os.close(third[0])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
