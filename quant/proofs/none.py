"""The claim of quant/none.py: the float model."""

from collections.abc import Iterator
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from quant.none import NoQuantizer
from quant.proofs import Claim, proves
from quant.proofs.tools import conv, gradients, layer_gradients, numbers
from quant.surgery import quantize_


@proves("none")
def claims() -> Iterator[Claim]:
    """Nothing is rewritten."""
    model, x = nn.Sequential(conv(), nn.ReLU()), numbers(2, 4, 6, 6)
    quantize_(model, NoQuantizer())
    plain = conv()

    def floats(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(x, w, b, padding=1).clamp_min(0)

    theirs = partial(gradients, floats, x, *plain.parameters())
    yield Claim("conv, ReLU", "autograd of the float model", partial(layer_gradients, model, x), theirs)
