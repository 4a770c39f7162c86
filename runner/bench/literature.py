"""What a training step of other implementations costs, for comparison: measured once, elsewhere, never by `bench`.

All but ActNN (its paper, on a GPU) on one thread of a Zen 4 core with torch 2.15.0: ResNet-18 for CIFAR, batch 64, forward,
backward and SGD, bracketed by float32 eager steps; medians, good to about 0.1. Saved: bytes that autograd keeps of a forward
pass, unique storages.
"""

from dataclasses import dataclass

CONDITIONS = "one Zen 4 thread, torch 2.15.0, ResNet-18 for CIFAR, batch 64; ratios to float32 eager, good to about 0.1"

MODEL = "resnet18"


@dataclass(frozen=True)
class Published:
    """Ratios to float32 eager; None where nothing is known."""

    name: str
    time: float | None
    saved: float | None
    source: str


PEERS = (
    Published("XNOR-Net-PyTorch, binary", 1.45, 1.56, "github.com/jiecaoyu/XNOR-Net-PyTorch"),
    Published("lsq-net, W4A4", 1.33, 3.12, "github.com/zhutmost/lsq-net"),
    Published("lsq-net, W4A4, compiled", 0.956, 1.62, "github.com/zhutmost/lsq-net"),
    Published("quantized.pytorch, 8 bits, bifurcated", 1.82, 2.22, "github.com/eladhoffer/quantized.pytorch"),
    Published("Brevitas 0.13.4, int8", 1.42, 2.6, "github.com/Xilinx/brevitas"),
    Published("Brevitas 0.13.4, int4", 1.23, 2.6, "github.com/Xilinx/brevitas"),
    Published("torchao 0.18.0, int8 QAT", 1.24, 2.29, "github.com/pytorch/ao"),
    Published("ActNN, 2 bits, on a GPU", None, 0.083, "arXiv 2104.14129: 12 times less activation memory"),
)
