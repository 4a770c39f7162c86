"""T1: SIGKILL at random moments, again and again until the run is done; then everything must be as if nothing had happened."""

import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.faults import RunnerError
from runner.folder import status_of
from runner.schema import RunConfig
from tests.torture.forks import BOARD, KILLED, Marksman, do_run, log_of, run_and_kill, run_once, tail
from tests.torture.phases import PHASES
from tests.torture.scenarios import Fingerprint, Scenario, fingerprint, row_faults, scenarios

KILLS_A_RUN = 12  # after so many, a run is left in peace to finish
Work = Callable[[RunConfig], int]
WALKED_BACK = "going back to the checkpoint before it"  # a kill must never cost a checkpoint that was committed


@dataclass
class Reference:
    """An uninterrupted run, and how long its phases took."""

    folder: Path
    print: Fingerprint
    seconds: float
    phases: dict[str, tuple[int, float]]


@dataclass
class Tally:
    """What was seen so far."""

    kills: int = 0
    runs: int = 0
    identical: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        return {
            "kills": self.kills,
            "runs": self.runs,
            "identical": self.identical,
            "rows_lost": self.rows["lost"],
            "rows_repeated": self.rows["repeated"],
            "rows_torn": self.rows["torn"],
            "phases": {phase: self.phases[phase] for phase in PHASES},
            "bad": self.bad,
        }


def reference(scenario: Scenario, place: Path, work: Work = do_run) -> Reference:
    """Run it once undisturbed. Its resume phase is unknown yet, so it is taken to be as long as two saves."""
    end = run_once(lambda: work(scenario.config), place)
    if end.code != 0:
        raise RuntimeError(f"{scenario.name}: the undisturbed run ended with {end.code}:\n{tail(place)}")
    phases = {phase: BOARD.entered(phase) for phase in PHASES}
    phases["resume"] = (1, 2 * phases["save"][1] / max(1, phases["save"][0]))
    folder = scenario.folder(place)
    return Reference(folder, fingerprint(folder), end.seconds, phases)


def torture(scenario: Scenario, known: Reference, place: Path, rng: random.Random, tally: Tally, work: Work) -> None:
    """One run from its first kill to its end."""
    folder, marksman = scenario.folder(place), Marksman(rng, known.seconds, known.phases)
    code = -9
    for _ in range(KILLS_A_RUN):
        aim = marksman.next(resumes=any((folder / "checkpoints").glob("step-*.json")))
        end = run_and_kill(lambda: work(scenario.config), place, aim)
        code = end.code
        if code not in KILLED:
            break
        tally.kills += 1
        tally.phases[end.phase] += 1
    if code in KILLED:
        code = run_once(lambda: work(scenario.config), place).code
    verdict = judge(folder, known, code, place)
    tally.runs += 1
    tally.identical += not verdict
    tally.bad += [f"{scenario.name}: {fault}" for fault in verdict]
    if code == 0:
        tally.rows.update(row_faults(folder, known.folder))


def judge(folder: Path, known: Reference, code: int, place: Path) -> list[str]:
    """What is not as in the undisturbed run; empty where nothing is."""
    if code != 0:
        return [f"ended with {code}: {tail(place)}"]
    state = status_of(folder).get("state")
    if state != "done":
        return [f"exit code 0, but status.json says {state}"]
    try:
        differing = fingerprint(folder).differences(known.print)
    except (OSError, IndexError, RunnerError) as error:
        return [f"done, but cannot be read: {error!r}"]
    walked = WALKED_BACK in log_of(place).read_text(errors="replace")
    return [f"differs in {', '.join(differing)}"] * bool(differing) + ["a kill damaged a checkpoint"] * walked


def run(kills: int, seed: int, root: Path) -> dict[str, Any]:
    """At least so many kills, over all scenarios in turn."""
    rng, tally, known = random.Random(seed), Tally(), {}
    for number, scenario in enumerate(scenarios()):
        known[scenario.name] = reference(scenario, root / f"reference-{number}")
    while tally.kills < kills:
        scenario = scenarios()[tally.runs % len(scenarios())]
        place = root / f"run-{tally.runs}"
        torture(scenario, known[scenario.name], place, rng, tally, do_run)
        if tally.identical == tally.runs:
            shutil.rmtree(place)
    missing = [phase for phase in PHASES if not tally.phases[phase]]
    if kills >= 100 and missing:
        tally.bad.append(f"no kill reached {', '.join(missing)}: the spread proves nothing about them")
    return tally.figures()
