"""`--help`: what a person needs to begin, made from conf/ itself."""

import ast
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.text import Text

from runner.bench import KINDS
from runner.catalog import ROOT
from runner.compose import choices_of, conf_folder

EXAMPLES = [
    ("python -m runner", "the default: LeNet-5, XNOR weights and activations, scikit-learn's digits"),
    ("python -m runner model=resnet18 quant=xnor dataset=cifar10", "choose a model, a quantizer, a data set"),
    ("python -m runner epochs=3 lr=0.01 batch_size=64 seed=1 name=trial", "short forms of what is changed most"),
    ("python -m runner regime.phases.0.lr=0.02 quant.gradient=paper", "any key of any file by its path"),
    (
        "python -m runner -m quant=none,xnor seed=0,1,2",
        "a sweep: one folder a configuration, finished ones are skipped",
    ),
    ("python -m runner mode=evaluate checkpoint=outputs/runs/NAME", "the figures of a stored model"),
    ("python -m runner regime model=resnet18", "learning rate, batch and input size over time, before any training"),
]


def print_help(verbs: Mapping[str, str]) -> int:
    """Usage, choices, examples."""
    console = Console(highlight=False, soft_wrap=True)
    console.print("usage: python -m runner \\[verb] \\[key=value …] \\[-m] \\[--config-dir DIR]\n", markup=True)
    console.print("Trains and measures quantized and binary networks from configs.\n")
    console.print("[bold]Verbs[/bold]")
    for name, meaning in verbs.items():
        console.print(Text(f"  {name:<11}{meaning}"))
    console.print("\n[bold]Choices[/bold] (group=name; every file says what its keys mean)")
    for group, names in choices_of().items():
        console.print(Text(f"  {group:<12}{', '.join(names)}{' (of search)' if group == 'sweep' else ''}"))
    console.print("\n[bold]Keys of a run[/bold]")
    console.print(Text(_run_keys(conf_folder() / "config.yaml")))
    console.print("\n[bold]Examples[/bold]")
    for command, meaning in EXAMPLES:
        console.print(Text(f"  {command}\n      {meaning}"))
    console.print("\n[bold]More[/bold]\n  VERB --help: the words that a verb has of its own;")
    console.print("  --cfg job shows the composed config; --config-dir adds a folder of your own YAML files;")
    console.print("  the keys of trainer, quant, …: " + str(conf_folder()))
    console.print("  --version: versions, processor and code, for whoever asks what a number was made with")
    console.print('  tab completion: eval "$(runner -sc install=bash)"')
    return 0


def print_verb(module: str) -> int:
    """What the file of a verb says on top: its words, and examples. Read, not imported: that takes seconds."""
    place = ROOT / module.replace(".", "/")
    files = [place / "__init__.py" if place.is_dir() else place.with_suffix(".py")]
    if module == "runner.bench":
        files = [place / f"{kind}.py" for kind in KINDS]
    said = [ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "" for file in files]
    print(("\n\n" + "-" * 40 + "\n\n").join(said))
    print("\nThe keys of a run, and all verbs: python -m runner --help")
    return 0


def print_version() -> int:
    """The version, and what else a number or a report of a fault depends on."""
    import torch

    from runner.environment import environment

    own = {"lowbit-runner": version("lowbit-runner")}
    for name, value in (own | environment(torch.device("cpu"))).items():
        print(f"{name:<14}{value}")
    return 0


def _run_keys(path: Path) -> str:
    """The keys of config.yaml itself, with their comments."""
    lines = path.read_text(encoding="utf-8").splitlines()
    start, end = (next(i for i, line in enumerate(lines) if line.startswith(key)) for key in ("mode:", "hydra:"))
    return "\n".join(f"  {line}" for line in lines[start:end] if ":" in line and not line.startswith("#"))
