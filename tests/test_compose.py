"""From words to a config: short forms, interpolation, the user's own folders, and words that no config can be made of."""

from pathlib import Path

import pytest
import yaml

from runner.compose import choices_of, compose_words, config_from, expand, keys_of, split_options
from runner.config import config_hash
from runner.faults import ConfigError
from runner.folder import run_path
from runner.schema import Schedule


def refusal(*words: str, folders: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        config_from(words, folders)
    return str(caught.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["modle=lenet5"], ["modle: unknown key. Did you mean 'model'?", "Known: mode, seed"]),
        (["model=lenet"], ["model: 'lenet' is not there. Did you mean 'lenet5'?", "resnet18"]),
        (["model=resnt18"], ["Did you mean 'resnet18'?"]),
        (["model=null"], ["model: None is not there", "lenet5"]),
        (["model=[lenet5]"], ["model: ['lenet5'] is not there"]),
        (["quant.gradient=exat"], ["quant.gradient: 'exat' is not accepted: 'exact', 'binop', 'paper' or 'ste'"]),
        (["trainer.epochs=0"], ["trainer.epochs: value should be greater than or equal to 1, not 0"]),
        (["regime.phases.0.lr=-1"], ["regime.phases.0.lr: value should be greater than or equal to 0, not -1"]),
        (["regime.phases.7.lr=1"], ["'regime.phases.7.lr=1' cannot be applied"]),
        (["regime.phases.x=1"], ["'regime.phases.x=1' cannot be applied"]),
        (["lrr=1"], ["lrr: unknown key. Did you mean 'lr'?"]),
        (["momentum=0.9"], ["momentum: unknown key. Did you mean regime.phases.N.momentum? Known: mode"]),
        (["momentum=0.9", "quant=8bit-rangebn"], ["Did you mean regime.phases.N.momentum or quant.momentum?"]),
        (["device=cpu"], ["device: unknown key. Did you mean trainer.device?"]),
        (["optimizer=Adam"], ["Did you mean regime.phases.N.optimizer?"]),
        (["max_steps=3"], ["Did you mean trainer.max_steps?"]),
        (["limit=3"], ["Did you mean dataset.limit?"]),
        (["root=here", "dataset=folder", "dataset.root=."], ["Did you mean dataset.root?"]),
        (["root=here"], ["Did you mean dataset.root (of dataset=cifar10, cifar100, fashion_mnist, folder, imagenet, mnist)?"]),
        (["bits=4"], ["Did you mean quant.bits (of quant=actgrad)?"]),
        (["weight_decay=0"], ["Did you mean regime.phases.N.weight_decay?"]),
        (["label_smoothing=0.1"], ["Did you mean trainer.label_smoothing?"]),
        (["input_size=32"], ["Did you mean dataset.input_size or data_regime.phases.N.input_size?"]),
        (["flip=true"], ["Did you mean dataset.augment.flip?"]),
        (["+evil=1"], ["evil: unknown key."]),
        (["++trainer.evil=1"], ["trainer.evil: unknown key."]),
        (["~quant"], ["quant: must be a mapping with a name"]),
        (["~seed"], ["seed: is missing"]),
        (["dataset=mnist", "dataset.root=/nowhere"], ["dataset.root: mnist: train-images", "/nowhere/MNIST/raw", "download"]),
        (["batch_size=5000"], ["data_regime.phases.0.batch_size: 5000 is more than the 1,150 training images of digits"]),
        (["_target_=os.system"], ["_target_: configs are data"]),
        (["+model._target_=torch.load"], ["model._target_: configs are data"]),
        (["quant={_target_: pandas.read_pickle, name: xnor}"], ["quant._target_: configs are data"]),
        (["model=lenet", "quant=xno", "seed=-1", "evil=1"], ["4 faults", "model:", "quant:", "seed:", "evil:"]),
        (["lr=nan"], ["lr: value should be a finite number, not nan"]),
        (["lr=1e999"], ["lr: value should be a finite number, not inf"]),
        (["seed=1,2"], ["seed: several values need a sweep: add -m"]),
        (["model=lenet5,vgg6"], ["model: several values need a sweep"]),
        (["name=a,b"], ["name: several values need a sweep"]),
        (["hydra.run.dir=/etc/x"], ["hydra.run.dir: Hydra's own settings", "outputs=DIR"]),
        (["hydra/launcher=joblib"], ["hydra/launcher: Hydra's own settings"]),
        (["name=${oc.env:HOME}"], ["name: '${oc.env:HOME}' calls a resolver"]),
        (["name='${a.${oc.env:HOME}}'"], ["calls a resolver"]),
        (["model.hidden=${oc.decode:5}"], ["model.hidden: '${oc.decode:5}' calls a resolver"]),
        (["name=${nope}"], ["name: '${nope}' does not resolve"]),
        (["name=${name}"], ["name: '${name}' does not resolve"]),
        (["name=${outputs}", "outputs=${name}"], ["name: '${outputs}' does not resolve"]),
        (["name='${'"], ["name"]),
        (["outputs=???"], ["outputs: is missing"]),
        (["a b=1"], ["cannot read 'a b=1'", "write key=value"]),
        (["name=a b=c"], ["cannot read"]),
        (["name=[1"], ["cannot read"]),
        (["name='a"], ["cannot read"]),
        (["name=ü"], ["cannot read", "quote a value"]),
        (["a=b=c"], ["cannot read"]),
        (["=3"], ["cannot read '=3' (it has no key)"]),
        (["+=null"], ["cannot read '+=null' (it has no key)"]),
        (["~=True", "+@=a"], ["2 faults"]),
        ([""], ["cannot read ''"]),
        (["--foo"], ["--foo: no such option.", "Known: --help"]),
        (["model"], ["cannot read 'model'"]),
        (["seed=-1", __file__], ["2 faults", f"it is a path; did you mean checkpoint={__file__}?", "seed:"]),
        (["mode=evaluate", __file__], ["a fault:", f"did you mean checkpoint={__file__}?"]),
        (["name=" + "[" * 2000], ["cannot read", " … "]),
        (["a." * 900 + "b=1"], ["cannot be applied"]),
        (["seed=" + "9" * 5000], ["cannot read"]),
        (["seed=" + "9" * 40], ["seed: value should be less than"]),
    ],
)  # fmt: skip
def test_words_that_make_no_config(words: list[str], says: list[str]) -> None:
    message = refusal(*words)
    for part in says:
        assert part in message
    assert len(message) < 3000


@pytest.mark.parametrize(
    "name", ['a,b [c] {d} "q"', "ü 猫", "../../etc/passwd", "a/b", "x" * 300, "a\nb", "=1+1", "-m", "."]
)
def test_a_name_becomes_a_folder_below_outputs(name: str, tmp_path: Path) -> None:
    quoted = "'" + name.replace("'", "\\'") + "'"
    config = config_from([f"name={quoted}", f"outputs={tmp_path}"])
    path = run_path(config)
    assert config.name == name
    assert path.parent == tmp_path / "runs"
    assert len(path.name.encode()) <= 200
    assert path.name.isascii()
    assert not path.name.startswith((".", "-"))


def test_no_secret_of_the_environment_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET", "hunter2")
    for word in (
        "name=${oc.env:SOME_SECRET}",
        "name='x ${ oc.env:SOME_SECRET }'",
        "model.hidden=${oc.env:SOME_SECRET}",
    ):
        assert "hunter2" not in refusal(word)


def test_keys_may_refer_to_keys() -> None:
    assert config_from(["seed=3", "dataset.split_seed=${seed}"]).dataset.split_seed == 3


def test_short_forms_keep_every_ratio() -> None:
    steps = config_from(["regime=cifar", "lr=0.4"]).regime.phases
    assert [phase.lr for phase in steps or []] == pytest.approx([0.4, 0.04, 0.004, 0.0004], rel=1e-15)
    warm, main = config_from(["regime=cosine", "lr=0.3"]).regime.phases or []
    assert isinstance(warm.lr, Schedule)
    assert isinstance(main.lr, Schedule)
    assert (warm.lr.start, warm.lr.end, main.lr.start, main.lr.end) == (0.0, 0.3, 0.3, 0.0)
    sizes = config_from(["data_regime=progressive", "batch_size=64", "dataset=synthetic"]).data_regime.phases
    assert [phase.batch_size for phase in sizes or []] == [64, 16]
    tiny = config_from(["data_regime=progressive", "batch_size=2"]).data_regime.phases
    assert [phase.batch_size for phase in tiny or []] == [2, 1]


def test_a_peak_is_exactly_what_was_asked_for() -> None:
    for lr in (0.3, 0.07, 1 / 3, 1e-7, 123.4):
        (phase,) = config_from([f"lr={lr!r}"]).regime.phases or []
        assert isinstance(phase.lr, Schedule)
        assert phase.lr.start == lr


def test_epochs_is_the_length_of_the_run_and_moves_no_phase() -> None:
    config = config_from(["regime=cifar", "epochs=100"])
    assert config.total_epochs == 100
    assert [phase.epoch for phase in config.regime.phases or []] == [0, 81, 122, 164]
    assert config_from(["trainer.epochs=7"]).total_epochs == config_from(["epochs=7"]).total_epochs == 7


def test_a_regime_of_the_model_leaves_the_short_forms_for_later() -> None:
    config = config_from(["regime=model", "data_regime=model", "lr=0.5", "batch_size=9"])
    assert (config.lr, config.batch_size, config.regime.phases, config.data_regime.phases) == (0.5, 9, None, None)


def test_every_choice_composes() -> None:
    apart = {"dataset", "experiment", "sweep", "trainer"}  # sweep: of `search`, no part of a run
    groups = {group: names for group, names in choices_of().items() if group not in apart}
    for index in range(max(map(len, groups.values()))):
        words = [f"{group}={names[index % len(names)]}" for group, names in groups.items()]
        config_from([*words, "dataset=synthetic", "dataset.samples=1024"])
    for name in choices_of()["dataset"]:
        assert compose_words([f"dataset={name}"]).raw["dataset"]["name"] == name


def test_a_folder_of_the_users_own_may_have_any_name(tmp_path: Path) -> None:
    for name in ("plain", "my conf, [x]", "it's", "a=b {c} ü", "back\\slash"):
        target = tmp_path / name / "model" / "mine.yaml"
        target.parent.mkdir(parents=True)
        target.write_text("name: lenet5\nhidden: 77\n", encoding="utf-8")
        assert config_from(["model=mine"], [str(tmp_path / name)]).model.arguments["hidden"] == 77
    assert "there is no folder" in refusal(folders=(str(tmp_path / "none"),))
    assert "model: 'mine' is not there" in refusal("model=mine")


def test_files_of_the_users_own_are_judged_like_words(tmp_path: Path) -> None:
    own = tmp_path / "model" / "mine.yaml"
    own.parent.mkdir()
    own.write_text(
        yaml.safe_dump({"name": "lenet5", "a.b": "${oc.env:HOME}", "_target_": "os.system", "hidden": "${nope}", 5: 1})
    )
    message = refusal("model=mine", folders=(str(tmp_path),))
    assert "model._target_: configs are data" in message
    assert "calls a resolver" in message
    assert "model.hidden: '${nope}' does not resolve" in message
    own.write_text("name: [")
    assert "cannot be applied" in refusal("model=mine", folders=(str(tmp_path),))


def test_a_sweep_becomes_one_line_a_job() -> None:
    assert [job[0] for job in expand(["quant=glob([*s*,none],exclude=8bit*)"])] == ["quant=lsq", "quant=none"]
    with pytest.raises(ConfigError, match="fits no file of conf/quant"):
        expand(["quant=glob(z*)"])
    jobs = expand(["quant=none,xnor", "seed=range(0,2)", "epochs=1", "name='a,b'", "hydra.sweep.dir=x"])
    assert [job[:3] for job in jobs] == [
        ["quant=none", "seed=0", "epochs=1"], ["quant=none", "seed=1", "epochs=1"],
        ["quant=xnor", "seed=0", "epochs=1"], ["quant=xnor", "seed=1", "epochs=1"],
    ]  # fmt: skip
    assert len({config_hash(config_from(job)) for job in jobs}) == 4
    assert config_from(jobs[0]).name == "a,b"
    with pytest.raises(ConfigError, match="cannot read"):
        expand(["a b"])


def test_options_and_keys_of_a_line() -> None:
    assert split_options(["a=1", "--config-dir", "x", "--config-dir=y", "-cd", "z"]) == (["a=1"], ["x", "y", "z"])
    assert keys_of(["a.b=1", "+c=2", "~d", "model=x"]) == ["a.b", "c", "d", "model"]
