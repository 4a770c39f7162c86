"""`export checkpoint=PATH format=packed|onnx|safetensors [out=FILE]`: a trained network for others, with a certificate.

    packed       one file for quant.inference, which needs none of the training code
    onnx         standard operators only; quantized layers as QuantizeLinear / DequantizeLinear (int8, int4)
    safetensors  plain float weights, for this program and others

    python -m runner export checkpoint=outputs/runs/NAME format=packed
    python -m runner export checkpoint=outputs/runs/NAME format=onnx out=net.onnx agreement=99.9

The whole validation set goes through both networks before anything is written. What they give lies beside the file, as
<file>.parity.json; a file that fails its bound is not written (exit code 65). `agreement` is that bound in percent of equal
answers, `difference` one of logits. Other words change the stored config, as for `evaluate`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runner.faults import BadData, ConfigError, Exit, Fault, also_known, nearest, refuse_missing

if TYPE_CHECKING:
    from runner.evaluate import Stored

FORMATS = {"packed": "model.packed.safetensors", "onnx": "model.onnx", "safetensors": "model.safetensors"}
OWN = ("format", "out", "agreement", "difference")


def export(words: Sequence[str]) -> int:
    """Write the file and its certificate. Other words change the stored config, as for `evaluate`."""
    from runner.compose import checked, compose_words, keys_of, own_words, split_options

    own, rest = own_words(words, OWN)
    wanted = _checked_format(own.get("format", ""))
    bounds = {key: _number(key, text) for key, text in own.items() if key in ("agreement", "difference")}
    overrides, config_dirs = split_options([*rest, "mode=evaluate"])
    composition = compose_words([*overrides, "trainer.device=cpu"], config_dirs)
    given = composition.raw.get("checkpoint")
    if composition.faults or not isinstance(given, str) or not given:
        with also_known(OWN):
            checked(composition)
    refuse_missing(str(given))
    source = Path(str(given))
    target = Path(own["out"]) if own.get("out") else (source if source.is_dir() else source.parent) / FORMATS[wanted]
    if not target.parent.is_dir():
        raise ConfigError([Fault("out", f"{target.parent}: no such folder")])
    from runner.evaluate import load_stored

    with also_known(OWN):
        stored = load_stored(composition.raw, [*keys_of(overrides), "trainer.device"])
    if getattr(stored.model, "input_transform", None) is not None:
        raise BadData(
            "the network transforms its input by a function of its own (input_transform), which cannot be exported"
        )
    return _export(stored, wanted, target, bounds)


def _export(stored: "Stored", wanted: str, target: Path, bounds: Mapping[str, float]) -> int:
    from runner.export.certificate import certified, write
    from runner.screen import Screen

    made = certified(stored, wanted, bounds)
    write(made, target)
    screen, parity = Screen(stored.config.trainer.progress), made.parity
    top1 = f"top1 {parity.trained_top1:.2f} % -> {parity.exported_top1:.2f} %"
    difference = f"largest logit difference {parity.largest_logit_difference:.3g}"
    screen.say(f"{parity.images} validation images: {parity.equal_top1:.3f} % equal answers, {difference}, {top1}")
    for remark in made.remarks:
        screen.say(remark)
    screen.say(f"saved: {target.resolve()} ({len(made.content):,} bytes), {target.name}.parity.json")
    return int(Exit.DONE)


def _checked_format(wanted: str) -> str:
    if wanted not in FORMATS:
        said = f"{wanted!r} is none" if wanted else "say which"
        raise ConfigError([Fault("format", f"{said}; accepted: {', '.join(FORMATS)}.{nearest(wanted, list(FORMATS))}")])
    return wanted


def _number(key: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= (100 if key == "agreement" else float("inf")):
        meaning = "percent of equal answers, 0 to 100" if key == "agreement" else "a difference of logits, 0 or more"
        raise ConfigError([Fault(key, f"{text!r} is not {meaning}")])
    return number
