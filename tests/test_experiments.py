"""Every recipe composes, says what to expect, and takes two steps: two made images of the right shape at a time."""

import csv
import re
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
import torch

from runner.bench.step_contest import Step
from runner.build import build
from runner.cli import run
from runner.columns import EXPECTED
from runner.compose import choices_of, config_from
from runner.config import config_hash
from runner.job import train
from runner.pages.results import Row, collect
from runner.schema import RunConfig
from runner.statistics import spread
from runner.sweeps.jobs import jobs_of
from runner.sweeps.sweep import _own_words

RECIPES = choices_of()["experiment"]
PROJECT = Path(__file__).parent.parent
FOLDER = PROJECT / "conf" / "experiment"
GREY, COLOUR = (
    {"in_channels": 1, "num_classes": 10, "image_size": 28},
    {"in_channels": 3, "num_classes": 10, "image_size": 32},
)
SHAPES = {"mnist": GREY, "cifar10": COLOUR, "imagenet": {"in_channels": 3, "num_classes": 1000, "image_size": 224}}
LARGEST = 64  # pixels: enough for two steps of a network for 224


def header(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").partition("\ndefaults:")[0]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_takes_two_steps(name: str) -> None:
    config = config_of(name)
    check_curve(config, name)
    shape = SHAPES[name.split("_")[1]]
    side = min(shape["image_size"], LARGEST)
    model = build(config, **shape).model
    images = torch.randn(2, shape["in_channels"], side, side)
    step = Step(config, torch.device("cpu"), model, images, torch.tensor([0, 1]))
    step.take()
    step.take()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients)


def test_a_recipe_trains_to_its_end(tmp_path: Path) -> None:
    words = [
        "dataset=synthetic",
        "dataset.channels=1",
        "dataset.size=28",
        "dataset.samples=60",
        "batch_size=16",
        "epochs=1",
    ]
    quiet = ["trainer.threads=1", "trainer.progress=none", f"outputs={tmp_path}"]
    path = train(config_from(["experiment=lenet5_mnist_xnor", *words, *quiet]))
    curve = PROJECT / config_of("lenet5_mnist_xnor").curve
    assert (path / "expected.csv").read_bytes() == curve.read_bytes()
    assert f"of the recipe, n = {pd.read_csv(curve)['n'].min()}" in (path / "dashboard.html").read_text(
        encoding="utf-8"
    )


def test_recipes_build_on_one_another_as_their_commands_say(tmp_path: Path) -> None:
    def trained(name: str, *words: str) -> str:
        data = ["dataset=synthetic", "dataset.size=32", "dataset.samples=24", "dataset.test_samples=8", "batch_size=4"]
        data += ["trainer.max_steps=1"]
        quiet = ["trainer.threads=1", "trainer.progress=none", "trainer.dashboard=none", f"outputs={tmp_path}"]
        return str(train(config_from([f"experiment=resnet18_cifar10_{name}", *data, *quiet, *words])))

    teacher = trained("float")
    stage1 = trained("binary_stage1", f"distill={teacher}")
    trained("binary", f"distill={teacher}", f"pretrained={stage1}", "lr=0.02")
    trained("lsq2", f"pretrained={teacher}")
    assert len(list((tmp_path / "runs").iterdir())) == 4


def config_of(name: str) -> RunConfig:
    return config_from([f"experiment={name}", "dataset=synthetic", "trainer.threads=1"])


def check_curve(config: RunConfig, name: str) -> None:
    """It is the recipe's own, no other's that it builds on, and as long as a run."""
    if config.curve is not None:
        assert Path(config.curve) == Path("outputs/published/curves") / f"{name}.csv"
        lines = (PROJECT / config.curve).read_text(encoding="utf-8").splitlines()
        assert lines[0] == ",".join(EXPECTED)
        assert len(lines) == 1 + config.total_epochs


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_to_expect_and_how_to_run_it(name: str) -> None:
    said = header(name)
    assert f"python -m runner experiment={name}" in said
    assert all(line_of(name, key) for key in ("published", "here", "time", "hardware"))
    assert "arXiv" in said or "float network beside" in said or "float NIN beside" in said


def line_of(name: str, key: str) -> str:
    """What the header says of a key."""
    (said,) = re.findall(rf"^#   {key} +(\S.*)$", header(name), re.MULTILINE)
    return str(said)


def test_the_list_of_recipes_says_what_they_say() -> None:
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = [line for line in listed.splitlines() if line.startswith("| `")]
    assert rows == [f"| `{name}` | {line_of(name, 'published')} | {line_of(name, 'here')} |" for name in RECIPES]


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_said_to_be_measured_is_in_the_rows(name: str) -> None:
    said = line_of(name, "here")
    if said.startswith("not run here"):
        return
    form = r"(.*?) %( on CIFAR-10 \(JPEG\))? after (\d+) epochs?, (n = (\d+)|one run) \((.*)\)"
    reached, jpeg, epochs, _, n, file = re.fullmatch(form, said).groups()
    rows = [row for row in collect([PROJECT / file]) if is_of_recipe(row, name)]
    assert {int(row["epochs"]) for row in rows} == {int(epochs)}
    assert {row["dataset"].endswith("jpeg") for row in rows} == {jpeg is not None}
    assert (reached, int(n or 1)) == (spread([row["test_top1"] for row in rows]).removesuffix(" (one run)"), len(rows))


def is_of_recipe(row: Row, name: str) -> bool:
    """Whether the command of a row and the recipe make one config, with data that is here put in for both."""
    here = ("dataset=synthetic", f"seed={row['seed']}", f"trainer.threads={row['threads']}")
    elsewhere = ("dataset=", "pretrained=", "distill=")  # what a reader has in a place of his own
    words = [word for word in row["command"].split() if "=" in word and not word.startswith(elsewhere)]
    return hash_of(*words, *here) == hash_of(f"experiment={name}", *here)


@cache
def hash_of(*words: str) -> str:
    """Of hundreds of rows, each of which is asked for by several recipes."""
    return config_hash(config_from(words))


@pytest.mark.parametrize("name", RECIPES)
def test_a_computed_time_is_that_of_the_bench(name: str) -> None:
    said = line_of(name, "time")
    if "bench_step_resnet18.csv" not in said:
        return
    with (PROJECT / "outputs" / "published" / "bench_step_resnet18.csv").open(encoding="utf-8", newline="") as file:
        speed = {row["name"].replace("float32", "none"): float(row["images_per_s"]) for row in csv.DictReader(file)}
    config = config_of(name)
    row = config.quant.name + " channels_last=true" * config.trainer.channels_last
    images = {"cifar10": 45_000, "mnist": 55_000 * (28 / 32) ** 2}[name.split("_")[1]]  # of 32x32 pixels
    assert said.startswith(f"{images / speed[row] / 60:.0f} minutes")


@pytest.mark.parametrize("name", RECIPES)
def test_seeds_are_all_it_takes(name: str) -> None:
    _, words = _own_words([f"experiment={name}", "seeds=3", "dataset=synthetic"])
    jobs = jobs_of(words, [])
    assert [job.seed for job in jobs] == [0, 1, 2]
    assert len({job.path for job in jobs}) == 3


def test_what_a_recipe_says_itself_holds() -> None:
    config = config_from(["experiment=resnet18_cifar10_lsq8", "dataset=synthetic"])
    assert (config.total_epochs, config.regime.phases[0].lr.start) == (1, 0.001)
    assert config_from(["experiment=resnet18_cifar10_lsq8", "dataset=synthetic", "epochs=2"]).total_epochs == 2


def test_a_wrong_name_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["experiment=lenet5_mnist_xnorr"]) == 78
    assert "Did you mean 'lenet5_mnist_xnor'?" in capsys.readouterr().err
