"""One training on several processes: the same curve on any number of ranks, exact resume, and no rank left waiting or behind."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from select import select
from typing import Any

import pytest
import torch

from runner.checkpoint import Checkpoints, load
from runner.compose import config_from, split_options
from runner.folder import run_path, status_of
from runner.ranks.distributed import World
from runner.ranks.place import Place
from tests.torture.scenarios import fingerprint

Launched = Callable[..., list[dict[str, Any]]]
ROOT = Path(__file__).resolve().parent.parent
QUIET = "trainer.progress=plain trainer.dashboard=none trainer.threads=1 trainer.device=cpu".split()
DATA = "dataset=synthetic dataset.size=12 dataset.channels=1 dataset.test_samples=17 dataset.classes=4".split()
TINY = ["model=torture", "plugins=[tests.torture.tiny]", "--config-dir", str(ROOT / "tests/torture/conf")]
PLAIN = [
    *DATA,
    *QUIET,
    "dataset.samples=60",
    "dataset.input_size=28",
    "model=lenet5",
    "model.channels=[4,6]",
    "model.hidden=16",
]
# dropout, batch norm, stochastic rounding, an average of the weights, two optimizers, an uneven last batch
HARD = [*DATA, *QUIET, *TINY, "dataset.samples=64", "batch_size=12", "quant=actgrad", "quant.bits=2", "trainer.ema=0.9"]
HARD += ["regime.phases=[{epoch: 0, optimizer: Adam, lr: 0.01}, {epoch: 5, optimizer: SGD, lr: 0.05, momentum: 0.9}]"]
HARD += ["epochs=12", "trainer.checkpoint_every=4"]


@pytest.fixture(scope="module")
def launched() -> Iterator[Launched]:
    """Gives what came of each launch, see tests/rank_launcher.py."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.rank_launcher", *HARD]
    launcher = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    asked, told = launcher.stdin, launcher.stdout
    assert asked is not None
    assert told is not None

    def launch(*launches: dict[str, Any]) -> list[dict[str, Any]]:
        ended = []
        for one in launches:
            asked.write(json.dumps(one, default=str).encode() + b"\n")
            assert select([told], [], [], 110)[0], "the launcher hangs"
            ended.append(json.loads(told.readline()))
        return ended

    yield launch
    launcher.kill()
    launcher.wait()


def folder(place: Path, words: list[str]) -> Path:
    return place / run_path(config_from(*split_options(words)))


def said(place: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted(place.glob("rank-*.log")))


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    model: dict[str, torch.Tensor] = load(Checkpoints(path / "checkpoints").manifests()[0]).state["model"]
    return model


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open(encoding="utf-8")))


SGD = "regime.phases=[{epoch: 0, optimizer: SGD, lr: 0.05, momentum: 0.9}]"  # Adam makes steps of rounding errors, too


def test_the_same_global_batch_gives_the_same_curve_on_one_and_two_ranks(tmp_path: Path, launched: Launched) -> None:
    words = [*PLAIN, "quant=none", "epochs=4", "batch_size=10", SGD]
    done = launched(*({"place": tmp_path / str(ranks), "ranks": ranks, "words": words} for ranks in (1, 2)))
    assert [one["codes"] for one in done] == [[0], [0, 0]], said(tmp_path / "2")
    alone, together = (rows(folder(tmp_path / str(ranks), words) / "metrics.csv") for ranks in (1, 2))
    for one, other in zip(alone, together, strict=True):
        assert (one["step"], one["train_top1"]) == (other["step"], other["train_top1"])
        for key in ("train_loss", "val_loss"):
            assert float(one[key]) == pytest.approx(float(other[key]), rel=2e-5)


def test_an_uneven_batch_falls_into_as_many_parts_on_every_rank(tmp_path: Path, launched: Launched) -> None:
    """A last batch of 7: shares of 3 and 4 images. Synced batch norms meet once a part."""
    words = [*PLAIN, "quant=none", "epochs=1", "batch_size=15", "dataset.limit=22", "trainer.accumulate=4", SGD]
    (done,) = launched({"place": tmp_path, "ranks": 2, "words": words})
    assert done["codes"] == [0, 0], said(tmp_path)


def test_ranks_that_normalise_their_own_share_train_another_curve(tmp_path: Path, launched: Launched) -> None:
    both = [
        [*PLAIN, "quant=none", "epochs=2", "batch_size=10", SGD, f"trainer.sync_norm={on}"] for on in ("true", "false")
    ]
    done = launched(*({"place": tmp_path, "ranks": 2, "words": words} for words in both))
    assert [one["codes"] for one in done] == [[0, 0], [0, 0]], said(tmp_path)
    synced, apart = (rows(folder(tmp_path, words) / "metrics.csv") for words in both)
    losses = [[float(row["train_loss"]) for row in run] for run in (synced, apart)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    assert losses[0] == pytest.approx(losses[1], rel=0.3)


@pytest.mark.parametrize("quant", ["lsq", "xnor"])
def test_what_is_set_before_the_first_step_agrees_with_one_process(
    tmp_path: Path, launched: Launched, quant: str
) -> None:
    # eleven images: the mean of ten may be one of the few values that a binary layer gives, and its sign a rounding error
    words = [*PLAIN, f"quant={quant}", "trainer.max_steps=1", "batch_size=11", SGD]
    launched(*({"place": tmp_path / str(ranks), "ranks": ranks, "words": words} for ranks in (1, 2)))
    alone, together = (load_weights(folder(tmp_path / str(ranks), words)) for ranks in (1, 2))
    assert alone.keys() == together.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_killed_training_of_several_ranks_resumes_to_the_last_bit(
    tmp_path: Path, launched: Launched, ranks: int
) -> None:
    left_alone = {"place": tmp_path / "alone", "ranks": ranks, "words": HARD}
    killed = {
        "place": tmp_path / "killed",
        "ranks": ranks,
        "words": HARD,
        "signal": signal.SIGKILL,
        "to": list(range(ranks)),
    }
    again = {"place": tmp_path / "killed", "ranks": ranks, "words": HARD}
    done = launched(left_alone, killed, again)
    assert done[0]["codes"] == done[2]["codes"] == [0] * ranks, said(tmp_path / "killed")
    assert set(done[1]["codes"]) == {-signal.SIGKILL}
    log = (tmp_path / "killed" / "rank-0.log").read_text()
    assert "goes on after step" in log
    assert "exact resume: yes" in log.rpartition("goes on after")[2]
    assert (
        fingerprint(folder(tmp_path / "killed", HARD)).differences(fingerprint(folder(tmp_path / "alone", HARD))) == []
    )
    assert [path.name for path in (tmp_path / "killed" / "outputs" / "runs").iterdir()] == [folder(tmp_path, HARD).name]


def test_a_stop_of_one_rank_is_a_stop_of_all_and_saves(tmp_path: Path, launched: Launched) -> None:
    words = [*HARD, "epochs=400"]
    (done,) = launched({"place": tmp_path, "ranks": 2, "words": words, "signal": signal.SIGTERM, "to": [1]})
    assert done["codes"] == [75, 75], said(tmp_path)
    assert status_of(folder(tmp_path, words))["state"] == "preempted"


@pytest.mark.parametrize(
    "disturbances",
    [
        [{"signal": signal.SIGKILL, "to": [1]}, {"signal": signal.SIGSTOP, "to": [0]}],
        [{"at": "wrap", "to": [1]}, {"at": "pause", "to": [1]}, {"at": "pause", "to": [0]}],
    ],
    ids=["in steps", "before the first step and at a checkpoint"],
)
def test_a_rank_that_dies_or_hangs_ends_all_and_the_folder_goes_on(
    tmp_path: Path, launched: Launched, disturbances: list[dict[str, Any]]
) -> None:
    words, places = [*HARD, "epochs=200"], [tmp_path / str(number) for number in range(len(disturbances))]
    launches = [{"place": place, "ranks": 2, "words": words, "patience": 4} for place in places]
    ended = launched(*(one | disturbance for one, disturbance in zip(launches, disturbances, strict=True)))
    for place, done, (to,) in zip(places, ended, [one["to"] for one in disturbances], strict=True):
        assert done["codes"][1 - to] == 75, said(place)
        assert done["codes"][to] == -signal.SIGKILL, said(place)
        if to == 1:
            assert status_of(folder(place, words))["state"] == "preempted"


def test_other_ranks_than_before_go_on_and_say_that_it_is_not_exact(tmp_path: Path, launched: Launched) -> None:
    words = [*HARD, "epochs=60"]
    killed = {"place": tmp_path, "ranks": 3, "words": words, "signal": signal.SIGKILL, "to": [0, 1, 2]}
    done = launched(killed, {"place": tmp_path, "ranks": 2, "words": words})
    assert done[1]["codes"] == [0, 0], said(tmp_path)
    assert "exact resume: no, because world was 3, is 2" in (tmp_path / "rank-0.log").read_text()


def test_too_few_images_for_the_ranks_are_refused(tmp_path: Path, launched: Launched) -> None:
    (done,) = launched({"place": tmp_path, "ranks": 3, "words": [*PLAIN, "quant=none", "batch_size=4", "epochs=1"]})
    assert 78 in done["codes"], said(tmp_path)
    assert "each needs two" in said(tmp_path)


ROUNDS = """
import os, sys, time, torch, torch.distributed as dist
from runner.ranks.distributed import join
from runner.sweeps.parent import end_with_parent
from runner.ranks.place import Place
agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agent.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
parent = os.getpid()
def rank(number, delay):
    end_with_parent(parent)
    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2"}
    time.sleep(delay)
    join(Place(number, number, 2), torch.device("cpu"), print)
    total = torch.tensor([number + 1])
    dist.all_reduce(total)
    os._exit(int(total))
def started(number, delay):
    pid = os.fork()
    return pid or rank(number, delay)
alone = started(1, 0.0)
time.sleep(1.5)
os.kill(alone, 9)  # it called, and nobody came
print(os.waitstatus_to_exitcode(os.waitpid(alone, 0)[1]))
for _ in range(3):
    ranks = [started(0, 1.5), started(1, 0.0)]
    print(*(os.waitstatus_to_exitcode(os.waitpid(one, 0)[1]) for one in ranks))
"""


def test_ranks_of_a_round_meet_one_another_in_a_store_that_earlier_rounds_wrote_to() -> None:
    """The first rank comes late: the other one must not take what is left of the round before."""
    code = [sys.executable, "-c", ROUNDS]
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert done.stdout.splitlines() == ["-9", "3 3", "3 3", "3 3"], done.stderr


def test_alone_every_collective_is_the_plain_thing() -> None:
    world = World(Place())
    share = world.share(5, stop=True)
    assert (share.images, share.weight, share.stop) == (5, 1.0, False)
    assert world.first_says("x") == "x"
    assert world.gathered(3) == [3]
    assert world.shard() == {"rank": 0, "world": 1}


LIGHT = [
    *PLAIN,
    "quant=none",
    "epochs=30",
    "batch_size=10",
    "trainer.checkpoint_every=4",
]  # of what takes long to load, little

# The real torchrun ------------------------------------------------------------------------------------------------------


@contextmanager
def torchrun(place: Path, words: list[str], *options: str) -> "Iterator[subprocess.Popen[bytes]]":
    """The agent. It ends with the test, and its ranks with it."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        *options,
        "-m",
        "runner",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (place / "log").open("ab") as log:
        agent = subprocess.Popen(
            [*command, *words], cwd=place, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield agent
    finally:
        agent.kill()
        agent.wait()


def ranks_of(agent: int) -> list[int]:
    """The ranks that an agent has started, in no order."""
    return [int(child) for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]


def wait_for_checkpoint(path: Path, agent: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 100
    while not list(path.glob("checkpoints/step-*.json")) and agent.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


def test_torchrun_restarts_after_a_dead_rank_and_ends_with_the_same_bits(tmp_path: Path, launched: Launched) -> None:
    with torchrun(tmp_path, LIGHT, "--max-restarts=1") as agent:
        wait_for_checkpoint(folder(tmp_path, LIGHT), agent)
        os.kill(ranks_of(agent.pid)[-1], signal.SIGKILL)
        assert agent.wait(timeout=100) == 0, (tmp_path / "log").read_text()[-3000:]
    assert "goes on after step" in (tmp_path / "log").read_text()
    launched({"place": tmp_path / "alone", "ranks": 2, "words": LIGHT})
    assert fingerprint(folder(tmp_path, LIGHT)).differences(fingerprint(folder(tmp_path / "alone", LIGHT))) == []


def test_ranks_do_not_outlive_their_agent(tmp_path: Path) -> None:
    words = [*LIGHT, "epochs=2000"]
    with torchrun(tmp_path, words) as agent:
        wait_for_checkpoint(folder(tmp_path, words), agent)
        ranks = ranks_of(agent.pid)
        assert len(ranks) == 2
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
