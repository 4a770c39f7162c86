"""What `python -m runner verify` proves: claims about the values and gradients of every quantizer, in float64.

A claim compares what a method computes with a second opinion: float64 autograd of the defining formula, finite differences, or
the form in which the method was published. Where the two differ for a known reason, the claim names it and says what becomes
of the second opinion under that name; only then must both agree. A deviation without a name fails, and so does a name
without a deviation.

The claims about quant/NAME.py stand in a file of this folder; every module here is found by itself. Several may prove something
of one quantizer: what works beside it, a classifier or a regularizer, has a file of its own. A plugin may bring claims, too:

    @proves("mine")
    def claims() -> Iterator[Claim]:
        yield Claim("weights", "autograd of a w", ours=lambda: [...], theirs=lambda: [...])
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = Sequence[Tensor]
CLAIMS: dict[str, dict[str, Callable[[], Iterable["Claim"]]]] = {}
"""By quantizer, and by the module that they stand in."""
ROUNDING = 1e-12  # of the largest value: what float64 may lose in a few hundred operations
NOTHING = "no claims: nothing proved"
FAILED = "DEVIATES"


@dataclass(frozen=True)
class Named:
    """A deviation with a reason. `becomes` turns the second opinion into what ours must then equal.

    `text` may hold {cosine} and {error} (relative, in the Euclidean norm): those of the tensor that differs most.
    """

    text: str
    becomes: Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class Claim:
    """`what` of a method equals `against`, to `tolerance` of the largest value, but for what is `named`."""

    what: str
    against: str
    ours: Callable[[], Tensors]
    theirs: Callable[[], Tensors]
    named: Named | None = None
    tolerance: float = ROUNDING
    equal: str = "equal"


@dataclass(frozen=True)
class Verdict:
    """A line of the table. `deviation`: from what is compared with; `unexplained`: what is left of it under its name."""

    method: str
    what: str
    against: str
    deviation: float | None
    unexplained: float | None
    tolerance: float
    verdict: str

    @property
    def holds(self) -> bool:
        return not self.verdict.startswith(FAILED)


def proves(name: str) -> Callable[[Callable[[], Iterable[Claim]]], Callable[[], Iterable[Claim]]]:
    """Make a function's claims known as what its module has to prove of the quantizer `name`."""

    def add(claims: Callable[[], Iterable[Claim]]) -> Callable[[], Iterable[Claim]]:
        CLAIMS.setdefault(name, {})[claims.__module__] = claims
        return claims

    return add


def verify(names: Iterable[str]) -> Iterator[Verdict]:
    """Judge every claim about these quantizers."""
    for file in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{file.name}")
    for name in names:
        if name not in CLAIMS:
            yield Verdict(name, "", "", None, None, ROUNDING, NOTHING)
            continue
        for module in sorted(CLAIMS[name]):
            for claim in CLAIMS[name][module]():
                yield judge(name, claim)


def judge(method: str, claim: Claim) -> Verdict:
    """Compute both sides of a claim. What raises, differs without a name, or has a name for no difference, DEVIATES.

    >>> one, two = (lambda: [torch.ones(1, dtype=torch.float64)]), (lambda: [torch.full((1,), 2.0, dtype=torch.float64)])
    >>> judge("m", Claim("", "", one, one)).verdict, judge("m", Claim("", "", one, two)).verdict
    ('equal', 'DEVIATES')
    >>> judge("m", Claim("", "", two, one, Named("twice as large", lambda ones: [2 * ones[0]]))).verdict
    'twice as large'
    """
    try:
        ours, theirs = list(claim.ours()), list(claim.theirs())
        found = deviation(ours, theirs)
        left = found if claim.named is None else deviation(ours, claim.named.becomes(theirs))
        words = claim.equal if claim.named is None else _filled(claim.named.text, ours, theirs)
    except Exception as error:
        reason = f"{FAILED}: {type(error).__name__}: {error}"
        return Verdict(method, claim.what, claim.against, None, None, claim.tolerance, reason)
    if not left <= claim.tolerance:
        words = FAILED if claim.named is None else f"{FAILED}, also from: {words}"
    elif claim.named is not None and found <= claim.tolerance:
        words = f"{FAILED}: there is no such deviation: {words}"
    return Verdict(method, claim.what, claim.against, found, left, claim.tolerance, words)


def deviation(ours: Tensors, theirs: Tensors) -> float:
    """The largest difference, in units of the largest value of the tensor that it is in. NaN where something is no number.

    Raises ValueError where shapes differ, and where there is nothing but zeros to compare with.
    """
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape or a.dtype != torch.float64:
            raise ValueError(f"{tuple(a.shape)} in {a.dtype} is compared with {tuple(b.shape)}")
        size = float(b.abs().max())
        if size == 0:
            raise ValueError("a comparison with zeros proves nothing")
        worst = max(worst, float((a - b).abs().max()) / size, key=lambda v: (v != v, v))
    return worst


def _filled(text: str, ours: Tensors, theirs: Tensors) -> str:
    a, b = max(zip(ours, theirs, strict=True), key=lambda pair: deviation([pair[0]], [pair[1]]))
    cosine, error = float((a * b).sum() / (a.norm() * b.norm())), float((a - b).norm() / b.norm())
    return text.format(cosine=f"{cosine:.2f}", error=f"{error:.2g}")
