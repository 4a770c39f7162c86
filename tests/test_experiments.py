"""Every recipe composes and takes two steps, on made images of the right shape in place of its data set."""

from pathlib import Path

import pytest

from runner.compose import choices_of, compose_words, config_from
from runner.job import train

CHANNELS = {"mnist": 1, "fashion_mnist": 1, "digits": 1}
SIDES = {"mnist": 28, "fashion_mnist": 28, "digits": 28, "imagenet": 64}


@pytest.mark.parametrize("name", choices_of()["experiment"])
def test_a_recipe_takes_two_steps(name: str, tmp_path: Path) -> None:
    composition = compose_words([f"experiment={name}"])
    assert not composition.faults
    data = composition.raw["dataset"]["name"]
    made = [f"dataset.channels={CHANNELS.get(data, 3)}", f"dataset.size={SIDES.get(data, 32)}", "dataset.samples=40"]
    trial = [
        "dataset.test_samples=8",
        "batch_size=8",
        "trainer.max_steps=2",
        "trainer.threads=1",
        "trainer.progress=none",
    ]
    run = train(config_from([f"experiment={name}", "dataset=synthetic", *made, *trial, f"outputs={tmp_path}"]))
    assert (run / "summary.json").is_file()


@pytest.mark.parametrize("name", choices_of()["experiment"])
def test_a_recipe_says_what_to_expect_and_how_to_run_it(name: str) -> None:
    text = (Path(__file__).parent.parent / "conf" / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"python -m runner experiment={name}" in text
    assert "published" in text
