"""The command line: verbs, help, exit codes. Heavy modules are imported only when there is work for them."""

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module

from runner.faults import ConfigError, Exit, Fault, MissingInput, exit_code, nearest
from runner.sweeps.parent import end_with_the_launcher

VERBS: dict[str, tuple[str, str]] = {
    "train": ("runner.verbs:train", "train one configuration (what happens without a verb)"),
    "evaluate": ("runner.verbs:evaluate", "measure a stored model: evaluate checkpoint=PATH (= mode=evaluate)"),
    "search": (
        "runner.sweeps.search:search",
        "look for the best settings: search sweep=NAME (needs the extra 'search')",
    ),
    "verify": ("runner.verify:verify", "prove the mathematics of every quantizer, or of quant=NAME"),
    "regime": ("runner.verbs:regime", "print and draw what the regime will do, before any training"),
    "report": (
        "runner.pages.report:report",
        "the results of finished runs: report FOLDER … [--format md|html|latex|svg|csv|curve]",
    ),
    "bench": ("runner.bench:bench", "measure this machine: bench step | conv | model"),
    "export": (
        "runner.export:export",
        "write a trained model for others: export checkpoint=PATH format=packed|onnx|safetensors",
    ),
    "predict": ("runner.predict:predict", "classify images: predict FILE IMAGE … (or folders of images)"),
    "dashboard": (
        "runner.pages.command:dashboard",
        "follow runs in a browser: dashboard [FOLDER …] [--open | --compare | --write]",
    ),
}
RUNS = "runner.verbs"  # the verbs that take every key of a run and nothing else
OWN = {"runner", "models", "quant"}
SWEEP = {"-m", "--multirun"}
MEANINGS = {
    Exit.OUT_OF_MEMORY: "out of memory; try a smaller batch_size= or trainer.accumulate=2, and run the same command again",
    Exit.INTERNAL: "an error of the program itself (above); a run folder keeps its last checkpoint",
}
HYDRA = {"--cfg", "-c", "--info", "-i", "--shell-completion", "-sc", "--hydra-help", "--package", "-p", "--resolve"}


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    warnings.formatwarning = lambda message, *_, **__: f"runner: warning: {message}\n"
    end_with_the_launcher()
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch puts large tensors on large pages: 5 % of a step
    code = run(list(sys.argv[1:] if words is None else words))
    for number in (signal.SIGINT, signal.SIGTERM):  # what is over is over: a signal from here on changes no code
        signal.signal(number, signal.SIG_IGN)
    try:
        sys.stdout.flush()
    except OSError:  # its disk is full, say; what is left has nowhere to go, and the code is still the code
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def run(words: list[str]) -> int:
    """The exit code of a command line; every error is one message on stderr."""
    try:
        return _dispatch(words)
    except KeyboardInterrupt:
        return 130
    except Exception as problem:
        error = _without_package(problem)
        code = exit_code(error)
        trace = traceback.format_exc() if code == Exit.INTERNAL else ""
        with suppress(OSError):  # the log may lie on the disk that is full
            print(f"{trace}runner: {_in_words(error, code)}", file=sys.stderr)
        return int(code)


def _in_words(error: Exception, code: Exit) -> str:
    said = str(error)
    if code not in MEANINGS:
        return said
    return f"{MEANINGS[code]} ({said.splitlines()[0]})" if said and code == Exit.OUT_OF_MEMORY else MEANINGS[code]


def _without_package(error: Exception) -> Exception:
    """A package that is not installed, said as such; any other error as it is."""
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else "runner"
    if package in OWN:
        return error
    return MissingInput(
        f"{package} is not installed; pip install -e . in the project's folder installs what this project needs"
    )


def _dispatch(words: list[str]) -> int:
    if {"-h", "--help"} & set(words):
        from runner.help import print_help, print_verb

        module = VERBS.get(words[0], ("", ""))[0].partition(":")[0]
        if module not in ("", RUNS):
            return print_verb(module)
        return print_help({name: meaning for name, (_, meaning) in VERBS.items()})
    if "--version" in words:
        from runner.help import print_version

        return print_version()
    if _is_sweep(words):
        from runner.sweeps.sweep import sweep

        return sweep(words)
    if HYDRA & {word.partition("=")[0] for word in words}:
        from runner.sweeps.sweep import hand_to_hydra

        return hand_to_hydra(words)
    if words and words[0].isidentifier() and words[0] not in VERBS:
        message = (
            f"{words[0]!r} is neither a verb nor key=value.{nearest(words[0], list(VERBS))} Verbs: {', '.join(VERBS)}"
        )
        raise ConfigError([Fault("", message)])
    name = words[0] if words and words[0] in VERBS else "train"
    rest = words[1:] if words and words[0] in VERBS else words
    return _load(VERBS[name][0])(rest)


def _is_sweep(words: Sequence[str]) -> bool:
    """Several seeds are several runs, with -m or without."""
    return bool(SWEEP & set(words)) or (words[:1] != ["search"] and any(word.startswith("seeds=") for word in words))


def _load(path: str) -> Callable[[list[str]], int]:
    module, _, function = path.partition(":")
    return getattr(import_module(module), function)  # type: ignore[no-any-return]
