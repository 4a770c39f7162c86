"""Health of quantized layers, a row a layer and epoch: ranges that clip, steps that die, signs that flip, idle codes."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from quant.surgery import health, quantized_layers


def codes_of(model: nn.Module) -> dict[str, Tensor]:
    """The integer codes of all quantized weights, by layer."""
    found = {name: layer.weight_codes() for name, layer in quantized_layers(model).items()}
    return {name: codes.to("cpu", torch.int16) for name, codes in found.items() if codes is not None}


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Euclidean norm of the weight gradient that every quantized layer holds."""
    norms = {}
    for name, layer in quantized_layers(model).items():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and weight.grad is not None:
            norms[name] = float(weight.grad.norm())
    return norms


FIGURES = {"clip_ratio", "step_size", "dead_steps"}


def alarms(rows: Iterable[dict[str, Any]]) -> Iterable[str]:
    """What a person should know now and not after the run: layers that no longer learn, or never will."""
    for row in rows:
        if row.get("dead_steps"):
            share = f"{100 * row['dead_steps']:.0f} %"
            yield (
                f"{row['layer']}: {share} of its steps are dead, at zero or so large that all values round to 0; "
                "try a lower lr= or quant.step_change="
            )
        if row.get("code_entropy") == 0:
            yield f"{row['layer']}: every weight has the same code, so the layer tells nothing apart"
        unreal = [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
        if unreal:
            yield f"{row['layer']}: {', '.join(unreal)} is no finite number"


def health_rows(
    model: nn.Module, images: Tensor, before: dict[str, Tensor], norms: dict[str, float], shares: dict[str, float]
) -> list[dict[str, Any]]:
    """What quant.csv says about one epoch; `before` are the codes at its start, `norms` and `shares` what it gathered."""
    training = model.training
    figures = health(model.eval(), images)
    model.train(training)
    now, rows = codes_of(model), []
    for name in quantized_layers(model):
        own: dict[str, Any] = {key: value for key, value in figures.get(name, {}).items() if key in FIGURES}
        codes = now.get(name)
        if codes is not None:
            own |= {"flip_rate": _flip_rate(before.get(name), codes), "code_entropy": _entropy(codes)}
        if own or name in norms:
            rows.append({"layer": name, "grad_norm": norms.get(name), "near_threshold": shares.get(name)} | own)
    return rows


def _flip_rate(before: Tensor | None, now: Tensor) -> float | None:
    return None if before is None or before.shape != now.shape else float((before != now).double().mean())


def _entropy(codes: Tensor) -> float:
    """Bits of information per weight: 1 for a binary layer whose signs are balanced."""
    share = torch.unique(codes, return_counts=True)[1].double() / codes.numel()
    return abs(float((share * share.log2()).sum()))
