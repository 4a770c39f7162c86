"""Several configurations in one command: what is done is skipped, what was stopped goes on, each job is a process of its own.

python -m runner -m quant=none,xnor,lsq seeds=5                      every combination
python -m runner -m … hydra/launcher=joblib hydra.launcher.n_jobs=4  elsewhere: runner/README.md, from laptop to cluster
python -m runner -m … sweep.retry=failed                             failed jobs once more, too
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import hydra

from runner.compose import conf_folder, split_options
from runner.faults import ConfigError, Exit, Fault, refuse, shortened
from runner.screen import Screen
from runner.signals import interruptible
from runner.statistics import Difference, paired_difference, spread
from runner.sweeps.jobs import Job, jobs_of
from runner.sweeps.launch import PAUSE, check_launcher, launch
from runner.sweeps.table import FINAL, Standing, standing, watched

RETRY = {"none", "failed"}
LISTED = 40  # jobs; of a larger sweep the summary lists only those that are not done


def sweep(words: Sequence[str]) -> int:
    """Check every job, launch those that are not done, say how each ended. 1 where any failed."""
    words, config_dirs = split_options([word for word in words if word not in {"-m", "--multirun", "train"}])
    refuse(
        Fault(word, "a sweep only trains: no -m and no seeds= beside another verb")
        for word in words
        if word.isidentifier() or word == "mode=evaluate"
    )
    hydra_words = [word for word in words if word.lstrip("+").startswith(("hydra/", "hydra."))]
    retry, words = _own_words([word for word in words if word not in hydra_words])
    check_launcher(hydra_words)
    asked, screen = jobs_of(words, config_dirs), Screen("auto")
    jobs = list({job.path: job for job in reversed(asked)}.values())[::-1]
    now = {job: standing(job.path) for job in jobs}
    done = {job for job in jobs if now[job].state in (FINAL if retry == "none" else {"done"})}
    todo = [job for job in jobs if job not in done]
    screen.say(f"{len(jobs)} jobs, {len(jobs) - len(todo)} of them over already; what they print: {jobs[0].log.parent}")
    if len(asked) > len(jobs):
        same = ", ".join(job.label for job in asked if job not in now)
        screen.say(f"note: left out, as nothing that can change a number tells it from another: {shortened(same)}")
    try:
        with interruptible(), watched(now, todo, screen):
            ended = _until_over(todo, hydra_words, config_dirs)
    except KeyboardInterrupt:
        _summary(_judged(now, {}), screen)
        screen.say("stopped; run the same command again to go on")
        return int(Exit.PREEMPTED)
    now = _judged(now, ended)
    _summary(now, screen)
    return int(Exit.DONE if all(one.state == "done" for one in now.values()) else Exit.JOB_FAILED)


def _until_over(todo: Sequence[Job], hydra_words: Sequence[str], config_dirs: Sequence[str]) -> dict[Job, int]:
    """The exit codes of the jobs. One that another process works at is waited for: that may end, or be killed."""
    ended: dict[Job, int] = {}
    left = list(todo)
    while left:
        codes = dict(zip(left, launch(left, hydra_words, config_dirs), strict=True))
        ended |= codes
        left = [job for job in left if codes[job] == Exit.LOCKED]
        if left:
            time.sleep(PAUSE)
    return ended


def _own_words(words: Sequence[str]) -> tuple[str, list[str]]:
    """What `sweep.retry` says, and the words of the jobs, with `seeds=5` written out."""
    retry, rest, faults = "none", list[str](), list[Fault]()
    for word in words:
        key, _, value = word.partition("=")
        if key == "sweep.retry":
            retry = value
        elif key == "seeds":
            rest.append(f"seed=range({value})")
            if not value.isdigit() or int(value) < 1:
                faults.append(Fault("seeds", f"{value!r} is not a number of seeds; seeds=5 means seed=0,1,2,3,4"))
        else:
            rest.append(word)
    if retry not in RETRY:
        faults.append(Fault("sweep.retry", f"{retry!r} is not accepted: none, failed"))
    if sum(word.startswith("seed=") for word in rest) > 1:
        faults.append(Fault("seeds", "say either seed= or seeds="))
    if faults:
        raise ConfigError(faults)
    return retry, rest


def _judged(now: dict[Job, Standing], ended: dict[Job, int]) -> dict[Job, Standing]:
    """How the jobs stand in the end. A job that could not say so itself is told by its exit code."""
    found = {job: one if one.state in FINAL and job not in ended else standing(job.path) for job, one in now.items()}
    for job, code in ended.items():
        one = found[job]
        if one.state not in FINAL and code != 0:
            found[job] = Standing(
                "stopped" if code in {75, -9, -15} else "failed", one.share, one.accuracy, _why(code, one, job.log)
            )
    return found


def _why(code: int, one: Standing, log: Path) -> str:
    if code >= 0:
        return one.reason or _last_words(log) or f"exit code {code}"
    name = signal.Signals(-code).name
    hint = "; out of memory? The same command goes on from its last checkpoint" if code == -signal.SIGKILL else ""
    return f"killed by {name}{hint}"


def _last_words(log: Path) -> str:
    """The last line that a job printed, where it could write nothing into its folder."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.removeprefix("runner: ") for line in reversed(lines) if line.strip()), "")


def _summary(now: dict[Job, Standing], screen: Screen) -> None:
    """The jobs, and what is common to the seeds of a configuration."""
    shown = [job for job in now if len(now) <= LISTED or now[job].state != "done"][:LISTED]
    rows = [[job.label, now[job].state, _percent(now[job]), now[job].reason, str(job.path)] for job in shown]
    if rows:
        screen.table("sweep", ["job", "state", "best val, %", "reason", "folder"], rows)
    done = sum(one.state == "done" for one in now.values())
    screen.say(f"{done} of {len(now)} jobs done" + (f", {len(shown)} listed" if len(shown) < len(now) else ""))
    reached: dict[str, dict[int, float]] = {}
    for job, one in now.items():
        if one.state == "done" and one.accuracy is not None:
            reached.setdefault(job.configuration, {})[job.seed] = one.accuracy
    if any(len(values) > 1 for values in reached.values()):
        screen.table(*_over_seeds(reached))


def _percent(one: Standing) -> str:
    return "" if one.accuracy is None else f"{one.accuracy:.2f}"


def _over_seeds(reached: dict[str, dict[int, float]]) -> tuple[str, list[str], list[list[object]]]:
    """Title, columns and rows: mean ± standard deviation, and the difference to the first configuration, paired by seed."""
    first = next(iter(reached))
    rows: list[list[object]] = []
    for name, values in list(reached.items())[:LISTED]:
        gap = "" if name == first else _told(paired_difference(values, reached[first]))
        rows.append([name, len(values), spread(list(values.values())), gap])
    columns = ["configuration", "n", "best val, %", f"minus {first}, points [95 %]"]
    return (
        "over seeds: mean ± standard deviation",
        columns,
        rows if len(reached) > 1 else [[*row[:3], ""] for row in rows],
    )


def _told(gap: Difference | None) -> str:
    return "no seed in common" if gap is None else f"{gap} (n = {gap.n})"


def hand_to_hydra(words: Sequence[str]) -> int:
    """Hydra's own switches: --cfg, --info, shell completion."""
    sys.argv = [sys.argv[0], *words]
    os.environ.setdefault("HYDRA_FULL_ERROR", "0")
    hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(lambda config: None)()
    return int(Exit.DONE)
