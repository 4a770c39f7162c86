"""Errors for people: what was wrong, where, what is accepted; and the exit codes of the whole program."""

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Self


class Exit(IntEnum):
    """Exit codes, the same everywhere."""

    DONE = 0
    JOB_FAILED = 1
    DIVERGED = 20
    BAD_DATA = 65
    NO_INPUT = 66
    INTERNAL = 70
    OUT_OF_MEMORY = 71
    LOCKED = 73
    IO = 74
    PREEMPTED = 75
    BAD_CONFIG = 78


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a config: the path of the key, and a sentence."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


@dataclass(frozen=True)
class Absent(Fault):
    """Nothing is wrong with the config, but something that it names is not there, or cannot be read."""


@dataclass(frozen=True)
class UnknownKey(Fault):
    """A key that is not there: `message` says where it is, if `elsewhere`, or names the nearest of those that are known."""

    known: tuple[str, ...]
    elsewhere: tuple[str, ...] = ()

    @classmethod
    def at(cls, path: str, known: Iterable[str], elsewhere: Iterable[str] = ()) -> Self:
        keys, places = tuple(known), tuple(elsewhere)
        meant = f" Did you mean {' or '.join(places)}?" if places else nearest(path.rpartition(".")[2], keys)
        return cls(path, f"unknown key.{meant} Known: {', '.join(keys)}", keys, places)


class RunnerError(Exception):
    """An error that ends the program with one clear message and an exit code of its own."""

    code = Exit.INTERNAL


class ConfigError(RunnerError):
    """Every fault of a config, in one message."""

    code = Exit.BAD_CONFIG

    def __init__(self, faults: Iterable[Fault | str]) -> None:
        self.faults = [fault if isinstance(fault, Fault) else Fault("", fault) for fault in faults]
        if self.faults and all(isinstance(fault, Absent) for fault in self.faults):
            self.code = Exit.NO_INPUT
        count = f"{len(self.faults)} faults" if len(self.faults) > 1 else "a fault"
        super().__init__("\n".join([f"the config has {count}:", *(f"  {fault}" for fault in self.faults)]))


def refuse(faults: Iterable[Fault]) -> None:
    """Raise ConfigError where there is a fault."""
    found = list(faults)
    if found:
        raise ConfigError(found)


@contextmanager
def also_known(words: Collection[str]) -> Iterator[None]:
    """A verb has words of its own besides the keys of a run: errors within name them too."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(
            UnknownKey.at(fault.path, dict.fromkeys([*words, *fault.known]), fault.elsewhere)
            if isinstance(fault, UnknownKey) and "." not in fault.path
            else fault
            for fault in error.faults
        ) from None


class MissingInput(RunnerError):
    """Something that has to be there is not: a data set, a checkpoint."""

    code = Exit.NO_INPUT


def lies_there(path: str) -> bool:
    """Whether a path names something; what is too long or too odd for a path names nothing."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def refuse_missing(named: str, key: str = "") -> None:
    """Raise MissingInput where nothing lies at the path that was named for a stored model."""
    if not Path(named).exists():
        place = f"{key}: {named}" if key else named
        raise MissingInput(f"{place}: no such file or folder; give a run folder, a checkpoint or a weights file")


class BadData(RunnerError):
    """Something that is there cannot be used: a damaged or foreign checkpoint, a corrupt image."""

    code = Exit.BAD_DATA


class Diverged(RunnerError):
    """Loss or gradient is no longer a finite number."""

    code = Exit.DIVERGED


class Locked(RunnerError):
    """Another process works in the run folder."""

    code = Exit.LOCKED


class StorageError(RunnerError):
    """Writing failed: disk full, read-only, input/output error."""

    code = Exit.IO


class LauncherFailed(RunnerError):
    """Hydra's launcher gave up; what its jobs have done stays done."""

    code = Exit.JOB_FAILED


class Preempted(RunnerError):
    """A signal asked the run to stop; it is saved and goes on when it is started again."""

    code = Exit.PREEMPTED


def exit_code(error: BaseException) -> Exit:
    """The exit code that an error ends the program with, whoever raised it."""
    match error:
        case RunnerError():
            return error.code
        case MemoryError():
            return Exit.OUT_OF_MEMORY
        case OSError():
            return Exit.IO
        case RuntimeError() if re.search("out of memory|DefaultCPUAllocator", str(error), re.IGNORECASE):
            return Exit.OUT_OF_MEMORY  # torch has no type of its own for it on the CPU
    return Exit.INTERNAL


def about_content(error: Exception) -> bool:
    """Whether what a decoder raised can be about what it was given: no stop that broke it off, no lack of memory."""
    return not isinstance(error, RunnerError) and exit_code(error) != Exit.OUT_OF_MEMORY


def nearest(word: str, known: Sequence[str]) -> str:
    """' Did you mean …?' where one of the known words is close, else nothing.

    >>> nearest("lenet", ["lenet5", "resnet18"])
    " Did you mean 'lenet5'?"
    """
    by_lower = {candidate.lower(): candidate for candidate in known}
    word = word.lower()
    swapped = [candidate for candidate in by_lower if sorted(candidate) == sorted(word)]
    hits = [*swapped, *difflib.get_close_matches(word, by_lower, n=1, cutoff=0.5)]
    return f" Did you mean {by_lower[hits[0]]!r}?" if hits else ""


def printable(text: str) -> str:
    """A text from elsewhere for one line of a terminal: what would end the line, steer the terminal or be no text is escaped.

    >>> print(printable("a\\nb \\x1b[2J"))
    a\\nb \\x1b[2J
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(value: Any) -> str:
    """The repr of a value, of a length that a message bears."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:80]} … {text[-20:]}"
