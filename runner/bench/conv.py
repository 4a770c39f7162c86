"""`bench conv`: the packed binary convolution against float32 over channels and filter sizes (arXiv 1603.05279, Fig. 4 b, c).

    python -m runner bench conv                    both figures, LeNet-5's second convolution, and the rows to be quoted
    python -m runner bench conv batch=16 threads=2
    python -m runner bench conv quick=true         a few shapes, one turn: does it run here?
    python -m runner bench conv peers=true         besides, other packed kernels, where their packages are installed

`n`: turns (figures to be quoted: 9 or more). `path`: avx512, avx2 or portable; unasked, the fastest that runs here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from runner.faults import ConfigError, Fault, UnknownKey

CHANNELS = tuple(2**i for i in range(11))
FILTERS = tuple(range(1, 21))
LENET_OUTPUTS, LENET_FILTERS = (10, 30, 50, 128, 512, 1024), tuple(range(1, 9))
PAPER_RATE = 64  # products of signs that the paper counts as one operation, like one product of floats
QUOTED = 256, 256, 14, 3, 1  # the shape at which the paper states 62.27


@dataclass(frozen=True)
class Shape:
    """A convolution of stride 1 on a square image, and what it is measured for."""

    figure: str
    in_channels: int
    out_channels: int
    size: int
    kernel: int
    padding: int
    batch: int = 1
    layout: str = "channels_last"
    path: str | None = None

    @property
    def out_size(self) -> int:
        return self.size + 2 * self.padding - self.kernel + 1

    @property
    def macs(self) -> int:
        """Products that a convolution is said to have; those with the padding count."""
        return self.batch * self.out_size**2 * self.out_channels * self.in_channels * self.kernel**2

    @property
    def macs_inside(self) -> int:
        """Products with the image itself.

        >>> Shape("", 1, 1, 14, 3, 1).macs_inside  # of 1764: at each border a row or column of taps sees only padding
        1600
        """
        starts = range(-self.padding, self.out_size - self.padding)
        taps = sum(max(min(start + self.kernel, self.size) - max(start, 0), 0) for start in starts)
        return self.batch * self.out_channels * self.in_channels * taps**2


@dataclass(frozen=True)
class Plan:
    """What the command line says."""

    n: int = 15
    batch: int = 1
    threads: int = 1
    path: str | None = None
    quick: bool = False
    peers: bool = False
    outputs: str = "outputs"


def formula(channels: int, kernel: int, rate: float = PAPER_RATE) -> float:
    """Speedup of one binary convolution if `rate` products of signs cost as much as one of floats (arXiv 1603.05279, 3.3).

    c N_W N_I products of floats against c N_W N_I / rate of signs, and N_I of floats for the scale:

    >>> round(formula(256, 3), 2), round(formula(1, 3), 2), round(formula(256, 1), 2)
    (62.27, 7.89, 51.2)
    """
    products = channels * kernel**2
    return rate * products / (products + rate)


def shapes_of(plan: Plan) -> list[Shape]:
    """All that is measured: Fig. 4 b and c, LeNet-5's second convolution (20 channels, 12 x 12), and the rows to be quoted."""
    batch, path = plan.batch, plan.path
    channels = (32, 256) if plan.quick else CHANNELS
    filters = (1, 3) if plan.quick else FILTERS
    outputs, lenet = ((10,), (5,)) if plan.quick else (LENET_OUTPUTS, LENET_FILTERS)
    quoted = [] if plan.quick else _quoted(path)
    return [
        *(Shape("channels", c, 256, 14, 3, 1, batch, path=path) for c in channels),
        *(Shape("filter", 256, 256, 14, k, k // 2, batch, path=path) for k in filters),
        *(Shape("lenet5", 20, o, 12, k, 0, batch, path=path) for o in outputs for k in lenet),
        *quoted,
    ]


def _quoted(path: str | None) -> list[Shape]:
    layouts = "channels_last", "contiguous"
    rows = [Shape("quoted", *QUOTED, batch, layout, path) for batch in (1, 16) for layout in layouts]
    return [*rows, *([] if path else [Shape("quoted", *QUOTED, 1, "channels_last", "avx2")])]


def _count(value: str) -> int:
    if not value.isdigit() or int(value) < 1:
        raise ValueError(f"{value!r}: give a whole number from 1")
    return int(value)


def _flag(value: str) -> bool:
    if value not in ("true", "false"):
        raise ValueError(f"{value!r}: give true or false")
    return value == "true"


def _path(value: str) -> str:
    from quant.kernels.machine import processors

    if value not in processors():
        raise ValueError(f"{value!r}: this machine runs {', '.join(processors())}")
    return value


OWN: dict[str, Callable[[str], Any]] = {
    "n": _count,
    "batch": _count,
    "threads": _count,
    "path": _path,
    "quick": _flag,
    "peers": _flag,
    "outputs": str,
}


def plan_of(words: Sequence[str]) -> Plan:
    """Read `key=value` words. Raises ConfigError for all that is wrong with them, or where no kernel runs."""
    values: dict[str, Any] = {}
    faults: list[Fault] = []
    for word in words:
        key, _, value = word.partition("=")
        if key not in OWN:
            faults.append(UnknownKey.at(key, OWN))
            continue
        try:
            values[key] = OWN[key](value)
        except ValueError as error:
            faults.append(Fault(key, str(error)))
    if faults:
        raise ConfigError(faults)
    from quant import kernels  # loads torch, so after everything that can be wrong with the words

    if (reason := kernels.why_not()) is not None:
        raise ConfigError([Fault("bench conv", reason)])
    return Plan(**({"n": 1} if values.get("quick") else {}) | values)
