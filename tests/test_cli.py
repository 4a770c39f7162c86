"""The command line: exit codes, one clear message, no traceback, and no torch before there is work for it."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import Runner, environment

from runner import cli
from runner.cli import VERBS
from runner.faults import BadData, ConfigError, Exit, RunnerError, exit_code, nearest

BAD_LINES = {
    "modle=lenet5": "modle: unknown key. Did you mean 'model'?",
    "model=lenet": "Did you mean 'lenet5'?",
    "quant.gradient=exat": "Did you mean 'exact'?",
    "device=cpu": "device: unknown key. Did you mean trainer.device?",
    "export format=packed device=cpu": "Did you mean trainer.device? Known: format, out,",
    "trainer.epochs=0": "trainer.epochs: ",
    "regime.phases.0.lr=-1": "regime.phases.0.lr: ",
    "+evil=1": "evil: unknown key",
    "dataset=mnist dataset.root=/nowhere model=lenet": "Did you mean 'lenet5'?",
    "batch_size=2000": "more than the 1,150 training images",
    "regime.phases=[{epoch:0,optimizer:SGD,lr:1},{epoch:0,lr:2}]": "put them in order",
    "model._target_=os.system": "names code and is refused",
    "name=${oc.env:HOME}": "calls a resolver",
    "hydra.run.dir=/etc/x": "outputs=DIR",
    "evaluate": "say which stored model: checkpoint=PATH",
    "mode=evaluate checkpoint=/nowhere model=lenet": "Did you mean 'lenet5'?",
    "regime lr=-1": "lr: ",
    "regime regime=model": "choose a regime to draw it",
    "evalute": "Did you mean 'evaluate'?",
    "-m quant=none,xnor seed=-1,0": "seed: value should be greater than or equal to 0, not -1",
    "sweep=lenet5_bits": "sweep: says what to search: python -m runner search sweep=lenet5_bits",
    "-m model=lenet": "Did you mean 'lenet5'?",
    "--config-dir=/nowhere": "there is no folder /nowhere",
    "--config-dir": "say a folder: --config-dir DIR",
    "-m mode=evaluate checkpoint=a,b": "a sweep only trains",
    "regime seeds=3": "a sweep only trains",
    "-m quant=glob(z*)": "fits no file of conf/quant",
    "trainer.checkpoint_every=10m": "a valid integer or minutes, such as 10min, not '10m'",
    "bench step bacht=3": "Did you mean 'batch'? Known: n, variant, base, batch, threads, device, mode,",
    "bench model bacth=3": "Did you mean 'batch'? Known: n, batch, threads, memory, mode,",
    "bench conv bach=3": "Did you mean 'batch'? Known: n, batch, threads, path, quick, peers, outputs",
    "export format=packed otu=x": "Did you mean 'out'? Known: format, out, agreement, difference, mode,",
    "--epochs=3": "--epochs=3: no such option. Did you mean 'epochs=3'?",
    "--versoin": "Did you mean '--version'?",
    "bench step trainer.mixup=0.2": "trainer.mixup: is no part of the step",
    "dashboard --port 70000": "70000 is no port",
    "report --pages .": ".: is no page",
    "report --format htm": "Did you mean 'html'?",
    "plugins=[nowhere]": "plugin 'nowhere' cannot be found",
}
PROBE = """
import contextlib, io, json, sys
from runner.cli import run
answers = []
for line in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(line)
    heavy = sorted({"torch", "torchvision", "numba", "pandas", "bokeh", "sklearn"} & set(sys.modules))
    answers.append({"code": code, "out": out.getvalue(), "err": err.getvalue(), "heavy": heavy})
print(json.dumps(answers))
"""


def probed(lines: list[list[str]], cwd: Path) -> list[dict[str, object]]:
    """What `runner` answers to several lines in one process, and which heavy packages it loaded for them."""
    command, said = [sys.executable, "-c", PROBE], json.dumps(lines)
    found = subprocess.run(command, cwd=cwd, env=environment(), input=said, capture_output=True, text=True, check=True)
    return json.loads(found.stdout)  # type: ignore[no-any-return]


def test_bad_input_gets_one_message_exit_78_and_never_loads_torch(tmp_path: Path) -> None:
    answers = probed([line.split() for line in BAD_LINES], tmp_path)
    for (line, says), answer in zip(BAD_LINES.items(), answers, strict=True):
        assert answer["code"] == 78, (line, answer)
        assert str(answer["err"]).startswith("runner: the config has "), line
        assert says in str(answer["err"]), (line, answer["err"])
        assert "Traceback" not in str(answer["err"])
        assert answer["out"] == ""
        assert answer["heavy"] == [], line
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_a_config_that_only_lacks_its_data_says_so_with_a_code_of_its_own(tmp_path: Path) -> None:
    for line in ("dataset=mnist dataset.root=/nowhere", "-m dataset=mnist dataset.root=/nowhere seed=0,1"):
        (answer,) = probed([line.split()], tmp_path)
        assert answer["code"] == Exit.NO_INPUT, answer
        assert "/nowhere/MNIST/raw" in str(answer["err"])
        assert answer["heavy"] == []


def test_help_is_for_people_and_loads_nothing_heavy(tmp_path: Path) -> None:
    (answer,) = probed([["--help"]], tmp_path)
    assert answer["code"] == 0
    assert answer["heavy"] == []
    for word in ("usage:", "lenet5", "xnor", "digits", "epochs", *VERBS):
        assert word in str(answer["out"])
    assert "hydra:" not in str(answer["out"])


def test_a_verb_says_what_words_it_takes(tmp_path: Path) -> None:
    own = {name: place for name, (place, _) in VERBS.items() if not place.startswith("runner.verbs:")}
    for name, answer in zip(own, probed([[name, "--help"] for name in own], tmp_path), strict=True):
        assert (answer["code"], answer["heavy"]) == (0, [])
        assert f"{name} " in str(answer["out"])
        assert "python -m runner --help" in str(answer["out"])
    (bench,) = probed([["bench", "--help"]], tmp_path)
    assert all(word in str(bench["out"]) for word in ("bench step", "bench conv", "bench model", "`variant`", "`n`"))


def test_the_version_comes_with_what_a_number_depends_on(runner: Runner) -> None:
    found = runner("--version")
    said = dict(line.split(maxsplit=1) for line in found.stdout.splitlines())
    assert found.returncode == 0
    assert said["lowbit-runner"] == version("lowbit-runner")
    assert said["torch"] == torch.__version__
    assert len(said["code"]) == 12


def test_real_lines_end_as_they_should(runner: Runner) -> None:
    found = runner("modle=lenet5", "+evil=1", "trainer.epochs=0")
    assert found.returncode == 78
    assert found.stdout == ""
    assert "3 faults" in found.stderr
    assert "Traceback" not in found.stderr
    assert runner("evaluate", "checkpoint=/nowhere").returncode == 66


def test_the_regime_of_a_config_is_drawn_before_any_training(tmp_path: Path) -> None:
    (answer,) = probed([["regime", "regime=cosine", "epochs=12", f"outputs={tmp_path}/out"]], tmp_path)
    assert answer["code"] == 0, answer
    assert "torch" not in answer["heavy"]  # type: ignore[operator]
    assert "weight_decay" in str(answer["out"])
    assert (tmp_path / "out" / "regime.html").is_file()


def test_a_regime_says_what_it_drives_and_each_setting_once(tmp_path: Path) -> None:
    sharper = "+regime.phases.0.quant.sharpness={schedule:exponential,from:0.1,to:10}"
    lines = [
        ["regime", "quant.ste=ede", sharper, "epochs=4", f"outputs={tmp_path}"],
        ["regime", "model=resnet18", "regime=cifar", f"outputs={tmp_path}"],
    ]
    driven, stepwise = (str(answer["out"]).splitlines()[1:-1] for answer in probed(lines, tmp_path))
    assert [line.split()[-1] for line in driven] == ["quant.sharpness", "0.1", "0.3162", "1.0", "3.162"]
    assert [line.split()[:3] for line in stepwise[1:]] == [
        ["0", "0", "0"],
        ["81", "2,916", "1"],
        ["122", "4,392", "2"],
        ["164", "5,904", "3"],
    ]


def test_a_run_that_cannot_be_written_is_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "elsewhere").mkdir()
    lines = [[f"outputs={tmp_path}/file"], ["outputs=/proc/nowhere"]]
    for line, answer in zip(lines, probed(lines, tmp_path), strict=True):
        assert answer["code"] == 74, answer
        assert line[0].removeprefix("outputs=") in str(answer["err"])
        assert answer["heavy"] == []


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    from runner.compose import config_from
    from runner.folder import run_path

    folder = run_path(config_from([f"outputs={tmp_path}/out"]))
    folder.parent.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    (answer,) = probed([[f"outputs={tmp_path}/out"]], tmp_path)
    assert answer["code"] == 74
    assert "symbolic link" in str(answer["err"])


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ConfigError(["a fault"]), 78, "runner: the config has a fault:\n  a fault\n"),
        (BadData("damaged"), 65, "runner: damaged\n"),
        (OSError(28, "No space left on device"), 74, "runner: [Errno 28] No space left on device\n"),
        (MemoryError(), 71, "out of memory; try a smaller batch_size="),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 71, "out of memory"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
            71,
            "(CUDA out of memory. Tried to allocate 2 GiB)\n",
        ),
        (RuntimeError("something else"), 70, "an error of the program itself"),
        (ZeroDivisionError("division by zero"), 70, "an error of the program itself"),
        (
            ModuleNotFoundError("No module named 'hydra'", name="hydra.core"),
            66,
            "hydra is not installed; pip install -e .",
        ),
        (ModuleNotFoundError("No module named 'runner.x'", name="runner.x"), 70, "an error of the program itself"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_every_error_has_its_code_and_its_message(
    error: BaseException, code: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(words: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "_dispatch", fail)
    assert cli.run([]) == code
    told = capsys.readouterr().err
    assert says in told
    assert ("Traceback" in told) == (code == 70), "a traceback is for mistakes of the program only"


def test_exit_codes_are_an_interface() -> None:
    assert {code.name: int(code) for code in Exit} == {
        "DONE": 0, "JOB_FAILED": 1, "DIVERGED": 20, "BAD_DATA": 65, "NO_INPUT": 66, "INTERNAL": 70, "OUT_OF_MEMORY": 71,
        "LOCKED": 73, "IO": 74, "PREEMPTED": 75, "BAD_CONFIG": 78,
    }  # fmt: skip
    for error in RunnerError.__subclasses__():
        made = error([]) if error is ConfigError else error("")
        assert exit_code(made) == error.code != Exit.INTERNAL


NEAR = [("lenet", ["lenet5", "vgg6"], "lenet5"), ("sgd", ["SGD", "Adam"], "SGD"), ("nxor", ["none", "xnor"], "xnor"),
        ("zzz", ["none"], "")]  # fmt: skip


@pytest.mark.parametrize(("word", "known", "near"), NEAR)
def test_near_names(word: str, known: list[str], near: str) -> None:
    assert nearest(word, known) == (f" Did you mean {near!r}?" if near else "")
