"""Figures over seeds: mean ± standard deviation, and differences of two configurations paired by seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

FEWEST = 3  # an interval from two differences says nothing


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation (n - 1); the mean alone for a single run.

    >>> spread([95.0, 96.0, 97.0])
    '96.00 ± 1.00'
    """
    if len(values) == 1:
        return f"{values[0]:.2f} (one run)"
    return f"{fmean(values):.2f} ± {stdev(values):.2f}"


def interval(gaps: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean of `gaps`, of which there are at least two."""
    from scipy.stats import t

    half = float(t.ppf((1 + level) / 2, len(gaps) - 1)) * stdev(gaps) / len(gaps) ** 0.5
    return fmean(gaps) - half, fmean(gaps) + half


def prediction(
    values: Sequence[float], beside: Sequence[Sequence[float]] = (), level: float = 0.95
) -> tuple[float, float]:
    """Where one more run falls with that probability, if runs are spread normally: mean ± t sd sqrt(1 + 1/n), n at least two.

    Samples `beside` that are spread alike help to know how far: three values alone may agree by chance.

    >>> [round(end, 2) for end in prediction([95.0, 96.0, 97.0])]
    [91.03, 100.97]
    >>> [round(end, 2) for end in prediction([96.0, 96.0, 96.0], beside=[[95.0, 96.0, 97.0]])]
    [93.73, 98.27]
    """
    from scipy.stats import t

    samples = [values, *beside]
    freedom = sum(len(sample) - 1 for sample in samples)
    variance = sum(stdev(sample) ** 2 * (len(sample) - 1) for sample in samples) / freedom
    half = float(t.ppf((1 + level) / 2, freedom)) * (variance * (1 + 1 / len(values))) ** 0.5
    return fmean(values) - half, fmean(values) + half


@dataclass(frozen=True)
class Difference:
    """A mean over n pairs, and half of its 95 % interval where there are enough of them."""

    mean: float
    n: int
    half: float | None

    def __str__(self) -> str:
        if self.half is None:
            return f"{self.mean:+.2f}"
        return f"{self.mean:+.2f} [{self.mean - self.half:+.2f}, {self.mean + self.half:+.2f}]"

    @property
    def certain(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.half is not None and abs(self.mean) > self.half


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Ours - theirs over the seeds that both have, with an interval from three seeds on; None without a seed in common.

    >>> str(paired_difference({0: 97.0, 1: 98.0, 2: 97.5}, {0: 95.0, 1: 96.5, 2: 96.0}))
    '+1.67 [+0.95, +2.38]'
    """
    gaps = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not gaps:
        return None
    low, high = interval(gaps) if len(gaps) >= FEWEST else (None, None)
    return Difference(fmean(gaps), len(gaps), None if low is None or high is None else (high - low) / 2)
