"""T8: configs that nobody would write, drawn by Hypothesis.

Each is refused with ConfigError before its data is loaded, or it takes two steps.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from runner.compose import choices_of, config_from
from runner.config import flat
from runner.faults import ConfigError, Exit
from runner.schema import RunConfig
from tests.torture.forks import BOARD, do_run, limit_memory, run_once, tail

MEMORY = 3 << 30  # bytes of address space that a run may take on top of what it has
SMALL = ("experiment=small",)  # in conf/: one word, since every word is judged anew where another one is refused
CONF = (str(Path(__file__).parent / "conf"),)
VALUES = [
    *"0 1 2 3 7 -1 1.5 0.1 1e-3 1e999 -0.0 nan inf true false null abc".split(),
    *"[] [1] [1,2] [20,50] {} {a:1} ${seed} ${oc.env:HOME} ${nope} ??? ~ 1_000 0x10 08 9999999999999999999".split(),
    *'/etc ../.. é 日本 a=b a:b \\ \' " "" ( ] first last SGD Adam exact v3 stochastic'.split(),
    "'a b'",
]
STRAY = [
    *"_target_=os.system +evil=1 ++x.y=2 ~model ~dataset.name lrr=1 model=resnt18 quant= = seed seed=1,2 -m".split(),
    *"hydra.run.dir=/etc/x hydra/launcher=joblib model._target_=torch.load name=../../x name=a/b".split(),
    *"quant.rules=[{match:first}] quant.rules=[{match:nothing}] quant.name=xnor model=vgg6".split(),
    *"regime.phases=[] regime.phases=[{epoch:0}] regime.phases=[{epoch:1,optimizer:SGD,lr:0.1}]".split(),
    *"regime.phases=[{epoch:0,optimizer:SGD,lr:-5}] data_regime.phases=[{epoch:0,batch_size:4}]".split(),
    *"classifier=fixed regularizer=rounding_margin regime=cosine regime=adam_step data_regime=batch32".split(),
    *"plugins=[os] plugins=[nowhere.to.be.found] plugins=['../x']".split(),
    *"trainer.ema=0.9 trainer.accumulate=2 trainer.grad_clip=1 trainer.on_nan=skip trainer.checkpoint_every=10min".split(),
]
HONEST = {
    int(Exit.BAD_CONFIG): "refused by the run",
    int(Exit.NO_INPUT): "named a file that is not there",
    int(Exit.OUT_OF_MEMORY): "ran out of memory",
}


@dataclass
class Tally:
    """What became of the configs so far."""

    root: Path
    counts: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)


def run(configs: int, number: int, root: Path) -> dict[str, Any]:
    """So many command lines; bad is any that is neither refused before its data is loaded nor takes two steps."""
    tally = Tally(root)

    @seed(number)
    @settings(
        max_examples=configs,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(command_lines())
    def each(words: list[str]) -> None:
        _judge(words, tally)

    each()
    return {"configs": sum(tally.counts.values()), **tally.counts, "bad": tally.bad}


def _judge(words: list[str], tally: Tally) -> None:
    try:
        config = config_from([*SMALL, *words], CONF)
    except ConfigError:
        tally.counts["refused"] += 1
    except BaseException as error:
        tally.counts["traceback"] += 1
        tally.bad.append(f"{words}: {error!r}")
    else:
        said, fault = _two_steps(config, tally.root / f"run-{sum(tally.counts.values())}")
        tally.counts[said] += 1
        tally.bad += [f"{words}: {fault}"] if fault else []


def _two_steps(config: RunConfig, place: Path) -> tuple[str, str]:
    """Two steps of what was accepted: what they came to, and what was wrong with it (empty where nothing was)."""
    quiet = {"max_steps": 2, "progress": "none", "dashboard": "none"}
    trainer = config.trainer.model_copy(update=quiet)
    short = config.model_copy(update={"mode": "train", "outputs": "outputs", "trainer": trainer})

    def limited() -> int:
        limit_memory(MEMORY)
        return do_run(short)

    code = run_once(limited, place).code
    if code in (Exit.DONE, Exit.DIVERGED):
        return ("took two steps" if code == Exit.DONE else "diverged within two steps"), ""
    if code in HONEST and (not BOARD.loaded or code == Exit.OUT_OF_MEMORY):
        return HONEST[code], ""
    return "ended badly", f"accepted, but ended with {code}{', its data loaded' * BOARD.loaded}: {tail(place)}"


# What is drawn -----------------------------------------------------------------------------------------------------------


def command_lines() -> st.SearchStrategy[list[str]]:
    """A quantizer, and up to four changes: mostly of known keys to odd values."""
    groups, defaults = choices_of(), defaults_by_key()
    quantizer = st.sampled_from(groups["quant"]).map(lambda name: f"quant={name}")
    odd = st.builds("{}={}".format, st.sampled_from(sorted(defaults)), values())
    likely = st.sampled_from(sorted(defaults)).flatmap(
        lambda key: likely_values(defaults[key]).map(lambda v: f"{key}={v}")
    )
    choice = st.sampled_from([f"{group}={name}" for group, names in groups.items() for name in names])
    noise = st.text(min_size=1, max_size=30)
    kinds = [*[likely] * 5, *[odd] * 3, choice, choice, st.sampled_from(STRAY), noise]
    some = st.lists(st.sampled_from(kinds).flatmap(lambda kind: kind), max_size=4)
    return st.builds(lambda first, rest: [first, *rest], quantizer, some)


def values() -> st.SearchStrategy[str]:
    numbers = st.one_of(st.integers(-3, 40), st.integers(), st.floats()).map(str)
    return st.one_of(st.sampled_from(VALUES), st.sampled_from(VALUES), numbers)


def likely_values(defaults: set[str]) -> st.SearchStrategy[str]:
    """What a key might well take, judged by its defaults: texts of any key, numbers of their kind."""
    if defaults <= {"True", "False"}:
        return st.sampled_from(["true", "false"])
    if any(text.lstrip("-").isdigit() for text in defaults):
        return st.integers(0, 16).map(str)
    if any(text.replace(".", "").replace("e-", "").isdigit() for text in defaults):
        return st.floats(0, 1).map(lambda number: f"{number:.6f}")
    words = sorted({text for texts in defaults_by_key().values() for text in texts if text.isidentifier()})
    return st.one_of(st.sampled_from(words), st.sampled_from(["null", "1", "0.5", *sorted(defaults)]))


@cache
def defaults_by_key() -> dict[str, set[str]]:
    """Every key that the shipped configs have, by its path, and all of its defaults as text."""
    found: dict[str, set[str]] = {}
    for quant in choices_of()["quant"]:
        for path, value in _leaves(flat(config_from([*SMALL, f"quant={quant}"], CONF))):
            found.setdefault(path, set()).add(str(value))
    return found


def _leaves(raw: Any, path: str = "") -> list[tuple[str, Any]]:
    if not isinstance(raw, dict):
        return [(path, raw)]
    return [leaf for key, value in raw.items() for leaf in _leaves(value, f"{path}.{key}" if path else key)]
