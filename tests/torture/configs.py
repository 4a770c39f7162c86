"""T8: configs that nobody would write. Each is either refused with ConfigError, or it is a run: a sample takes two steps."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

from runner.compose import choices_of, config_from
from runner.config import flat
from runner.faults import ConfigError, Exit
from runner.schema import RunConfig
from tests.torture.forks import do_run, run_once, tail
from tests.torture.scenarios import QUIET

SAMPLE = 20  # accepted configs that take two steps, at most
SMALL = (
    "dataset=synthetic dataset.size=16 dataset.samples=40 dataset.test_samples=20 batch_size=8 model=lenet5 model.hidden=8 "
    "model.channels=[2,3]"
).split()
STEPS = ["trainer.max_steps=2", "epochs=1"]
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
    *"trainer.ema=0.9 trainer.accumulate=2 trainer.grad_clip=1".split(),
]


def run(configs: int, seed: int, root: Path) -> dict[str, Any]:
    """So many command lines; bad is anything but a RunConfig or a ConfigError, and any sampled run that ends oddly."""
    rng, counts, bad = random.Random(seed), Counter[str](), []
    keys, accepted = _keys(), []
    for _ in range(configs):
        words = _words(rng, keys)
        try:
            accepted.append((words, config_from([*SMALL, *words])))
        except ConfigError:
            counts["refused"] += 1
        except BaseException as error:
            bad.append(f"{words}: {error!r}")
    counts["accepted"] = len(accepted)
    for number, (words, config) in enumerate(rng.sample(accepted, min(SAMPLE, len(accepted)))):
        counts["ran"] += 1
        bad += _two_steps(words, config, root / f"run-{number}")
    return {"configs": configs, **counts, "bad": bad}


def _keys() -> list[str]:
    """Every key that the shipped configs have, by its path."""
    found: set[str] = set()
    for quant in choices_of()["quant"]:
        found |= set(_paths(flat(config_from([*SMALL, f"quant={quant}"]))))
    return sorted(found)


def _paths(raw: Any, path: str = "") -> list[str]:
    if not isinstance(raw, dict):
        return [path]
    return [p for key, value in raw.items() for p in _paths(value, f"{path}.{key}" if path else key)]


def _words(rng: random.Random, keys: list[str]) -> list[str]:
    groups = choices_of()
    words = [f"quant={rng.choice(groups['quant'])}"]
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
        kind = rng.random()
        if kind < 0.7:
            words.append(f"{rng.choice(keys)}={rng.choice(VALUES)}")
        elif kind < 0.9:
            words.append(rng.choice(STRAY))
        elif kind < 0.95:
            words.append(f"{rng.choice(list(groups))}={rng.choice(rng.choice(list(groups.values())))}")
        else:
            words.append(_noise(rng))
    return words


def _noise(rng: random.Random) -> str:
    """Printable and other characters, in no order."""
    return "".join(chr(rng.randrange(*rng.choice(((32, 127), (1, 0x2FFF))))) for _ in range(rng.randrange(1, 30)))


def _two_steps(words: list[str], config: RunConfig, place: Path) -> list[str]:
    """Two steps of what was accepted: any code of the table but the one for errors of the program, and no traceback."""
    try:
        short = config_from([*SMALL, *words, *STEPS, *QUIET, "outputs=outputs", "mode=train"])
    except ConfigError:
        return []  # two steps of one epoch are not what this config can do
    end = run_once(lambda: do_run(short), place)
    honest = {int(code) for code in Exit} - {int(Exit.INTERNAL)}
    return [] if end.code in honest else [f"{words}: accepted, but ended with {end.code}: {tail(place)}"]
