"""Results of finished runs: one row a run, grouped over seeds, with spread and differences to float.

A difference to float is paired by seed, with a 95 % confidence interval (Student's t) from three seeds on. No torch here.
"""

import csv
import io
import json
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from runner.faults import ConfigError, Fault
from runner.pages.records import find_runs, read_config
from runner.pages.settings import CHOSEN, NO_SETTINGS, flatten, usual_settings
from runner.statistics import Difference, paired_difference

ROW = (
    "model", "dataset", "quant", "settings", "seed", "epochs", "test_top1", "best_val_top1", "train_seconds", "images_per_s",
    "saved_bytes_per_sample", "peak_memory_bytes", "float_bytes", "packed_bytes", "cpu", "threads", "torch", "code", "command",
)  # fmt: skip
NUMBERS = {
    "test_top1",
    "best_val_top1",
    "train_seconds",
    "images_per_s",
    "saved_bytes_per_sample",
    "float_bytes",
    "packed_bytes",
    "peak_memory_bytes",
}
LONGEST = 100  # letters of a name
PLACES = ("outputs=", "dataset.root=", "dataset.cache=", "name=")
# What a recipe makes another network with; blocks and activations belong to how a network is made binary.
SIZES = {f"model.{key}" for key in ("depth", "arch", "width", "channels", "hidden", "kernel", "stem")}
# Of a data set's keys, those that change how images are trained on, not which ones.
OF_TRAINING = ("dataset.augment.", "dataset.drop_last=", "dataset.input_size=", "dataset.mean=", "dataset.std=")
NEEDED = {*CHOSEN, "seed", "epochs", "test_top1"}  # of a summary, to be a row
Row = dict[str, Any]
Task = tuple[str, str, int]  # network, data, epochs


def collect(paths: Iterable[Path]) -> list[Row]:
    """One row a finished run: from run folders, or from CSV files that hold such rows already."""
    rows: list[Row] = []
    for path in paths:
        if path.is_file():
            rows += _from_csv(path)
        else:
            rows += [row for folder in find_runs(path) if (row := _row(folder)) is not None]
    _tell_apart(rows)
    rows = list(
        {(*_configuration(row), row["seed"]): row for row in rows}.values()
    )  # a configuration counts once a seed
    return sorted(rows, key=_place)


def _from_csv(path: Path) -> list[Row]:
    table = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig", errors="replace")))
    lost = set(ROW) - set(table.fieldnames or ())
    if lost:
        raise ConfigError(
            [Fault(str(path), f"holds no rows of `report --format csv`: no column {', '.join(sorted(lost))}")]
        )
    rows = list(table)
    torn = [str(number) for number, row in enumerate(rows, 2) if None in row or None in row.values()]
    if torn:
        raise ConfigError([Fault(str(path), f"line {', '.join(torn)} has not as many cells as the first one")])
    faults = [fault for number, row in enumerate(rows, 2) for fault in _wrong_numbers(row, f"{path}: line {number}")]
    if faults:
        raise ConfigError(faults)
    return [_numbers(row) for row in rows]


def _wrong_numbers(row: dict[str, str], place: str) -> Iterator[Fault]:
    """Cells that should hold a number and do not; a figure that a run did not take is an empty one."""
    for key in ("seed", "epochs"):
        if not re.fullmatch(r"\d{1,18}", row[key]):
            yield Fault(f"{place}, {key}", f"{row[key]!r} is no whole number")
    for key in sorted(NUMBERS):
        if (row[key] or key in NEEDED) and not _is_finite(row[key]):
            yield Fault(f"{place}, {key}", f"{row[key]!r} is no number")


def _is_finite(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _row(folder: Path) -> Row | None:
    try:
        summary = json.loads((folder / "summary.json").read_bytes())
        environment = summary["environment"]
        facts = {key: environment.get(key, "") for key in ("cpu", "threads", "torch", "code")}
        command = summary["command"]
        if not summary.keys() >= NEEDED:
            return None
        own = {key: summary[key] for key in ROW if key in summary}
        chosen = {group: _chosen(group, command) or summary[group] for group in CHOSEN}
        place = ""
        if chosen["dataset"] == "folder":  # its place is all that tells it from another
            place = str(summary.get("place") or Path(_chosen("dataset.root", command) or "data").resolve())
            chosen["dataset"] = Path(place).name
        settings = _settings([*command, *_of_network(folder, command)], summary["epochs"])
        public = {"settings": settings, "command": _public(command)}
        return own | chosen | facts | public | {"folder": folder, "place": place}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _chosen(group: str, command: Sequence[str]) -> str:
    """The config that was chosen of a group: `bwn`, say, which sets what `xnor` has. Images of a folder go by its name."""
    return next((word.partition("=")[2] for word in reversed(command) if word.startswith(f"{group}=")), "")


def _of_network(folder: Path, command: Sequence[str]) -> list[str]:
    """What makes the network of a recipe another one than its name says, as words of a command line.

    Of a plugin's network all settings do: nobody here knows what is usual for it.
    """
    if not (_chosen("experiment", command) or _chosen("plugins", command)):
        return []
    config = flatten(read_config(folder))
    usual, said = flatten(usual_settings(config)), {word.partition("=")[0].lstrip("+") for word in command}
    unsaid = [key for key in config if key.startswith("model.") and key not in {*said, "model.name"}]
    if usual.get("model.name") == config.get("model.name"):
        unsaid = [key for key in unsaid if key in SIZES and config[key] != usual.get(key)]
    return [f"{key}={config[key]}" for key in unsaid]


def _tell_apart(rows: Iterable[Row]) -> None:
    """Number the data sets of one name that lie in different folders."""
    places: dict[str, list[str]] = {}
    for row in rows:
        if row.get("place"):
            known = places.setdefault(row["dataset"], [])
            if row["place"] not in known:
                known.append(row["place"])
            if number := known.index(row["place"]):
                row["dataset"] += f" ({number + 1})"


def _settings(command: Sequence[str], epochs: int) -> str:
    """What was set beside the columns of a row, as far as it can change a number; more epochs than were run change it."""
    told = NO_SETTINGS | {"model", "dataset", "quant", "seed", "seeds", "trainer.threads", "trainer.device"}
    words = [word for word in command if "=" in word and not word.startswith("-")]
    words = [word for word in words if word.lstrip("+") not in (f"trainer.epochs={epochs}", f"epochs={epochs}")]
    own = (word for word in words if word.partition("=")[0].lstrip("+") not in told)
    return _line(sorted(own, key=lambda word: word.lstrip("+")))


def _line(words: Iterable[str]) -> str:
    """Words as one line, from which `_words` gets them back: quoted where they have blanks or quotes themselves."""
    return " ".join(shlex.quote(word) if re.search(r"[\s'\"\\]", word) else word for word in words)


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError:  # of a hand that wrote it
        return line.split()


def _public(command: Sequence[str]) -> str:
    """The command without what only says where things lay on somebody's machine."""
    return " ".join(word for word in command if not word.startswith(PLACES))


def _numbers(row: dict[str, str]) -> Row:
    return {key: float(value) if key in NUMBERS and value else value for key, value in row.items()} | {
        "seed": int(row["seed"])
    }


def _configuration(row: Row) -> tuple[str, str, int, str, str]:
    """Network, data, epochs, quantizer, settings: what is set of the model, or of which images, belongs to their names."""
    rest, named = list[str](), {"model": [row["model"]], "dataset": [row["dataset"]]}
    for word in _words(row["settings"]):
        group, _, key = word.lstrip("+").partition(".")
        belongs = group in named and not word.lstrip("+").startswith(OF_TRAINING)
        (named[group] if belongs else rest).append(key if belongs else word)
    return " ".join(named["model"]), " ".join(named["dataset"]), int(row["epochs"]), row["quant"], _line(rest)


def _place(row: Row) -> tuple[Any, ...]:
    """Where a row stands among others: float before the rest of its network, data and length."""
    network, dataset, epochs, quant, settings = _configuration(row)
    return dataset, network, epochs, quant != "none", quant, settings, row["seed"]


def as_csv(rows: Iterable[Row]) -> str:
    """The rows as they are."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ROW, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@dataclass
class Group:
    """Runs that differ in nothing but the seed, and the float runs of the same network, data and length.

    Those that were trained with the same settings, else the float network as it is, else the only ones there are.
    """

    network: str  # the model, and what was set of it
    dataset: str
    epochs: int
    quant: str
    settings: str  # everything else that was set
    rows: list[Row]
    floats: list[Row] = field(default_factory=list)
    number: int = 0  # among all groups: what tells long names from each other

    @property
    def label(self) -> str:
        """The quantizer and what was set of it."""
        return " ".join(filter(None, [self.quant, self.settings]))

    @property
    def name(self) -> str:
        """The label, as long as it can stand in a table or a sentence."""
        label = re.sub(r"\d+\.\d{5,}(e-?\d+)?", lambda found: f"{float(found[0]):.4g}", self.label)
        return self.cut(label, LONGEST)

    def cut(self, words: str, longest: int) -> str:
        """Words about this group, no longer than that, and still different from those about another."""
        return words if len(words) <= longest else f"{words[: longest - 10]}… ({self.number})"

    @property
    def plain(self) -> bool:
        """The float network as it is: what others are compared with."""
        return self.quant == "none" and not self.settings

    @property
    def training(self) -> str:
        """What was set beside the quantizer."""
        return _line(word for word in _words(self.settings) if not word.lstrip("+").startswith("quant."))

    @property
    def words(self) -> dict[str, str]:
        """What was set beside the names of network and data: values by key."""
        parts = (word.lstrip("+").partition("=") for word in _words(self.settings))
        return {key: value for key, _, value in parts}

    @property
    def task(self) -> Task:
        """What only groups have in common that can be compared."""
        return self.network, self.dataset, self.epochs

    def values(self, key: str) -> list[float]:
        """What every run says; empty where one of them does not know."""
        found = [row.get(key) for row in self.rows]
        return (
            []
            if any(value in (None, "") for value in found)
            else [float(value) for value in found if value is not None]
        )

    def mean(self, key: str) -> float | None:
        """Over the seeds; None where a run has no such figure."""
        values = self.values(key)
        return sum(values) / len(values) if values else None

    def difference(self) -> Difference | None:
        """Accuracy minus that of float, over the seeds that both have; None where there is none, and for float itself."""
        if self.plain:
            return None
        ours, theirs = ({row["seed"]: row["test_top1"] for row in rows} for rows in (self.rows, self.floats))
        return paired_difference(ours, theirs)


def groups_of(rows: Iterable[Row]) -> list[Group]:
    """One group a configuration, in the order of the rows."""
    groups: dict[tuple[Any, ...], Group] = {}
    for row in rows:
        key = _configuration(row)
        groups.setdefault(key, Group(*key, [])).rows.append(row)
    _compare_with_floats(list(groups.values()))
    return list(groups.values())


def _compare_with_floats(groups: Sequence[Group]) -> None:
    """Number the groups, and give each the float runs that it is compared with."""
    floats: dict[tuple[Any, ...], list[Group]] = {}
    for group in groups:
        if group.quant == "none":
            plain = [("plain", group.task)] if group.plain else []
            for key in (("alike", group.task, group.training), ("any", group.task), *plain):
                floats.setdefault(key, []).append(group)
    for number, group in enumerate(groups, 1):
        wanted: list[tuple[Any, ...]] = [("plain", group.task)]
        if group.quant != "none":
            wanted = [("alike", group.task, group.training), *wanted, ("any", group.task)]
        chosen = next((floats[key] for key in wanted if key in floats), [])
        group.floats, group.number = chosen[0].rows if len(chosen) == 1 else [], number


def by_task(groups: Sequence[Group]) -> Iterable[tuple[Task, list[Group]]]:
    """Groups that can be compared with each other."""
    for task, members in groupby(sorted(groups, key=lambda group: group.task), key=lambda group: group.task):
        yield task, list(members)
