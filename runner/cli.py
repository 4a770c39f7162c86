"""The command line: verbs, help, exit codes. Heavy modules are imported only when there is work for them."""

import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module

from runner.faults import Exit, RunnerError

VERBS: dict[str, tuple[str, str]] = {
    "train": ("runner.verbs:train", "train one configuration (what happens without a verb)"),
    "evaluate": ("runner.verbs:evaluate", "measure a stored model: evaluate checkpoint=PATH (= mode=evaluate)"),
    "regime": ("runner.verbs:regime", "print and draw what the regime will do, before any training"),
    "dashboard": ("runner.verbs:dashboard", "draw the dashboard of run folders again: dashboard FOLDER …"),
}
SWEEP = {"-m", "--multirun"}
HYDRA = {"--cfg", "-c", "--info", "-i", "--shell-completion", "-sc", "--hydra-help", "--package", "-p", "--resolve"}


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(int(run(list(sys.argv[1:] if words is None else words))))


def run(words: list[str]) -> int:
    """The exit code of a command line; every error is one message on stderr."""
    try:
        return _dispatch(words)
    except RunnerError as error:
        print(f"runner: {error}", file=sys.stderr)
        return int(error.code)
    except KeyboardInterrupt:
        return 130
    except MemoryError:
        return _out_of_memory()
    except RuntimeError as error:
        if "out of memory" in str(error).lower() or "DefaultCPUAllocator" in str(error):
            return _out_of_memory()
        return _internal()
    except OSError as error:
        print(f"runner: {error}", file=sys.stderr)
        return int(Exit.IO)
    except Exception:
        return _internal()


def _dispatch(words: list[str]) -> int:
    if {"-h", "--help"} & set(words):
        from runner.help import print_help

        return print_help()
    if SWEEP & set(words):
        from runner.sweep import sweep

        return sweep(words)
    if HYDRA & {word.partition("=")[0] for word in words}:
        from runner.sweep import hand_to_hydra

        return hand_to_hydra(words)
    name = words[0] if words and words[0] in VERBS else "train"
    rest = words[1:] if words and words[0] in VERBS else words
    return _load(VERBS[name][0])(rest)


def _load(path: str) -> Callable[[list[str]], int]:
    module, _, function = path.partition(":")
    return getattr(import_module(module), function)  # type: ignore[no-any-return]


def _out_of_memory() -> int:
    print(
        "runner: out of memory; try a smaller batch_size= or trainer.accumulate=2, and run the same command again",
        file=sys.stderr,
    )
    return int(Exit.OUT_OF_MEMORY)


def _internal() -> int:
    traceback.print_exc()
    print("runner: an error of the program itself (above); the run folder keeps its last checkpoint", file=sys.stderr)
    return int(Exit.INTERNAL)
