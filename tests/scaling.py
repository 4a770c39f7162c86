"""What a second core brings, on a machine that is left alone: python -m tests.scaling [TURNS]

ranks     images/s of ResNet-18 on 2 ranks (a core each) over 1 rank on 1 core, 64 images a rank, each normalising its share
synced    the same with the batch norms of all ranks synced, which is the default
apart     the same of two trainings that have nothing to do with each other: more than that, no two ranks can reach here
jobs      seconds of 4 jobs through joblib with 2 workers over those of the same jobs one by one

A row a turn goes to the terminal and to outputs/published/scaling.csv.
"""

import csv
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "outputs" / "published" / "scaling.csv"
QUIET = "trainer.progress=none trainer.dashboard=none trainer.device=cpu trainer.threads=1 dataset=synthetic".split()
RESNET = [
    *QUIET,
    "model=resnet18",
    "quant=none",
    "dataset.size=32",
    "dataset.test_samples=8",
    "epochs=2",
    "dataset.val_fraction=0.02",
]
JOB = [
    *QUIET,
    "model=lenet5",
    "quant=xnor",
    "dataset.size=28",
    "dataset.channels=1",
    "dataset.samples=6000",
    "epochs=5",
]


def run(command: list[str], place: Path, cores: str) -> float:
    """Seconds that a command took on these cores."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    place.mkdir(parents=True)
    began = time.monotonic()
    subprocess.run(
        ["taskset", "-c", cores, sys.executable, *command],
        cwd=place,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.monotonic() - began


def images_per_s(place: Path) -> float:
    """Of the last epoch: the first one warms up."""
    (path,) = place.glob("outputs/runs/*/timing.csv")
    return float(list(csv.DictReader(path.open(encoding="utf-8")))[-1]["images_per_s"])


def ranks(root: Path, *, synced: bool = False) -> tuple[float, float]:
    """Images/s of one rank and of two."""
    steps, share = 6, 64
    for count in (1, 2):
        words = [*RESNET, f"dataset.samples={round(steps * share * count / 0.98)}", f"batch_size={share * count}"]
        words += [f"trainer.sync_norm={str(synced).lower()}"]
        agent = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
        run([*agent, "-m", "runner", *words], root / str(count), "0,1" if count > 1 else "0")
    return images_per_s(root / "1"), images_per_s(root / "2")


def apart(root: Path) -> tuple[float, float]:
    """Images/s of one training alone, and of two at once, a core each."""
    words = ["-m", "runner", *RESNET, "dataset.samples=392", "batch_size=64"]
    run(words, root / "alone", "0")
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda core: run(words, root / core, core), "01"))
    return images_per_s(root / "alone"), images_per_s(root / "0") + images_per_s(root / "1")


def jobs(root: Path) -> tuple[float, float]:
    """Seconds one by one, and two at a time."""
    words = ["-m", "runner", "-m", *JOB, "seeds=4"]
    serial = run(words, root / "serial", "0,1")
    parallel = run([*words, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], root / "parallel", "0,1")
    return serial, parallel


def main(turns: int) -> None:
    rows = []
    for turn in range(turns):
        for what, measure in (
            ("ranks", ranks),
            ("synced", partial(ranks, synced=True)),
            ("apart", apart),
            ("jobs", jobs),
        ):
            with tempfile.TemporaryDirectory() as folder:
                one, two = measure(Path(folder))
            rows.append(
                {"what": what, "turn": turn, "one": round(one, 1), "two": round(two, 1), "ratio": round(two / one, 3)}
            )
            print(*rows[-1].values(), flush=True)
    with PUBLISHED.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(int("".join(sys.argv[1:]) or 3))
