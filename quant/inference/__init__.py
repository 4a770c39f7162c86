"""Trained networks without the code that trained them: `runner export … format=packed` writes such a file, this runs it.

    from quant.inference import PackedModel
    model = PackedModel.load("model.packed.safetensors")
    logits = model(images)                       float32 (N, C, size, size), normalised as model.preprocessing says

    for op in model.ops: ...                     op.name, op.kind, op.nbytes; see PackedModel for a pass a layer at a time

Binary layers run on `quant.kernels` (in floats where these cannot run), all others on torch. Nothing of quant's methods,
of models/ or of the runner is needed or imported.
"""

from quant.inference.file import BadPackedFile, looks_packed
from quant.inference.model import Op, PackedModel

__all__ = ["BadPackedFile", "Op", "PackedModel", "looks_packed"]
