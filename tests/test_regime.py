"""Schedules against their closed forms, phases, and the regimes that are refused."""

import copy
import math
import random
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from runner.build import phases_of
from runner.compose import compose_words, config_from
from runner.config import check
from runner.faults import ConfigError
from runner.regime import Clock, data_setting_at, end_of, setting_at, steps_per_epoch, timeline, value_at
from runner.schema import DataPhase, Phase, Schedule

Raw = dict[str, Any]
SGD: Raw = {"epoch": 0, "optimizer": "SGD", "lr": 0.1}


def schedule(kind: str, start: float, to: float | None = None, **more: Any) -> Schedule:
    return Schedule.model_validate({"schedule": kind, "from": start, "to": to} | more)


def phases(*raw: Raw) -> list[Phase]:
    return [Phase.model_validate(one) for one in raw]


def at(regime: list[Phase], epoch: int, batch: int = 0, *, batches: int = 10, epochs: int = 10) -> Raw:
    clock = Clock(epoch=epoch, batch=batch, batches=batches, step=epoch * batches + batch)
    return setting_at(regime, clock, epochs=epochs, steps=epochs * batches)


TIMES = [0.0, 0.1, 2.5, 3.999, 5.0, 7.7, 9.9]
CLOSED_FORMS = {
    "constant": (schedule("constant", 0.3), lambda t: 0.3),
    "linear": (schedule("linear", 0.2, 0.6), lambda t: 0.2 + 0.4 * t / 10),
    "warmup": (schedule("warmup", 0, 0.5), lambda t: 0.05 * t),
    "cosine": (schedule("cosine", 0.1, 0), lambda t: 0.05 * (1 + math.cos(math.pi * t / 10))),
    "cosine to a floor": (schedule("cosine", 1, 0.2), lambda t: 0.2 + 0.4 * (1 + math.cos(math.pi * t / 10))),
    "exponential": (schedule("exponential", 0.1, 10), lambda t: 0.1 * 100 ** (t / 10)),
    "step": (schedule("step", 0.8, gamma=0.5, every=3), lambda t: 0.8 * 0.5 ** (t // 3)),
    "length": (schedule("linear", 1, 0, length=4), lambda t: max(0.0, 1 - t / 4)),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_a_schedule_is_its_closed_form(name: str) -> None:
    value, form = CLOSED_FORMS[name]
    for time in TIMES:
        assert value_at(value, 0, 10, time) == pytest.approx(form(time), rel=1e-12), time
        assert value_at(value, 5, 15, 5 + time) == pytest.approx(form(time), rel=1e-9), "from the start of its phase"


@pytest.mark.parametrize("kind", ["linear", "warmup", "cosine", "exponential"])
def test_a_schedule_starts_and_ends_where_it_says_and_stays_there(kind: str) -> None:
    value = schedule(kind, 0.25, 0.75)
    assert value_at(value, 2, 6, 2) == pytest.approx(0.25)
    assert value_at(value, 2, 6, 0) == pytest.approx(0.25)
    for time in (6, 7, 100):
        assert value_at(value, 2, 6, time) == pytest.approx(0.75)


@given(st.sampled_from(["linear", "warmup", "cosine"]), st.floats(0, 10), st.floats(0, 10), st.floats(0, 1))
def test_a_schedule_stays_between_its_ends(kind: str, start: float, end: float, share: float) -> None:
    found = value_at(schedule(kind, start, end), 0, 20, 20 * share)
    assert min(start, end) - 1e-9 <= found <= max(start, end) + 1e-9


def test_what_a_phase_does_not_name_stays() -> None:
    regime = phases(
        {"epoch": 0, "optimizer": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True},
        {"epoch": 2, "lr": 0.01},
        {"epoch": 5, "momentum": 0.5, "regularizer": 2.0, "quant": {"sharpness": 3.0}},
        {"epoch": 7, "quant": {"sharpness": 4.0}},
    )
    first = {"optimizer": "SGD", "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}
    assert at(regime, 1, 9) == first | {"phase": 0, "lr": 0.1}
    assert at(regime, 2) == first | {"phase": 1, "lr": 0.01}
    third = first | {"lr": 0.01, "momentum": 0.5, "regularizer": 2.0}
    assert at(regime, 6) == third | {"phase": 2, "quant.sharpness": 3.0}
    assert at(regime, 8) == third | {"phase": 3, "quant.sharpness": 4.0}


def test_another_optimizer_drops_the_arguments_of_the_old_one_and_nothing_else() -> None:
    regime = phases(
        SGD | {"momentum": 0.9, "weight_decay": 1e-4, "regularizer": 1.0, "quant": {"a": 2.0}},
        {"epoch": 2, "optimizer": "Adam", "betas": [0.8, 0.9]},
        {"epoch": 4, "optimizer": "Adam", "eps": 1e-6},
        {"epoch": 6, "optimizer": "SGD"},
    )
    kept = {"lr": 0.1, "weight_decay": 1e-4, "regularizer": 1.0, "quant.a": 2.0}
    assert at(regime, 2) == kept | {"phase": 1, "optimizer": "Adam", "betas": [0.8, 0.9]}
    assert at(regime, 4) == kept | {"phase": 2, "optimizer": "Adam", "betas": [0.8, 0.9], "eps": 1e-6}
    assert at(regime, 6) == kept | {"phase": 3, "optimizer": "SGD"}, "the first momentum does not come back"


def test_a_schedule_runs_to_the_next_phase_that_sets_the_same_key() -> None:
    regime = phases(
        {"epoch": 0, "optimizer": "SGD", "lr": {"schedule": "linear", "from": 0, "to": 1}, "weight_decay": 0.5},
        {"epoch": 4, "weight_decay": 0.0},
        {"epoch": 8, "lr": {"schedule": "cosine", "from": 1, "to": 0}},
    )
    assert at(regime, 4)["lr"] == 0.5
    assert at(regime, 7, 9)["lr"] == pytest.approx(79 / 80)
    assert at(regime, 9)["lr"] == pytest.approx(0.5)
    assert at(regime, 2, epochs=4)["lr"] == 0.5, "a shorter run ends before that phase"


def test_phases_placed_by_step_change_within_an_epoch() -> None:
    regime = phases(
        {"step": 0, "optimizer": "Adam", "lr": {"schedule": "warmup", "from": 0, "to": 1}},
        {"step": 15, "lr": 0.25},
        {"step": 23, "lr": {"schedule": "step", "from": 8, "gamma": 0.5, "every": 4}},
    )
    found = [at(regime, step // 10, step % 10) for step in range(40)]
    assert [one["lr"] for one in found[:15]] == pytest.approx([step / 15 for step in range(15)])
    assert {one["lr"] for one in found[15:23]} == {0.25}
    assert [one["lr"] for one in found[23:]] == [8 * 0.5 ** ((step - 23) // 4) for step in range(23, 40)]
    assert [one["phase"] for one in found] == [0] * 15 + [1] * 8 + [2] * 17


def test_the_setting_is_a_pure_function_of_the_point() -> None:
    """Asked in any order, as often as one likes, with other questions between: the same answers."""
    regime = config_from(["regime=cosine", "lr=0.3"]).regime.phases or []
    before = copy.deepcopy(regime)
    points = [(epoch, batch) for epoch in range(10) for batch in range(10)]
    first = {point: at(regime, *point) for point in points}
    random.Random(0).shuffle(points)
    assert all(at(regime, *point) == first[point] for point in [*points, *points[:30]])
    answer = at(regime, 3)
    answer["lr"] = "spoilt"
    assert at(regime, 3) == first[3, 0]
    assert regime == before


def test_sizes_by_epoch() -> None:
    first = DataPhase(epoch=0, batch_size=256, input_size=128)
    data = [first, DataPhase(epoch=3, batch_size=64), DataPhase(epoch=5, input_size=224)]
    found = [data_setting_at(data, epoch) for epoch in (0, 2, 3, 4, 5, 99)]
    assert [one["batch_size"] for one in found] == [256, 256, 64, 64, 64, 64]
    assert [one["input_size"] for one in found] == [128, 128, 128, 128, 224, 224]
    assert [one["phase"] for one in found] == [0, 0, 1, 1, 2, 2]


STEPS = [(100, 10, False, 10), (101, 10, False, 10), (102, 10, False, 11), (102, 10, True, 10), (5, 10, False, 1),
         (1, 10, False, 0), (12, 10, True, 1), (0, 10, False, 0)]  # fmt: skip


@pytest.mark.parametrize(("samples", "batch", "drop", "steps"), STEPS)
def test_steps_of_an_epoch(samples: int, batch: int, drop: bool, steps: int) -> None:
    assert steps_per_epoch(samples, batch, drop) == steps


BY_STEP = ["regime.phases=[{step: 0, optimizer: SGD, lr: 1}, {step: 40, lr: 0.1}]", "data_regime=progressive"]
LINES = [["regime=cifar", "epochs=130"], ["regime=cosine", "epochs=7", "lr=1"], ["regime=imagenet"], BY_STEP]


@pytest.mark.parametrize("words", LINES)
def test_the_timeline_is_what_training_will_see(words: list[str]) -> None:
    config, samples = config_from([*words, "dataset=synthetic"]), 1000
    points, step = list(timeline(config, samples)), 0
    rows = [row for row in points if isinstance(row["epoch"], int)]
    assert len(rows) == config.total_epochs
    data = config.data_regime.phases or []
    lengths = [
        steps_per_epoch(samples, data_setting_at(data, epoch)["batch_size"], False) for epoch in range(len(rows))
    ]
    for epoch, row in enumerate(rows):
        clock = Clock(epoch=epoch, batch=0, batches=lengths[epoch], step=step)
        expected = setting_at(config.regime.phases or [], clock, epochs=len(rows), steps=sum(lengths))
        sizes = data_setting_at(data, epoch)
        del sizes["phase"]
        assert row == expected | sizes | {"epoch": epoch, "step": step}
        within = [point for point in points if epoch < point["epoch"] < epoch + 1]
        for point in within:
            batch = point["step"] - step
            clock = Clock(epoch=epoch, batch=batch, batches=lengths[epoch], step=point["step"])
            expected = setting_at(config.regime.phases or [], clock, epochs=len(rows), steps=sum(lengths))
            assert point == expected | sizes | {"epoch": epoch + batch / lengths[epoch], "step": point["step"]}
        step += lengths[epoch]


def test_the_timeline_leaves_out_no_phase_that_begins_within_an_epoch() -> None:
    warm = {"step": 0, "optimizer": "SGD", "lr": {"schedule": "warmup", "from": 0, "to": 0.1}}
    raw = compose_words(["epochs=3", "batch_size=20", "dataset=synthetic"]).raw
    raw["regime"]["phases"] = [warm, {"step": 20, "lr": 0.1}, {"step": 30, "lr": 0.01}, {"step": 130, "lr": 0.001}]
    rows = list(timeline(check(raw), 1000))
    firsts = {row["phase"]: (row["epoch"], row["step"], row["lr"]) for row in reversed(rows)}
    assert firsts == {0: (0, 0, 0.0), 1: (0.4, 20, 0.1), 2: (0.6, 30, 0.01), 3: (2.6, 130, 0.001)}
    assert len([row for row in rows if row["phase"] == 0]) > 5, "the way up is a curve"
    assert [row["epoch"] for row in rows if row["phase"] == 2] == [0.6, 1, 2], "what stays is told once an epoch"
    raw["trainer"]["max_steps"] = 130
    assert [row["phase"] for row in timeline(check(raw), 1000)][-1] == 2, "where the run ends before"


def test_the_end_counts_the_batches_of_every_phase_and_stops_at_max_steps() -> None:
    sizes = "data_regime.phases=[{epoch: 0, batch_size: 32}, {epoch: 2, batch_size: 64}]"
    words = ["epochs=3", sizes, "dataset=synthetic"]
    assert end_of(config_from(words), 1152) == {"epoch": 3, "step": 36 + 36 + 18}
    assert end_of(config_from([*words, "trainer.max_steps=80"]), 1152) == {"epoch": 2 + 8 / 18, "step": 80}
    assert end_of(config_from([*words, "trainer.max_steps=36"]), 1152) == {"epoch": 1, "step": 36}
    assert end_of(config_from([*words, "trainer.max_steps=500"]), 1152) == {"epoch": 3, "step": 90}


# Regimes that a model carries ------------------------------------------------------------------------------------------


class Carrier(nn.Module):
    """A network with a recipe of its own."""

    def __init__(self, regime: Any, data_regime: Any) -> None:
        super().__init__()
        self.regime, self.data_regime = regime, data_regime


OWN = config_from(["regime=model", "data_regime=model", "epochs=4"])
SIZES = [{"epoch": 0, "batch_size": 64}, {"epoch": 2, "batch_size": 16, "input_size": 20}]


def test_a_model_brings_its_phases_as_a_list_or_as_a_function_of_the_epoch() -> None:
    listed = [SGD | {"lr": 0.4}, {"epoch": 2, "lr": 0.1}]
    found, sizes = phases_of(OWN, Carrier(listed, SIZES))
    assert [phase.lr for phase in found] == [0.4, 0.1]
    assert [phase.batch_size for phase in sizes] == [64, 16]
    asked = Carrier(
        lambda epoch: {"optimizer": "SGD", "lr": 0.4 / (epoch + 1)}, lambda epoch: {"batch_size": 8 * (epoch + 1)}
    )
    found, sizes = phases_of(OWN, asked)
    assert [at(list(found), epoch, epochs=4)["lr"] for epoch in range(4)] == [0.4, 0.2, 0.4 / 3, 0.1]
    assert [data_setting_at(sizes, epoch)["batch_size"] for epoch in range(4)] == [8, 16, 24, 32]


def test_short_forms_keep_the_ratios_of_a_models_own_phases() -> None:
    listed = [SGD | {"lr": 0.4}, {"epoch": 2, "lr": {"schedule": "cosine", "from": 0.1, "to": 0.0}}]
    config = config_from(["regime=model", "data_regime=model", "lr=1", "batch_size=32"])
    found, sizes = phases_of(config, Carrier(listed, SIZES))
    assert at(list(found), 0)["lr"] == 1.0
    assert at(list(found), 2)["lr"] == pytest.approx(0.25)
    assert [phase.batch_size for phase in sizes] == [32, 8]


@pytest.mark.parametrize(
    ("regime", "sizes", "says"),
    [
        (None, SIZES, "carries no attribute `regime`"),
        ([SGD], None, "carries no attribute `data_regime`"),
        ([SGD, {"epoch": 0, "lr": 1}], SIZES, "regime of the model.phases.1: starts at 0"),
        ([{"epoch": 0, "lr": 1}], SIZES, "regime of the model.phases.0: the first phase needs"),
        ([SGD | {"lr": -1}], SIZES, "greater than or equal to 0"),
        ([SGD], [{"epoch": 1, "batch_size": 3}], "data_regime of the model.phases.0: the first phase must start at 0"),
    ],
)
def test_a_model_whose_own_phases_make_no_sense_is_refused(regime: Any, sizes: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        phases_of(OWN, Carrier(regime, sizes))


# Regimes that are refused ----------------------------------------------------------------------------------------------

BASE: Raw = compose_words([]).raw
ADAM: Raw = {"epoch": 0, "optimizer": "Adam", "lr": 0.1}


def lr(**raw: Any) -> Raw:
    return SGD | {"lr": raw}


REFUSED: list[tuple[list[Any], str, str]] = [
    ([SGD, {"epoch": 5, "lr": 1}, {"epoch": 5, "lr": 2}], "phases.2", "put them in order"),
    ([SGD, {"epoch": 5, "lr": 1}, {"epoch": 3, "lr": 2}], "phases.2", "put them in order"),
    ([SGD | {"epoch": 1}], "phases.0", "must start at 0"),
    ([{"step": 3, "optimizer": "SGD", "lr": 1}], "phases.0", "must start at 0"),
    ([SGD, {"lr": 1}], "phases.1", "needs its start"),
    ([{"optimizer": "SGD", "lr": 1}], "phases.0", "needs its start"),
    ([SGD, {"step": 5, "lr": 1}], "phases", "not by both"),
    ([SGD | {"step": 0}], "phases.0", "needs its start"),
    ([SGD, {"epoch": -1, "lr": 1}], "phases.1.epoch", "greater than or equal to 0"),
    ([SGD, {"epoch": 1.5, "lr": 1}], "phases.1.epoch", "valid integer"),
    ([SGD, {"epoch": "3", "lr": 1}], "phases.1.epoch", "valid integer"),
    ([{"epoch": 0, "lr": 0.1}], "phases.0", "needs an optimizer and an lr"),
    ([{"epoch": 0, "optimizer": "SGD"}], "phases.0", "needs an optimizer and an lr"),
    ([{"epoch": 0}, SGD | {"epoch": 1}], "phases.0", "needs an optimizer and an lr"),
    ([SGD | {"optimizer": "Adamax"}], "phases.0.optimizer", "Did you mean 'Adam'?"),
    ([SGD | {"optimizer": None}], "phases.0", "needs an optimizer"),
    ([SGD | {"learning_rate": 1}], "phases.0.learning_rate", "unknown key"),
    ([SGD | {"momentum": 1.0}], "phases.0.momentum", "less than 1"),
    ([SGD | {"momentum": -0.1}], "phases.0.momentum", "greater than or equal to 0"),
    ([SGD | {"dampening": 2}], "phases.0.dampening", "less than or equal to 1"),
    ([SGD | {"nesterov": True}], "phases.0.nesterov", "needs a momentum above 0"),
    ([SGD | {"nesterov": True, "momentum": 0.9, "dampening": 0.1}], "phases.0.nesterov", "dampening of 0"),
    ([SGD | {"nesterov": True, "momentum": 0.9}, {"epoch": 1, "momentum": 0}], "phases.1.nesterov", "needs a momentum"),
    ([SGD | {"betas": [0.9, 0.99]}], "phases.0.betas", "SGD has no betas; it takes dampening, lr"),
    ([ADAM | {"momentum": 0.9}], "phases.0.momentum", "Adam has no momentum"),
    ([ADAM | {"betas": [0.9]}], "phases.0.betas", "at least 2"),
    ([ADAM | {"betas": [0.9, 1.0]}], "phases.0.betas.1", "less than 1"),
    ([ADAM | {"eps": 0}], "phases.0.eps", "greater than 0"),
    ([ADAM, {"epoch": 1, "optimizer": "SGD", "eps": 1e-8}], "phases.1.eps", "SGD has no eps"),
    ([ADAM, {"epoch": 1, "alpha": 0.9}], "phases.1.alpha", "Adam has no alpha"),
    ([SGD | {"lr": -0.1}], "phases.0.lr", "greater than or equal to 0"),
    ([SGD | {"lr": "0.1"}], "phases.0.lr", "valid number"),
    ([SGD | {"lr": math.inf}], "phases.0.lr", "finite"),
    ([SGD | {"lr": "lambda t: 0.1"}], "phases.0.lr", "valid number"),
    ([lr(schedule="cosine", **{"from": 1})], "phases.0.lr", "schedule cosine needs to:"),
    ([lr(schedule="warmup", **{"from": 1})], "phases.0.lr", "schedule warmup needs to:"),
    ([lr(schedule="step", **{"from": 1})], "phases.0.lr", "schedule step needs every:"),
    ([lr(schedule="exponential", **{"from": 0, "to": 1})], "phases.0.lr", "above zero"),
    ([lr(schedule="exponential", **{"from": 1, "to": 0})], "phases.0.lr", "above zero"),
    ([lr(schedule="cosin", **{"from": 1, "to": 0})], "phases.0.lr.schedule", "Did you mean 'cosine'?"),
    ([lr(schedule="cosine", to=1)], "phases.0.lr.from", "is missing"),
    ([lr(schedule="cosine", **{"from": 1, "to": 0, "steps": 5})], "phases.0.lr.steps", "unknown key"),
    ([lr(schedule="linear", **{"from": 1, "to": 0, "length": 0})], "phases.0.lr.length", "greater than 0"),
    ([lr(schedule="linear", **{"from": 1, "to": -1})], "phases.0.lr.to", "greater than or equal to 0"),
    ([SGD | {"quant": {"sharpnes": 1}}], "phases.0.quant.sharpnes", "Did you mean 'sharpness'?"),
    ([SGD | {"quant": {"sharpness": -1}}], "phases.0.quant", "greater than or equal to 0"),
    ([SGD | {"quant": {"sharpness": {"schedule": "linear", "from": 1}}}], "phases.0.quant.sharpness", "needs to:"),
    ([5], "phases.0", "valid dictionary"),
    ([], "phases", "at least 1 item"),
]  # fmt: skip


@pytest.mark.parametrize(("regime", "path", "says"), REFUSED)
def test_a_regime_that_makes_no_sense_is_refused(regime: list[Any], path: str, says: str) -> None:
    raw = copy.deepcopy(BASE)
    raw["regime"]["phases"] = regime
    with pytest.raises(ConfigError) as caught:
        check(raw)
    told = {fault.path: fault.message for fault in caught.value.faults}
    near = [message for where, message in told.items() if where.startswith(f"regime.{path}")]
    assert any(says in message for message in near), told


@pytest.mark.parametrize(
    ("data", "path", "says"),
    [
        ([{"epoch": 1, "batch_size": 8}], "phases.0", "must start at 0"),
        ([{"epoch": 0}], "phases.0", "needs a batch_size"),
        ([{"epoch": 0, "batch_size": 8}, {"epoch": 0, "batch_size": 4}], "phases.1", "put them in order"),
        ([{"epoch": 0, "batch_size": 8}, {"step": 3}], "phases.1.epoch", "is missing"),
        ([{"epoch": 0, "batch_size": 8}, {"epoch": 1, "batch_size": 99999}], "phases.1.batch_size", "more than the"),
    ],
)
def test_a_data_regime_that_makes_no_sense_is_refused(data: list[Raw], path: str, says: str) -> None:
    raw = copy.deepcopy(BASE)
    raw["data_regime"]["phases"] = data
    with pytest.raises(ConfigError) as caught:
        check(raw)
    told = {fault.path: fault.message for fault in caught.value.faults}
    assert says in told[f"data_regime.{path}"]
