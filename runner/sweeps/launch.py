"""Jobs as processes: Hydra's launchers say where (here, joblib, Slurm, Ray), this says how one is started, stopped and judged."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from runner.compose import conf_folder, quoted, search_path
from runner.faults import ConfigError, Exit, Fault, LauncherFailed, nearest
from runner.files import write_json
from runner.sweeps.gpu_slots import gpu_slot
from runner.sweeps.jobs import Job
from runner.sweeps.parent import VARIABLE

EXTRAS = {  # launcher: (the module that brings it, the extra of pyproject.toml that installs it)
    "basic": ("hydra", ""),
    "joblib": ("hydra_plugins.hydra_joblib_launcher", "joblib"),
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher", "slurm"),
    "submitit_slurm": ("hydra_plugins.hydra_submitit_launcher", "slurm"),
    "ray": ("hydra_plugins.hydra_ray_launcher", "ray"),
}
LOOK_EVERY = 0.5  # seconds between two looks at whether the launcher's worker still has a parent
PAUSE = 5.0  # seconds before a job that another process works at is started again
PATIENCE = 60.0  # seconds that a job has to save after it was asked to stop


def launch(jobs: Sequence[Job], hydra_words: Sequence[str], config_dirs: Sequence[str]) -> list[int]:
    """Run the jobs through Hydra's launcher; their exit codes, in order. Raises what the launcher raises."""
    folder = jobs[0].sweeps
    here = [f"--config-dir={directory}" for directory in config_dirs]
    said = [{"words": [*here, *job.words], "log": str(job.log)} for job in jobs]
    for logs in {job.log.parent for job in jobs}:
        logs.mkdir(parents=True, exist_ok=True)
    table = Path(tempfile.mkdtemp(prefix=".jobs-", dir=folder))  # what each job is, and how it ended
    write_json(table / "jobs.json", {"place": os.getcwd(), "jobs": said})
    numbers = ",".join(map(str, range(len(jobs))))
    words = [f"table={quoted(str(table.resolve()))}", f"hydra.sweep.dir={quoted(str(folder))}", *hydra_words]
    try:
        with _command_line([*words, *search_path(config_dirs), f"job={numbers}", "--multirun"]):
            hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="jobs")(run_job)()
        return [int((table / str(number)).read_text()) for number in range(len(jobs))]
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([Fault("hydra", next(iter(str(error).splitlines()), ""))]) from error
    except Exception as error:  # of Slurm, of Ray, of a worker that was killed: the launcher's own kinds
        problem = next(iter(str(error).splitlines()), type(error).__name__)
        raise LauncherFailed(f"the launcher gave up: {problem}\nrun the same command again to go on") from error
    finally:
        shutil.rmtree(table, ignore_errors=True)


@contextmanager
def _command_line(words: list[str]) -> Iterator[None]:
    """Hydra reads sys.argv, and shows errors whole only where it is told to: we put them into words ourselves."""
    argv, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = [argv[0], *words], "1"
    try:
        yield
    finally:
        sys.argv = argv
        if full is None:
            del os.environ["HYDRA_FULL_ERROR"]


def check_launcher(hydra_words: Sequence[str]) -> None:
    """Raise ConfigError for a launcher that does not exist or is not installed, saying what installs it."""
    for word in hydra_words:
        key, _, value = word.lstrip("+").partition("=")
        if key == "hydra/sweeper" and value != "basic":
            raise ConfigError(
                [Fault(key, "a sweep runs every combination; for a search: python -m runner search sweep=NAME")]
            )
        if key != "hydra/launcher":
            continue
        if value not in EXTRAS:
            known = ", ".join(EXTRAS)
            raise ConfigError([Fault(key, f"{value!r} is not known.{nearest(value, list(EXTRAS))} Known: {known}")])
        module, extra = EXTRAS[value]
        if not _is_there(module):
            raise ConfigError([Fault(key, f"{value} is not installed; pip install -e '.[{extra}]'")])


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even its parent package
        return False


def run_job(config: DictConfig) -> None:
    """What a launcher calls, wherever it runs: one job as a process of its own. A crash or a lack of memory ends it alone."""
    table = json.loads(Path(config.table, "jobs.json").read_bytes())
    job: dict[str, Any] = table["jobs"][config.job]
    own_parent = os.getppid()
    with Path(table["place"], job["log"]).open("ab") as log, gpu_slot(job["words"]) as device:
        environment = os.environ | device | {VARIABLE: str(os.getpid())}
        command = [sys.executable, "-m", "runner", *job["words"]]
        process = subprocess.Popen(
            command, cwd=table["place"], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,  # Ctrl-C goes to us alone, and we ask the job once
        )  # fmt: skip
        code = _end_of(process, own_parent)
    Path(config.table, str(config.job)).write_text(str(code), encoding="utf-8")


def _end_of(process: "subprocess.Popen[bytes]", own_parent: int) -> int:
    """Its exit code. Whoever interrupts us interrupts the job, which then has a while to save."""
    try:
        while True:
            try:
                return process.wait(timeout=LOOK_EVERY)
            except subprocess.TimeoutExpired:
                if (
                    os.getppid() != own_parent
                ):  # the sweep was killed: nobody waits for this job, and it can go on later
                    process.kill()
                    os._exit(Exit.PREEMPTED)
    except KeyboardInterrupt:
        ask_to_stop(process)
        raise


def ask_to_stop(process: "subprocess.Popen[bytes]") -> None:
    """TERM, and KILL for one that does not follow."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
