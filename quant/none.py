"""`quant=none`: the float baseline. The same path as every method, with nothing to rewrite."""

from dataclasses import dataclass

from torch import nn

from quant.base import Quantizer, register


@register("none")
@dataclass(frozen=True, kw_only=True)
class NoQuantizer(Quantizer):
    """Leave every layer in float32."""

    handles = ()

    def layer(self, module: nn.Module) -> nn.Module | None:
        return None
