"""Run folders as the trainer leaves them, for the tests of everything that reads outputs/."""

import csv
import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

from runner.columns import HEALTH, LAYERS, METRICS, TIMING

LENET = ("conv1", "conv2", "fc1", "fc2")
RESNET = (
    "conv1",
    *(f"layer{i}.{j}.conv{k}" for i in range(1, 5) for j in range(2) for k in (1, 2)),
    *(f"layer{i}.0.downsample.0" for i in range(2, 5)),
    "fc",
)


def write_csv(path: Path, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)


def make_run(
    folder: Path,
    *,
    epochs: int = 120,
    layers: tuple[str, ...] = RESNET,
    quant: str = "lsq",
    drops: tuple[int, ...] = (50, 80, 105),
    state: str = "done",
    words: str | None = None,
    seed: int = 0,
) -> Path:
    """A run of `epochs` epochs whose learning rate falls at `drops`; `words` takes the place of every free string."""
    folder.mkdir(parents=True)
    chance = random.Random(epochs + 1000 * seed)
    metrics, timing = _progress(epochs, drops, chance, words)
    write_csv(folder / "metrics.csv", METRICS, metrics)
    write_csv(folder / "timing.csv", TIMING, timing)
    write_csv(folder / "layers.csv", LAYERS, _layers(layers, words))
    write_csv(folder / "quant.csv", HEALTH, _health(epochs, layers, chance, words) if quant != "none" else [])
    status = {"state": state, "exit_code": 0 if state == "done" else 20, "epoch": epochs, "epochs": epochs}
    status |= {
        "reason": words or ("" if state == "done" else "loss is not finite at step 812"),
        "host": words or "node7",
    }
    status |= {"pid": 4711, "updated": words or "2026-11-20T17:03:12+00:00"} | _known_early(words)
    (folder / "status.json").write_text(json.dumps(status))
    config = _config(epochs, drops, quant, words) | {"seed": seed}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    if state == "done":
        (folder / "summary.json").write_text(json.dumps(_summary(metrics, timing, config, words)))
    return folder


def _progress(
    epochs: int, drops: tuple[int, ...], chance: random.Random, words: str | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    metrics: list[dict[str, Any]] = []
    timing: list[dict[str, Any]] = []
    best = step = 0.0
    quality = 0.0
    for epoch in range(epochs):
        phase = sum(epoch >= drop for drop in drops)
        batch_size, input_size = (128, 24) if phase == 0 and drops else (256, 32)
        step += math.ceil(45_000 / batch_size)
        quality += (1 - 0.55 * 0.42**phase - quality) * 0.09
        noise = 0.05 * 0.35**phase
        top1 = 100 * (0.93 * quality + noise * chance.uniform(-0.6, 0.4) + 0.04)
        best = max(best, top1)
        metrics.append(
            {
                "epoch": epoch,
                "step": int(step),
                "phase": words or phase,
                "lr": 0.1 * 0.1**phase,
                "batch_size": batch_size,
                "input_size": input_size,
                "train_loss": 2.3 * (1 - quality) ** 1.3 + 0.02 + noise * chance.random(),
                "train_top1": min(100.0, 100 * quality * 1.02 + chance.random()),
                "val_loss": 2.3 * (1 - quality) ** 1.1 + 0.15 + 2 * noise * chance.random(),
                "val_top1": top1,
                "val_top5": 100 - (100 - top1) * 0.12,
                "best_val_top1": best,
            }
        )
        timing.append(
            {
                "epoch": epoch,
                "step": int(step),
                "seconds": 31.5 + chance.random() - 9 * (phase == 0),
                "images_per_s": 1430 + 30 * chance.random() + 500 * (phase == 0),
                "eval_seconds": 1.25,
                "peak_memory_bytes": 1_412_300_800 + epoch * 4096,
                "saved_bytes_per_sample": 1_433_600,
            }
        )
    return metrics, timing


def _layers(layers: tuple[str, ...], words: str | None) -> list[dict[str, Any]]:
    rows = []
    for index, name in enumerate(layers):
        edge = index in (0, len(layers) - 1)
        rows.append(
            {
                "layer": f"{words}{index}" if words else name,
                "kind": words or ("Linear" if name.startswith("fc") else "Conv2d"),
                "becomes": words or ("" if edge else "BinaryConv2d"),
                "weight_bits": 32 if edge else 1,
                "act_bits": 32 if edge else 1,
                "grad_bits": 32,
                "parameters": 1728 * 4**index % 2_359_297,
                "macs": 37_748_736 if index % 3 else 18_874_368,
                "why": words or ("rule 0: first and last stay float" if edge else "rule 2: *"),
            }
        )
    return rows


def _health(epochs: int, layers: tuple[str, ...], chance: random.Random, words: str | None) -> list[dict[str, Any]]:
    return [
        {
            "epoch": epoch,
            "layer": f"{words}{index}" if words else name,
            "clip_ratio": 0.02 + 0.15 * math.exp(-epoch / 30) * (1 + index / 20) + 0.01 * chance.random(),
            "step_size": 0.004 * 1.25**index * (1 - 0.3 * math.exp(-epoch / 20)),
            "flip_rate": 0.08 * math.exp(-epoch / 35) / (1 + index / 4) + 0.0005,
            "code_entropy": min(1.0, 0.75 + 0.25 * (1 - math.exp(-(epoch + 3 * index) / 25))),
            "grad_norm": "",
        }
        for epoch in range(epochs)
        for index, name in enumerate(layers[1:-1], 1)
    ]


def _config(epochs: int, drops: tuple[int, ...], quant: str, words: str | None) -> dict[str, Any]:
    phases = [{"epoch": 0, "optimizer": "SGD", "lr": 0.1, "momentum": 0.9}]
    phases += [{"epoch": drop, "lr": 0.1 * 0.1 ** (i + 1)} for i, drop in enumerate(drops)]
    config: dict[str, Any] = {
        "name": words or "",
        "model": {"name": words or ("resnet" if epochs > 20 else "lenet5"), "depth": 18},
        "quant": {"name": words or quant, "gradient": words or "exact", "clip": True, "rules": [["*", 1], ["fc", 32]]},
        "dataset": {"name": words or "cifar10", "root": "data", "download": False},
        "regime": {"phases": phases},
        "trainer": {"epochs": epochs, "max_steps": None, "checkpoint_every": 1},
        "seed": 0,
    }
    if words:
        config[words] = {words: words}
    return config


def _summary(
    metrics: list[dict[str, Any]], timing: list[dict[str, Any]], config: dict[str, Any], words: str | None
) -> dict[str, Any]:
    best = max(metrics, key=lambda row: row["val_top1"])
    return {
        "name": words or f"{config['model']['name']}-{config['quant']['name']}-cifar10-s{config['seed']}",
        "run": words or "resnet-lsq-cifar10-s0-1a2b3c4d",
        "model": config["model"]["name"],
        "quant": config["quant"]["name"],
        "dataset": config["dataset"]["name"],
        "seed": config["seed"],
        "epochs": len(metrics),
        "steps": metrics[-1]["step"],
        "best_val_top1": best["val_top1"],
        "best_epoch": best["epoch"],
        "final_val_top1": metrics[-1]["val_top1"],
        "final_train_loss": metrics[-1]["train_loss"],
        "test_loss": 0.391,
        "test_top1": best["val_top1"] - 0.42,
        "test_top5": 99.31,
        "test_checkpoint": words or "best",
        "train_seconds": sum(row["seconds"] for row in timing),
        "images_per_s": 1442.7,
        "peak_memory_bytes": timing[-1]["peak_memory_bytes"],
        **_known_early(words),
    }


def _known_early(words: str | None) -> dict[str, Any]:
    """What stands in status.json before step 0."""
    return {
        "parameters": 11_173_962,
        "saved_bytes_per_sample": 1_433_600,
        "float_bytes": 44_734_112,
        "packed_bytes": 1_532_904,
        "macs": {"float": 1_780_000, "int": 0, "binary": 553_648_128},
        "config_hash": words or "1a2b3c4d",
        "command": [words or "python", "-m", "runner", "model=resnet18", words or "name=a b"],
        "environment": {
            "python": "3.11.9",
            "torch": words or "2.15.0",
            "torchvision": "0.29.0",
            "device": "cpu",
            "cpu": words or "AMD EPYC 9554",
            "capability": "AVX512",
            "threads": 2,
            "world": 1,
            "code": words or "ae25672dca63",
            "platform": "Linux-6.1-x86_64",
        },
    }
