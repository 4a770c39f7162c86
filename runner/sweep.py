"""Several configurations in one command. Hydra expands the sweep and launches; every job is a process of its own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from runner.compose import conf_folder, config_from, expand, search_path, split_options
from runner.faults import ConfigError, Exit, Fault
from runner.folder import run_path, status_of
from runner.screen import Screen


def sweep(words: Sequence[str]) -> int:
    """Check every job, launch those that are not done, say how each ended. 1 where any failed."""
    words, config_dirs = split_options([word for word in words if word not in {"-m", "--multirun"}])
    jobs = expand(words)
    paths = {}
    faults: list[Fault] = []
    for job in jobs:
        try:
            paths[run_path(config_from(job, config_dirs))] = job
        except ConfigError as error:
            faults += [Fault(" ".join(job), str(fault)) for fault in error.faults]
    if faults:
        raise ConfigError(faults)
    _launch(words, config_dirs)
    return _report(paths)


def _launch(words: Sequence[str], config_dirs: Sequence[str]) -> None:
    """Through Hydra's own sweeper and launcher, so that hydra/launcher=joblib and the like work as they do elsewhere."""
    folders = [f"--config-dir={folder}" for folder in config_dirs]

    def job(config: DictConfig) -> int:
        """One job, in a process of its own: a crash, a kill or a lack of memory ends it alone."""
        overrides = list(HydraConfig.get().overrides.task)
        print(f"runner: {' '.join(overrides)}", flush=True)
        command = [sys.executable, "-m", "runner", *folders, *overrides, "trainer.progress=plain"]
        return subprocess.run(command, check=False).returncode

    argv = sys.argv
    sys.argv = [argv[0], *words, *search_path(config_dirs), "--multirun"]
    try:
        hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(job)()
    except SystemExit as error:
        if error.code not in (None, 0, 1):
            raise
    finally:
        sys.argv = argv


def hand_to_hydra(words: Sequence[str]) -> int:
    """Hydra's own switches: --cfg, --info, shell completion."""
    sys.argv = [sys.argv[0], *words]
    os.environ.setdefault("HYDRA_FULL_ERROR", "0")
    hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(lambda config: None)()
    return int(Exit.DONE)


def _report(paths: dict[Path, list[str]]) -> int:
    screen, rows = Screen("plain"), []
    for path, job in paths.items():
        status = status_of(path)
        rows.append(
            [
                " ".join(job),
                status.get("state", "never started"),
                next(iter(status.get("reason", "").splitlines()), ""),
                str(path),
            ]
        )
    screen.table("sweep", ["job", "state", "reason", "folder"], rows)
    return int(Exit.DONE) if all(row[1] == "done" for row in rows) else int(Exit.JOB_FAILED)
