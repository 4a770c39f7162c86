"""What a second core brings, on a machine that is left alone:

python -m tests.scaling ranks     images/s of ResNet-18 on 2 ranks (a core each) over 1 rank on 1 core, 64 images a rank
python -m tests.scaling jobs      seconds of 4 jobs through joblib with 2 workers over those of the same jobs one by one
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
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
    "epochs=2",
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


def ranks(root: Path) -> dict[str, float]:
    steps, share = 6, 64
    for count in (1, 2):
        words = [*RESNET, f"dataset.samples={round(steps * share * count / 0.98)}", f"batch_size={share * count}"]
        agent = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
        run([*agent, "-m", "runner", *words], root / str(count), "0,1" if count > 1 else "0")
    one, two = images_per_s(root / "1"), images_per_s(root / "2")
    return {"images_per_s_1": one, "images_per_s_2": two, "ratio": round(two / one, 3)}


def jobs(root: Path) -> dict[str, float]:
    words = ["-m", "runner", "-m", *JOB, "seeds=4"]
    serial = run(words, root / "serial", "0,1")
    parallel = run([*words, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], root / "parallel", "0,1")
    return {"serial_s": round(serial, 1), "joblib_s": round(parallel, 1), "ratio": round(parallel / serial, 3)}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({name: {"ranks": ranks, "jobs": jobs}[name](Path(folder) / name) for name in sys.argv[1:]}))
