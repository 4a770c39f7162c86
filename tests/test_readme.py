"""The README says what the files say: its table is made from the published rows, its choices are the ones there are."""

import csv
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from runner.bench.literature import PEERS
from runner.compose import choices_of
from runner.pages.report_pages import with_tables
from runner.pages.report_parts import make_report
from runner.pages.results import collect, groups_of
from runner.statistics import Difference, paired_difference, spread

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUANT = (ROOT / "quant" / "README.md").read_text(encoding="utf-8")
PUBLISHED = ROOT / "outputs" / "published"
PAGES = ("README.md", "quant/README.md", "quant/kernels/README.md", "runner/README.md")
SHOWN = {
    "README.md": ("lenet5_mnist.csv", "bench_step_resnet18.csv"),
    "quant/README.md": (
        "resnet20_cifar10_jpeg.csv",
        "resnet18_cifar10_jpeg.csv",
        "resnet18_mnist.csv",
        "lenet5_digits.csv",
        "variants_lenet5_mnist.csv",
        "variants_lenet5_digits.csv",
    ),
    "quant/kernels/README.md": (
        "bench_conv.csv",
        "bench_conv_intel.csv",
        "bench_peers.csv",
        "bench_model_resnet18.csv",
    ),
    "runner/README.md": ("scaling.csv",),
}


@pytest.mark.parametrize("page", PAGES)
def test_a_table_stands_where_the_rows_give_it(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / page).read_text(encoding="utf-8")
    assert all(f"<!-- table: outputs/published/{name}" in text for name in SHOWN[page])
    assert with_tables(text) == text, f"python -m runner report --pages {page}"


def test_a_figure_is_what_the_rows_give() -> None:
    report, _ = make_report(sorted(PUBLISHED.glob("*.csv")))
    made = {f"{picture.name}.svg": picture.svg for picture in report.pictures}
    kept = {path.name: path.read_text(encoding="utf-8") for path in (PUBLISHED / "figures").iterdir()}
    stale = {name for name in made.keys() | kept.keys() if made.get(name) != kept.get(name)}
    command = "python -m runner report outputs/published/*.csv --format svg --out outputs/published/figures"
    assert not stale, f"{command}: {', '.join(sorted(stale))}"


def scan(figure: str) -> dict[tuple[str, float], float]:
    """The points of a figure of `verify`: y by series and x."""
    rows = [row for row in rows_of("scans.csv") if f"{row['quant']}-{row['figure']}" == figure]
    return {(row["series"], float(row["x"])): float(row["y"]) for row in rows}


def series(points: dict[tuple[str, float], float], name: str) -> list[float]:
    """The curve of that name, from left to right."""
    found = [y for (series, _), y in sorted(points.items()) if series == name]
    assert found
    return found


def test_what_is_said_of_the_mean_is_in_the_scan() -> None:
    left = scan("xnor-scale")
    for kind, share in (("normal", 1 - 2 / math.pi), ("uniform", 1 / 4), ("Laplace", 1 / 2)):
        here = {x: y for (series, x), y in left.items() if series == f"{kind} weights"}
        assert min(here, key=lambda x: here[x]) == 1.0
        assert here[1.0] == pytest.approx(share, abs=1e-3)
    assert "$1 - 2/\\pi = 0.363$ for normal weights, $1/4$ for uniform ones, $1/2$" in QUANT
    assert "misses **36 %**" in QUANT


def test_what_is_said_of_gradients_is_in_the_scans() -> None:
    cosines, terms = scan("xnor-printed-gradient"), scan("xnor-alpha-term")
    assert set(series(cosines, "binop")) == {1}
    assert series(cosines, "paper") == pytest.approx(series(cosines, "ste"), abs=1e-3)
    assert min(series(terms, "nothing behind")) > 10
    assert min(series(terms, "ReLU, float layer")) > 1
    for behind in ("batch norm", "ReLU, max pool, batch norm"):
        here = series(terms, behind)
        assert here == sorted(here, reverse=True)
        assert here[-1] < 1e-3


def test_what_is_said_of_steps_is_in_the_scans() -> None:
    rates, errors = scan("lsq-step-gradient"), scan("lsq-lost-bit")
    assert rates["grad_scale none", 1e6] / rates["grad_scale none", 1e2] == pytest.approx(100, rel=0.05)  # sqrt of 10^4
    assert all(y < 1 for (series, _), y in rates.items() if series != "grad_scale none")
    for bits in range(3, 9):
        assert errors["symmetric (plain)", bits] == pytest.approx(errors["unsigned (v3, v1, plus)", bits - 1], rel=1e-3)


def test_what_is_said_of_constants_is_in_the_scans() -> None:
    constants, others = scan("8bit-rangebn-constant"), scan("8bit-rangebn-distribution")
    assert set(series(constants, "scale d2")) == {1}
    assert [round(constants["scale paper", n], 2) for n in (16, 131072)] == [1.5, 1.83]
    assert [round(constants["scale reference", n], 2) for n in (16, 131072)] == [0.81, 0.99]
    assert r"1.5 times $\sigma$ at 16 values, 1.83 times at 131,072" in QUANT
    assert r"0.81 times $\sigma$ at 16 values, 0.99 at 131,072" in QUANT
    relu = series(others, "normal behind a ReLU")
    assert max(relu) - min(relu) < 1e-3
    for law, sign in (("uniform", -1), ("Laplace", 1)):
        here = [sign * y for y in series(others, law)]
        assert here == sorted(here)


def test_what_is_said_of_compression_is_in_the_rows() -> None:
    points = [(x, y) for (series, x), y in scan("actgrad-compression").items() if series == "stochastic"]
    (most, least_wrong), (less, wrong) = sorted(points, reverse=True)[:2]  # 8 bits, 4 bits
    assert f"{wrong / least_wrong:.0f} times the error for {less / most:.1f} of the bytes" in QUANT
    saved = {row["name"]: float(row["saved"]) for row in rows_of("bench_step_resnet18.csv")}
    assert (
        f"{saved['lsq']:.3f} of float's bytes, and with `norm_input: kept` {saved['lsq norm_input=kept']:.3f}" in QUANT
    )
    exact, quantized = saved["actgrad"], saved["actgrad bits=2 norm=quantized"]
    assert f"{exact:.3f} of float's bytes with 4 bits and `norm: exact`, {quantized:.3f} with 2 bits" in QUANT


def beside_float(name: str, quant: str) -> dict[str, Difference]:
    """How far the settings of a quantizer are from float, by what was set."""
    groups = groups_of(collect([PUBLISHED / name]))
    return {g.settings: d for g in groups if g.quant == quant and (d := g.difference()) is not None}


def test_what_is_said_of_accuracies_is_in_the_rows() -> None:
    for name in ("variants_lenet5_mnist.csv", "variants_lenet5_digits.csv"):
        assert not [gap for gap in beside_float(name, "actgrad").values() if gap.certain]
    assert not [gap for gap in beside_float("variants_lenet5_mnist.csv", "8bit-rangebn").values() if gap.certain]
    eight = beside_float("variants_lenet5_digits.csv", "8bit-rangebn")
    (worst,) = [settings for settings, gap in eight.items() if gap.certain]
    assert worst == "quant.grad_in_bits=2 quant.zero_exact=false"
    assert eight[worst].mean < -1
    fixed = beside_float("variants_lenet5_digits.csv", "none")
    assert [settings for settings, gap in fixed.items() if gap.certain] == [
        "classifier.skip_constant_row=false classifier=fixed"
    ]
    binary, lsq = (by_settings("variants_lenet5_mnist.csv", quant) for quant in ("xnor", "lsq"))
    beside = {settings: minus(reached, binary[""]) for settings, reached in binary.items() if settings}
    assert not [settings for settings, gap in beside.items() if gap.certain]
    activations = [gap.mean for settings, gap in beside.items() if "quant.ste=" in settings]
    assert f"minus `clip` at most {max(map(abs, activations)):.2f} points" in QUANT
    bits = "quant.act_bits=2 {}quant.step_change=null quant.weight_bits=2"
    plain, plus, v1, v3 = (
        lsq[bits.format(preset)] for preset in ("quant.preset=plain ", "quant.preset=plus ", "quant.preset=v1 ", "")
    )
    (auto,) = by_settings("lsq_levels_lenet5_mnist.csv", "lsq").values()
    bounded = lsq["quant.act_bits=2 quant.weight_bits=2"]
    assert f"loses**, minus `v3` with unbounded steps {minus(plain, v3)} points" in QUANT
    assert f"gives {minus(auto, plain)} of them back" in QUANT
    assert f"`plus` minus `v3` is {minus(plus, v3)} points" in QUANT
    assert f"one level fewer, minus `v3` {minus(v1, v3)}." in QUANT
    assert f"which the rows of the presets have too): {minus(bounded, v3)} points." in QUANT
    certain = [settings for settings, gap in beside_float("variants_lenet5_mnist.csv", "lsq").items() if gap.certain]
    assert sorted(certain) == sorted(bits.format(f"quant.preset={preset} ") for preset in ("plain", "plus"))


def by_settings(name: str, quant: str) -> dict[str, dict[int, float]]:
    """What a quantizer reached, by what was set and by seed."""
    groups = groups_of(collect([PUBLISHED / name]))
    return {g.settings: {row["seed"]: row["test_top1"] for row in g.rows} for g in groups if g.quant == quant}


def minus(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    difference = paired_difference(ours, theirs)
    assert difference is not None
    return difference


def rows_of(name: str) -> list[dict[str, str]]:
    with (PUBLISHED / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_first_screen_says_what_the_rows_say() -> None:
    groups = {g.quant: g for g in groups_of(collect([PUBLISHED / "lenet5_mnist.csv"])) if g.epochs == 20}
    binary, floats = (groups[name] for name in ("xnor", "none"))
    reached = [spread([row["test_top1"] for row in group.rows]) for group in (binary, floats)]
    step = {row["name"]: row for row in rows_of("bench_step_resnet18.csv")}
    peer = next(peer for peer in PEERS if peer.name.startswith("XNOR-Net-PyTorch"))
    conv = next(row for row in rows_of("bench_conv.csv") if row["figure"] == "quoted")
    larq = next(row for row in rows_of("bench_peers.csv") if row["name"].startswith("larq"))
    packed = [f"{(group.mean('packed_bytes') or 0) / 1024:,.0f} KiB" for group in (binary, floats)]
    kills = json.loads((ROOT / "tests" / "torture" / "figures.json").read_text(encoding="utf-8"))["kills"]
    stages = [float(step["xnor recompute=stages"][key]) for key in ("saved", "time")]
    for line in (
        f"20 epochs, n = {len(binary.rows)} | {reached[0]} % | float {reached[1]} %; XNOR-Net-PyTorch 99.23 % after 60",
        f"| {float(step['xnor']['time']):.2f} of float32 | XNOR-Net-PyTorch {peer.time:.2f} |",
        f"| {stages[0]:.3f} of float32, at {stages[1]:.2f} of its time | XNOR-Net-PyTorch {peer.saved:.2f} |",
        f"| {float(conv['kernel_speedup']):.1f} times as fast as float32 "
        f"| Larq Compute Engine takes {float(larq['ours_over_it']):.0f} times as long |",
        f"| LeNet-5, packed (computed) | {packed[0]} | float {packed[1]} |",
        f"| `kill -9`, {kills['kills']:,} times at random moments | {kills['identical']:,} of {kills['runs']:,} runs end",
    ):
        assert line in README


def test_what_is_said_of_packed_inference_is_in_the_rows() -> None:
    first = next(row for row in rows_of("bench_conv.csv") if row["figure"] == "quoted")
    kernel, alpha, share = (float(first[key]) for key in ("kernel_speedup", "alpha_speedup", "share_of_limit"))
    assert f"runs {kernel:.1f} times as fast as torch's float32 ({100 * share:.0f} %" in README
    assert f"from float to float with alpha {alpha:.1f} times" in README
    intel = next(row for row in rows_of("bench_conv_intel.csv") if row["figure"] == "quoted")
    assert f"floats, {float(intel['kernel_speedup']):.1f} and {float(intel['alpha_speedup']):.1f} times" in README
    kernels = (ROOT / "quant" / "kernels" / "README.md").read_text(encoding="utf-8")
    assert f"are {float(intel['machine']):.1f} times apart, not {float(first['machine']):.1f}" in kernels
    assert f"formula gives {float(first['paper']):.2f}" in kernels
    assert f"instead of 64 it gives {float(first['machine']):.1f};" in kernels
    over = [float(first[key]) for key in ("kernel_over_best", "alpha_over_best")]
    assert f"the first row is {over[0]:.1f} and {over[1]:.1f} instead of {kernel:.1f} and {alpha:.1f}" in kernels
    times = {row["name"]: [] for row in rows_of("bench_peers.csv")}
    for row in rows_of("bench_peers.csv"):
        times[row["name"]].append(float(row["ours_over_it"]))
    low, high = min(times["bnn-lab"]), max(times["bnn-lab"])
    (larq,) = {round(value) for value in times["larq-compute-engine"]}
    assert f"kernel takes {low:.0f} to {high:.0f} times as long, Larq Compute Engine's {larq} times" in README
    whole = next(row for row in rows_of("bench_model_resnet18.csv") if row["batch"] == "1")
    assert f"A whole ResNet-18 at batch 1: {float(whole['times float32']):.1f} times as fast as float32" in README


def test_the_example_without_the_runner_runs() -> None:
    """Parameter groups share nothing, and the state brings every step with it."""
    (code,) = re.findall(r"^## Use without the runner$.*?^```python$(.*?)^```$", QUANT, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"__name__": "example"}
    exec(code, names)
    model, again, kept = names["model"], names["again"], names["kept"]
    steps = {name for name, parameter in model.named_parameters() if parameter in kept}
    assert steps == {name for name, _ in model.named_parameters() if name.endswith(".step")}
    decayed, free = names["optimizer"].param_groups
    assert (decayed["weight_decay"], free["weight_decay"], len(free["params"])) == (1e-4, 0.0, len(kept))
    assert len(decayed["params"]) + len(kept) == len(list(model.parameters()))
    images = names["images"]
    assert torch.equal(model.eval()(images), again.eval()(images))


def test_every_published_file_is_named_on_a_page() -> None:
    pages = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    idle = [path.name for path in PUBLISHED.iterdir() if path.name not in pages]
    assert not idle


@pytest.mark.parametrize("group", ["model", "quant", "dataset", "classifier", "regularizer"])
def test_every_choice_is_named(group: str) -> None:
    missing = [name for name in choices_of()[group] if f"`{name}`" not in README]
    assert not missing


@pytest.mark.parametrize("page", [*PAGES, "conf/experiment/README.md"])
def test_every_link_leads_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target, part in re.findall(r"\]\(([^)#:\s]*)(#[^)\s]+)?\)", text):
        place = (ROOT / page).parent / target if target else ROOT / page
        assert place.exists(), target
        if part:
            headings = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), re.MULTILINE)
            assert part[1:] in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, part
