"""Every recipe composes, says what to expect, and takes two steps: two made images of the right shape at a time."""

from pathlib import Path

import pytest
import torch

from runner.bench.contest import Step
from runner.build import build
from runner.cli import run
from runner.columns import EXPECTED
from runner.compose import choices_of, config_from
from runner.job import train
from runner.schema import RunConfig

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
    assert (path / "expected.csv").read_bytes() == (PROJECT / config_of("lenet5_mnist_xnor").curve).read_bytes()
    assert "of the recipe, n = 3" in (path / "dashboard.html").read_text(encoding="utf-8")


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
    for key in ("published", "here", "time"):
        assert f"#   {key}  " in said
    assert "arXiv" in said or "float network beside" in said or "float NIN beside" in said


def test_the_list_of_recipes_is_whole() -> None:
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip() for line in listed.splitlines() if line.startswith("| `")]
    assert sorted(row.strip("`") for row in rows) == RECIPES


def test_what_a_recipe_says_itself_holds() -> None:
    config = config_from(["experiment=resnet18_cifar10_lsq8", "dataset=synthetic"])
    assert (config.total_epochs, config.regime.phases[0].lr.start) == (1, 0.001)
    assert config_from(["experiment=resnet18_cifar10_lsq8", "dataset=synthetic", "epochs=2"]).total_epochs == 2


def test_a_wrong_name_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["experiment=lenet5_mnist_xnorr"]) == 78
    assert "Did you mean 'lenet5_mnist_xnor'?" in capsys.readouterr().err
