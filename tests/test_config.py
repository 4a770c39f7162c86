"""The gate in front of every run: what is refused and how it is told, and what the hash of a config depends on."""

import copy
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.compose import compose_words, config_from
from runner.config import check, config_hash, flat
from runner.faults import ConfigError
from runner.schema import RunConfig

Raw = dict[str, Any]
BASE: Raw = compose_words([]).raw
ABSENT = object()


def changed(**values: Any) -> Raw:
    """The default config with `a__b__0=value` put at a.b.0; ABSENT takes a key out."""
    raw = copy.deepcopy(BASE)
    for path, value in values.items():
        *outer, last = path.split("__")
        place: Any = raw
        for part in outer:
            place = place[int(part) if isinstance(place, list) else part]
        if value is ABSENT:
            del place[last]
        else:
            place[int(last) if isinstance(place, list) else last] = value
    return raw


def faults(raw: Raw) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        check(raw)
    return {fault.path: fault.message for fault in caught.value.faults}


NAN, INF = math.nan, math.inf
BAD_VALUES: list[tuple[str, Any, str]] = [
    ("seed", -1, "greater than or equal to 0"),
    ("seed", 2**31, "less than"),
    ("seed", 1.5, "valid integer"),
    ("seed", True, "valid integer"),
    ("seed", "1", "valid integer"),
    ("seed", None, "valid integer"),
    ("mode", "trian", "Did you mean 'train'?"),
    ("name", 5, "valid string"),
    ("name", "\udcff", "no UTF-8"),
    ("outputs", None, "valid string"),
    ("epochs", 0, "greater than or equal to 1"),
    ("epochs", 10**9, "less than or equal to"),
    ("batch_size", 0, "greater than or equal to 1"),
    ("lr", 0, "greater than 0"),
    ("lr", -1.0, "greater than 0"),
    ("lr", NAN, "finite"),
    ("lr", INF, "finite"),
    ("lr", "abc", "valid number"),
    ("lr", [0.1], "valid number"),
    ("plugins", "abc", "valid list"),
    ("trainer__epochs", 0, "greater than or equal to 1"),
    ("trainer__max_steps", -3, "greater than or equal to 1"),
    ("trainer__label_smoothing", 1, "less than 1"),
    ("trainer__label_smoothing", NAN, "finite"),
    ("trainer__grad_clip", 0, "greater than 0"),
    ("trainer__grad_clip", INF, "finite"),
    ("trainer__ema", 1.0, "less than 1"),
    ("trainer__accumulate", 0, "greater than or equal to 1"),
    ("trainer__threads", 4785, "less than or equal to 256"),
    ("trainer__compile", 1, "valid boolean"),
    ("trainer__amp", "fp8", "'none', 'bf16' or 'fp16'"),
    ("trainer__device", "gpu", "'auto', 'cpu' or 'cuda'"),
    ("trainer__checkpoint_every", 0, "greater than or equal to 1"),
    ("trainer", None, "valid dictionary"),
    ("trainer", [1], "valid dictionary"),
    ("quant__gradient", "exat", "Did you mean 'exact'?"),
    ("quant__sharpness", 0, "greater than 0"),
    ("quant__sharpness", INF, "finite"),
    ("quant__clamp", "yes", "valid boolean"),
    ("quant__name", "xnr", "Did you mean 'xnor'?"),
    ("quant__rules", None, "valid list"),
    ("quant__rules__0__match", 5, "valid"),
    ("quant__rules__0", {"keep": True}, "is missing"),
    ("quant__rules__0__kep", True, "Did you mean 'keep'?"),
    ("quant__rules__0__gradient", "exat", "Did you mean 'exact'?"),
    ("model__hidden", 0, "greater than or equal to 1"),
    ("model__name", "lenet", "Did you mean 'lenet5'?"),
    ("dataset__val_fraction", 0, "greater than 0"),
    ("dataset__val_fraction", 1.0, "less than 1"),
    ("dataset__mean", [NAN], "finite"),
    ("dataset__std", [0.0], "greater than 0"),
    ("dataset__limit", 0, "greater than or equal to 1"),
    ("dataset__augment__crop", -1, "greater than or equal to 0"),
    ("dataset__augment__scale", [0.5], "at least 2 items"),
    ("dataset__augment__scale", [0.5, 1.5], "less than or equal to 1"),
    ("dataset__validation", "tset", "Did you mean 'test'?"),
    ("regime__phases", [], "at least 1 item"),
    ("regime__phases", [[]], "valid dictionary"),
    ("regime__phases__0__lr", -1, "greater than or equal to 0"),
    ("regime__phases__0__lr", NAN, "finite"),
    ("regime__phases__0__weight_decay", -1e-4, "greater than or equal to 0"),
    ("regime__phases__0__optimizer", "sgd", "Did you mean 'SGD'?"),
    ("regime__epochs", 0, "greater than or equal to 1"),
    ("data_regime__phases__0__batch_size", 0, "greater than or equal to 1"),
    ("data_regime__phases__0__input_size", -28, "greater than or equal to 1"),
]


@pytest.mark.parametrize(("key", "value", "says"), BAD_VALUES)
def test_a_bad_value_is_named_with_its_path_and_what_is_accepted(key: str, value: Any, says: str) -> None:
    found = faults(changed(**{key: value}))
    path = key.replace("__", ".")
    told = [message for where, message in found.items() if where == path or where.startswith(f"{path}.")]
    assert told, f"only {found}"
    assert any(says in message for message in told), told


UNKNOWN = ["evil", "float", "int", "none", "Schedule", "trainer__evil", "model__float", "quant__bits", "dataset__rooot",
           "dataset__arguments", "model__arguments", "dataset__augment__evil", "regime__evil", "regime__phases__0__learning_rate",
           "data_regime__phases__0__step", "classifier__evil", "regularizer__evil"]  # fmt: skip


@pytest.mark.parametrize("key", UNKNOWN)
def test_an_unknown_key_is_refused_and_the_known_ones_are_told(key: str) -> None:
    found = faults(changed(**{key: 1}))
    assert list(found) == [key.replace("__", ".")]
    assert "unknown key." in found[key.replace("__", ".")]
    assert "Known: " in found[key.replace("__", ".")]


@pytest.mark.parametrize(
    "key", ["_target_", "model___target_", "quant__rules__0___partial_", "regime__phases__0___target_"]
)
def test_a_key_that_names_code_is_refused_anywhere(key: str) -> None:
    for target in ("os.system", "torch.load", "pandas.read_pickle"):
        found = faults(changed(**{key: target}))
        assert any("names code and is refused" in message for message in found.values()), found


@pytest.mark.parametrize(
    "key", ["seed", "trainer__amp", "quant__name", "quant", "dataset", "dataset__augment", "regime", "outputs"]
)
def test_a_missing_key_is_named(key: str) -> None:
    path = key.replace("__", ".")
    found = faults(changed(**{key: ABSENT}))
    assert path in found or path.rpartition(".")[0] in found


def test_a_key_inside_one_of_its_own_name_is_a_fault() -> None:
    assert list(faults(changed(_target_={"_target_": None}))) == ["_target_._target_"]


def test_all_faults_come_at_once_also_those_between_keys() -> None:
    raw = changed(
        evil=1, seed=-1, trainer__epochs=0, quant__gradient="exat", batch_size=5000,
        regime__phases=[{"epoch": 0, "optimizer": "SGD", "lr": 0.1, "betas": [0.9, 0.99]}, {"epoch": 0, "lr": 1}],
    )  # fmt: skip
    assert set(faults(raw)) == {
        "evil", "seed", "trainer.epochs", "quant.gradient", "data_regime.phases.0.batch_size",
        "regime.phases.0.betas", "regime.phases.1",
    }  # fmt: skip


def test_what_is_wrong_already_is_not_judged_again() -> None:
    with pytest.raises(ConfigError) as caught:
        check(changed(seed=-1, name=5), skip={"name"})
    assert [fault.path for fault in caught.value.faults] == ["seed"]


def test_nothing_said_by_a_later_phase_is_no_way_back() -> None:
    sizes = [{"epoch": 0, "batch_size": 8, "input_size": 16}, {"epoch": 3, "batch_size": None, "input_size": None}]
    first, *_ = BASE["regime"]["phases"]
    said = faults(changed(data_regime__phases=sizes, regime__phases=[first, {"epoch": 1, "weight_decay": None}]))
    assert said.keys() == {
        "data_regime.phases.1.batch_size", "data_regime.phases.1.input_size", "regime.phases.1.weight_decay"
    }  # fmt: skip
    assert all("a phase keeps what the one before it said" in why for why in said.values())


def test_a_batch_larger_than_the_data_set_is_refused_whoever_made_it_so() -> None:
    for raw in (changed(batch_size=1151), changed(dataset__limit=20), changed(data_regime__phases__0__batch_size=2000)):
        assert "more than the" in faults(raw)["data_regime.phases.0.batch_size"]
    assert check(changed(batch_size=1150)).data_regime.phases[0].batch_size == 1150  # type: ignore[index]
    assert (
        "more than the 20 training images" in faults(changed(dataset__limit=20, dataset__drop_last=True)).popitem()[1]
    )


def test_evaluation_forms_no_batch_of_training_images() -> None:
    check(changed(mode="evaluate", checkpoint="somewhere", dataset__limit=20))


def test_what_keys_must_be_to_one_another() -> None:
    assert "say which stored model: checkpoint=PATH" in faults(changed(mode="evaluate"))["checkpoint"]
    assert "say which stored model: checkpoint=PATH" in faults(changed(mode="evaluate", checkpoint=""))["checkpoint"]
    assert "as many values" in faults(changed(dataset__mean=[0.5], dataset__std=[1.0, 1.0]))["dataset.std"]
    assert "needs a GPU" in faults(changed(trainer__amp="fp16", trainer__device="cpu"))["trainer.amp"]
    check(changed(dataset__mean=[0.5]))


def test_a_phase_drives_a_quantizer_within_the_range_of_its_key() -> None:
    phase = {"epoch": 0, "optimizer": "SGD", "lr": 0.1}
    for value, wrong in (
        ({"schedule": "exponential", "from": 0.85, "to": 1.0}, "less than 1, not 1.0"),
        (0.3, "greater than or equal to 0.5, not 0.3"),
    ):
        said = faults(changed(quant__tau=0.85, regime__phases=[phase | {"quant": {"tau": value}}]))
        assert wrong in said["regime.phases.0.quant.tau"]
    ramp = {"schedule": "exponential", "from": 0.85, "to": 0.99}
    check(
        changed(
            quant__tau=0.85,
            regime__phases=[phase | {"quant": {"tau": ramp, "sharpness": {"schedule": "constant", "from": 2}}}],
        )
    )


def test_a_missing_data_set_says_where_it_was_looked_for(tmp_path: Path) -> None:
    for name in ("mnist", "fashion_mnist", "cifar10", "cifar100", "imagenet", "folder"):
        raw = compose_words([f"dataset={name}", f"dataset.root={tmp_path}/none"]).raw
        assert f"{tmp_path}/none" in faults(raw)["dataset.root"]
    (tmp_path / "empty" / "a").mkdir(parents=True)
    (tmp_path / "empty" / "b").mkdir()
    raw["dataset"]["root"] = str(tmp_path / "empty")
    assert list(faults(raw)) == ["dataset.root"], "not its batch size"
    raw["dataset"]["root"] = "x" * 5000
    assert "name too long" in faults(raw)["dataset.root"]
    raw["dataset"]["root"] = "a\0b"
    assert "dataset.root" in faults(raw)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["model=resnet18", "quant=lsq", "lr=0.3"],
        ["regime=imagenet", "data_regime=progressive", "batch_size=64", "dataset=synthetic", "dataset.samples=4096"],
        ["regime=model", "data_regime=model", "lr=0.1", "batch_size=8"],
        [
            "regime.phases=[{step: 0, optimizer: RMSprop, lr: {schedule: step, from: 1, every: 3}, quant: {sharpness: 2}}]"
        ],
        ["quant.rules=[{match: [a, b], gradient: ste}]", "plugins=[]", "name='ü, \"x\"'", "trainer.ema=0.9"],
    ],
)
def test_a_config_survives_being_written_and_read(words: list[str]) -> None:
    config = config_from(words)
    assert check(flat(config)) == config
    assert check(yaml.safe_load(yaml.safe_dump(flat(config), allow_unicode=True))) == config
    assert check(json.loads(json.dumps(flat(config)))) == config
    assert config_hash(check(flat(config))) == config_hash(config)


def test_a_saved_phase_says_only_what_it_sets() -> None:
    saved = flat(config_from(["regime=cifar"]))["regime"]["phases"]
    assert saved[1] == {"epoch": 81, "lr": 0.01}


MATTERS = {
    "seed": 1, "lr": 0.02, "pretrained": "x.pt", "trainer__epochs": 3, "trainer__max_steps": 9, "trainer__ema": 0.9,
    "trainer__threads": 3, "trainer__amp": "bf16", "trainer__accumulate": 2, "trainer__select": "last", "model__hidden": 99,
    "quant__gradient": "ste", "quant__rules__0__keep": False, "quant__rules__0__match": "last", "dataset__val_fraction": 0.3,
    "dataset__split_seed": 1, "dataset__augment__flip": True, "dataset__limit": 500, "dataset__drop_last": True,
    "dataset__test_fraction": 0.3, "regime__phases__0__weight_decay": 0.1, "data_regime__phases__0__batch_size": 16,
    "data_regime__phases__0__input_size": 20, "quant__standardise": True, "quant__tau": 0.9, "quant__binary_weights": False,
}  # fmt: skip
CHANGES_NOTHING = {
    "name": "x", "outputs": "elsewhere", "checkpoint": "x", "trainer__checkpoint_every": 5, "trainer__progress": "none",
    "trainer__dashboard": "none", "dataset__workers": 3, "dataset__cache": "x", "dataset__memory": "always",
}  # fmt: skip


def test_the_hash_depends_on_what_can_change_a_number() -> None:
    hashes = [config_hash(check(changed(**{key: value}))) for key, value in MATTERS.items()]
    assert len({*hashes, config_hash(check(BASE))}) == len(MATTERS) + 1


def test_images_in_folders_are_known_by_their_place_and_imagenet_by_its_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for root in ("a/data", "b/data"):
        for split in ("train", "val"):
            for name in ("n01", "n02", "n03")[: 2 if root == "a/data" else 3]:
                (tmp_path / root / split / name).mkdir(parents=True)
                for k in range(4):
                    (tmp_path / root / split / name / f"{k}.JPEG").touch()
    (tmp_path / "link").symlink_to(tmp_path / "a/data")

    def named(dataset: str, root: str) -> str:
        words = [f"dataset={dataset}", f"dataset.root={root}", "dataset.decode_size=28", "batch_size=2"]
        return config_hash(config_from(words))

    monkeypatch.chdir(tmp_path / "a")
    here = [named("folder", root) for root in ("data", "data/", str(tmp_path / "a/data"), "../link")]
    subset = named("imagenet", "data")
    monkeypatch.chdir(tmp_path / "b")
    assert len({*here, named("folder", "data")}) == 2
    assert len({subset, named("imagenet", "../link"), named("imagenet", "data")}) == 2


@pytest.mark.parametrize(("key", "value"), CHANGES_NOTHING.items())
def test_the_hash_does_not_depend_on_how_a_run_is_executed(key: str, value: Any) -> None:
    assert config_hash(check(changed(**{key: value}))) == config_hash(check(BASE))


def test_a_run_is_found_again_by_a_version_that_knows_more_keys() -> None:
    older = copy.deepcopy(BASE)
    for key in ("standardise", "tau", "binary_weights"):
        del older["quant"][key]
    assert config_hash(check(older)) == config_hash(check(BASE)) == "822d549a"


def test_two_ways_to_say_a_thing_have_one_hash() -> None:
    epochs = [changed(epochs=3), changed(trainer__epochs=3), changed(regime__epochs=3)]
    epochs[0]["trainer"]["epochs"] = 3  # as ${epochs} resolves
    assert len({config_hash(check(raw)) for raw in epochs}) == 1
    short, long = changed(batch_size=16), changed(data_regime__phases__0__batch_size=16)
    assert config_hash(check(short)) == config_hash(check(long))
    for lr in (0.3, 0.007, 1 / 3):
        short, long = changed(lr=lr), copy.deepcopy(BASE)
        long["regime"]["phases"][0]["lr"] |= {"from": lr}
        assert config_hash(check(short)) == config_hash(check(long))


def test_where_the_files_lie_counts_only_for_a_folder_of_images(tmp_path: Path) -> None:
    for root in ("a", "b"):
        for part in ("train/x", "train/y", "test/x", "test/y"):
            (tmp_path / root / part).mkdir(parents=True)
            for index in range(200):
                (tmp_path / root / part / f"{index}.png").touch()
    hashes = {config_hash(config_from(["dataset=folder", f"dataset.root={tmp_path / root}"])) for root in "ab"}
    assert len(hashes) == 2
    of_memory = [f"dataset.memory={kind}" for kind in ("auto", "always", "never")]  # images are cut otherwise
    assert len({config_hash(config_from(["dataset=folder", f"dataset.root={tmp_path}/a", w])) for w in of_memory}) == 3
    words = ["dataset=mnist", "dataset.download=true"]
    assert config_hash(config_from([*words, "dataset.root=/a"])) == config_hash(
        config_from([*words, "dataset.root=/b"])
    )


# Anything at all -------------------------------------------------------------------------------------------------------

NAMES = st.sampled_from([*BASE, *BASE["trainer"], *BASE["dataset"], *BASE["quant"], *BASE["regime"]["phases"][0]])
ODD = st.sampled_from(["evil", "_target_", "float", "none", "0", "a.b", "", "step", "betas", "to"])
KEYS = NAMES | ODD | st.text(max_size=5)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | NAMES | st.just("${seed}")
VALUES = st.recursive(LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(KEYS | st.integers(), v, max_size=3))


@st.composite
def configs(draw: st.DrawFn) -> Raw:
    """The default config, with anything put anywhere, one to three times."""
    raw = copy.deepcopy(BASE)
    for _ in range(draw(st.integers(1, 3))):
        place: Any = raw
        while True:
            known = st.sampled_from(list(range(len(place)) if isinstance(place, list) else place))
            key = draw(known if isinstance(place, list) else known | KEYS)
            inner = place[key] if isinstance(place, list) else place.get(key)
            if not isinstance(inner, dict | list) or not inner or draw(st.booleans()):
                break
            place = inner
        place[key] = draw(VALUES)
    return raw


def judged(make: Callable[[], RunConfig]) -> RunConfig | None:
    """The config, or None where it was refused; any other error goes through."""
    try:
        return make()
    except ConfigError as error:
        if not error.faults:
            raise AssertionError("refused without a fault") from error
        return None


@given(configs())
def test_anything_is_a_config_or_refused(raw: Raw) -> None:
    config = judged(lambda: check(raw))
    assert config is None or check(flat(config)) == config


ASSIGNMENTS = st.builds("{}{}={}".format, st.sampled_from(["", "+", "++", "~"]), KEYS, LEAVES | st.text(max_size=12))


@settings(max_examples=max(20, int(os.environ.get("HYPOTHESIS_EXAMPLES", "200")) // 5))
@given(st.lists(ASSIGNMENTS | st.text(max_size=12), min_size=1, max_size=2))
def test_any_words_are_a_config_or_refused(words: list[str]) -> None:
    config = judged(lambda: config_from(words))
    assert config is None or check(flat(config)) == config
