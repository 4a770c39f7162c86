"""The measuring of `bench conv`: float libraries, the packed kernel and the processor's limits, in turns in one process."""

import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quant import kernels
from quant.kernels.layers import prepared
from quant.kernels.limit import float_limit_loop, limit_loop
from quant.kernels.machine import Processor, processors
from runner.bench.conv import Plan, Shape, formula, shapes_of
from runner.bench.floats import float_convolutions
from runner.bench.timing import Action, Times, ratio, take_turns
from runner.environment import environment
from runner.faults import RunnerError

TURN = 2e-3  # seconds


@dataclass(frozen=True)
class Row:
    """One shape. Times in microseconds, rates in 1e9 products a second, speedups as medians of turns with quartiles."""

    figure: str
    in_channels: int
    out_channels: int
    size: int
    kernel: int
    batch: int
    layout: str
    path: str
    macs: int
    paper: float
    machine: float  # the paper's formula with this machine's own ratio of limits
    torch_us: float
    best_float: str
    best_float_us: float
    kernel_us: float  # bits in, float32 out: machine code alone
    call_us: float  # the same as a call from Python
    alpha_us: float  # float32 in, float32 out
    alpha_k_us: float
    torch_rate: float
    kernel_rate: float
    limit_rate: float
    share_of_limit: float
    share_inside: float  # the same without products with the padding
    kernel_speedup: float
    kernel_low: float
    kernel_high: float
    call_speedup: float
    alpha_speedup: float
    alpha_low: float
    alpha_high: float
    alpha_k_speedup: float
    kernel_over_best: float
    alpha_over_best: float


Result = tuple[list[Row], dict[str, Any]]


def measure(plan: Plan) -> Result:
    """All shapes, and the facts that belong to them."""
    torch.set_num_threads(plan.threads)
    torch.manual_seed(0)
    shapes = [shape for shape in shapes_of(plan) if shape.path is None or shape.path in processors()]
    with torch.inference_mode():
        facts = environment(torch.device("cpu")) | _limits(plan)
        rows = [_row(shape, plan, facts["limit_ratio"]) for shape in shapes]
    if not plan.quick:
        facts |= _first_calls()
    if plan.peers:
        from runner.bench.peers import peers

        facts["peers"] = peers(plan.threads, plan.n)
    return rows, facts


def _limits(plan: Plan) -> dict[str, float]:
    """What this processor can do without any memory, on one thread, in 1e9 products a second."""
    (signs, sign_macs), (floats, float_macs) = limit_loop(_processor(plan.path)), float_limit_loop()
    times = take_turns({"signs": signs, "floats": floats}, turns=max(plan.n, 3), warmup=3, shortest=TURN)
    rates = {"sign_limit": sign_macs / _median(times["signs"]), "float_limit": float_macs / _median(times["floats"])}
    ratios = ratio(times["floats"].wall, times["signs"].wall).median * sign_macs / float_macs
    return {name: rate / 1e9 for name, rate in rates.items()} | {"limit_ratio": ratios}


def _row(shape: Shape, plan: Plan, limit_ratio: float) -> Row:
    floats, packed = _contestants(shape, plan.threads)
    loop, loop_macs = limit_loop(_processor(shape.path))
    times = take_turns(floats | packed | {"limit": loop}, turns=plan.n, warmup=3, shortest=TURN)
    us = {name: 1e6 * _median(time) for name, time in times.items()}
    best = min(floats, key=us.__getitem__)
    base = times["torch"].wall
    kernel, call, alpha, alpha_k = (ratio(base, times[name].wall) for name in packed)
    of_limit = ratio(times["limit"].wall, times["kernel"].wall).median
    return Row(
        shape.figure, shape.in_channels, shape.out_channels, shape.size, shape.kernel, shape.batch, shape.layout,
        shape.path or processors()[0], shape.macs, formula(shape.in_channels, shape.kernel),
        formula(shape.in_channels, shape.kernel, limit_ratio), us["torch"], best, us[best], us["kernel"], us["call"], us["alpha"],
        us["alpha_k"], shape.macs / us["torch"] / 1e3, shape.macs / us["kernel"] / 1e3,
        plan.threads * loop_macs / us["limit"] / 1e3, of_limit * shape.macs / loop_macs / plan.threads,
        of_limit * shape.macs_inside / loop_macs / plan.threads,
        kernel.median, kernel.low, kernel.high, call.median, alpha.median, alpha.low, alpha.high, alpha_k.median,
        ratio(times[best].wall, times["kernel"].wall).median, ratio(times[best].wall, times["alpha"].wall).median,
    )  # fmt: skip


def _contestants(shape: Shape, threads: int) -> tuple[dict[str, Action], dict[str, Action]]:
    """Float convolutions; and the packed one: alone, with packing and alpha, and with K besides. The result is checked."""
    memory = torch.channels_last if shape.layout == "channels_last" else torch.contiguous_format
    x = torch.randn(shape.batch, shape.in_channels, shape.size, shape.size).contiguous(memory_format=memory)
    w = torch.randn(shape.out_channels, shape.in_channels, shape.kernel, shape.kernel)
    alpha = w.abs().mean((1, 2, 3))
    weight = kernels.pack_weight(w, shape.padding, path=_processor(shape.path))
    bits = kernels.pack_activations(x)
    kernel, out = prepared(bits, weight)
    kernel()
    if not torch.equal(out, F.conv2d(_sign(x), _sign(w), padding=shape.padding)):
        raise RunnerError(f"the packed convolution of {shape} is not that of the signs")

    def with_k() -> Tensor:
        """alpha K (sign(x) * sign(w)), K = mean |x| over channels, then over the window (arXiv 1603.05279, eq. 11)."""
        k = F.avg_pool2d(x.abs().mean(1, keepdim=True), shape.kernel, 1, shape.padding)
        return kernels.binary_conv2d(x, weight, scale=alpha).mul_(k)

    packed: dict[str, Action] = {
        "kernel": kernel,
        "call": lambda: kernels.conv2d_of_packed(bits, weight),
        "alpha": lambda: kernels.binary_conv2d(x, weight, scale=alpha),
        "alpha_k": with_k,
    }
    return float_convolutions(x.contiguous(), w, shape.padding, threads), packed


def _sign(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0)


def _processor(path: str | None) -> Processor | None:
    return next((known for known in processors() if known == path), None)


def _median(times: Times) -> float:
    return statistics.median(times.wall)


FIRST_CALL = """
import time, torch
torch.set_num_threads(1)
x, w = torch.randn(1, 256, 14, 14), torch.randn(256, 256, 3, 3)
start = time.perf_counter()
from quant import kernels
kernels.binary_conv2d(x, kernels.pack_weight(w, 1))
print(time.perf_counter() - start)
"""


def _first_calls() -> dict[str, float]:
    """Seconds of the first packed convolution of a process, torch's own import aside: compiled there, then from the disk."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "XDG_CACHE_HOME": folder}

        def call() -> float:
            done = subprocess.run(
                [sys.executable, "-c", FIRST_CALL], env=environment, check=True, capture_output=True, text=True
            )
            return float(done.stdout)

        return {"first_call_s": call(), "cached_call_s": statistics.median(call() for _ in range(3))}
