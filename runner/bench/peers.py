"""Other packed kernels on the same shapes, in turns with this one, where their packages are installed: nobody depends on them.

    pip install bnn-lab larq-compute-engine        bnn-lab 1.0.0, larq-compute-engine 0.16.0
    python -m runner bench conv peers=true

Larq Compute Engine is given packed input; the time of one convolution is the difference between networks of many and of one.
bnn-lab is given a matrix that is unrolled and packed already. Their results are compared with torch's.
"""

import importlib.util
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quant import kernels
from quant.kernels.layers import prepared
from runner.bench.timing import Action, take_turns
from runner.faults import RunnerError

SHAPES = ((256, 256, 14, 3), (128, 128, 28, 3), (512, 512, 7, 3))  # input and output channels, image, filter
COPIES = 9  # of the convolution, in the larger of Larq's networks


def peers(threads: int, turns: int) -> list[dict[str, Any]]:
    """One row for each kernel and shape, or a row that says what is missing."""
    rows = []
    for name, prepare in (("bnn-lab", _bnn_lab), ("larq-compute-engine", _larq)):
        try:
            rows += [_row(name, prepare, shape, threads, turns) for shape in SHAPES]
        except ImportError as error:
            rows.append({"name": name, "note": f"not installed (pip install {name}): {error}"})
    return rows


Prepare = Callable[[Tensor, Tensor, Tensor, int], tuple[dict[str, Action], float]]


def _row(name: str, prepare: Prepare, shape: tuple[int, ...], threads: int, turns: int) -> dict[str, Any]:
    channels, filters, size, kernel = shape
    x = torch.randn(1, channels, size, size).contiguous(memory_format=torch.channels_last)
    w = torch.randn(filters, channels, kernel, kernel)
    expected = F.conv2d(torch.where(x >= 0, 1.0, -1.0), torch.where(w >= 0, 1.0, -1.0), padding=kernel // 2)
    theirs, parts = prepare(x, w, expected, threads)
    ours, _ = prepared(kernels.pack_activations(x), kernels.pack_weight(w, kernel // 2))
    times = take_turns(theirs | {"ours": ours}, turns=max(turns, 3), warmup=3, shortest=5e-3)
    less = times["less"].wall if "less" in times else [0.0] * max(turns, 3)
    seconds = [(more - fewer) / parts for more, fewer in zip(times["theirs"].wall, less, strict=True)]
    macs = size * size * channels * filters * kernel * kernel
    ratios = [their / our for their, our in zip(seconds, times["ours"].wall, strict=True)]
    return {
        "name": name,
        "shape": f"{channels} to {filters} channels, {kernel} x {kernel}, {size} x {size}",
        "rate": round(macs / statistics.median(seconds) / 1e9, 1),
        "ours": round(macs / statistics.median(times["ours"].wall) / 1e9, 1),
        "ours_over_it": round(statistics.median(ratios), 2),
        "note": "the same result" if "less" not in theirs else "the first number of the result is the same",
    }


def _checked(name: str, got: Any, expected: Tensor) -> None:
    if not torch.equal(torch.as_tensor(got), expected):
        raise RunnerError(f"{name} computes something else here")


def _bnn_lab(x: Tensor, w: Tensor, expected: Tensor, threads: int) -> tuple[dict[str, Action], float]:
    """Its packed matrix product; padding with +1, so that it is compared with a convolution that pads so, too."""
    packed: Any = importlib.import_module("bnn.kernels.packed")
    packed.set_num_threads(threads)
    if not packed.native_kernel_available():
        raise ImportError("its native kernel does not load here")
    kernel = w.shape[2]
    padded = F.pad(torch.where(x >= 0, 1.0, -1.0), [kernel // 2] * 4, value=1.0)
    rows = F.unfold(padded, kernel)[0].T.contiguous()
    signs = torch.where(w >= 0, 1.0, -1.0)
    left, n = packed.pack_binary_pm1(rows.numpy(), axis=1)
    right, _ = packed.pack_binary_pm1(signs.flatten(1).numpy(), axis=1)
    _checked("bnn-lab", packed.binary_gemm_native_prepacked(left, right, n), F.conv2d(padded, signs)[0].flatten(1).T)
    return {"theirs": lambda: packed.binary_gemm_native_prepacked(left, right, n)}, 1.0


def _larq(x: Tensor, w: Tensor, expected: Tensor, threads: int) -> tuple[dict[str, Action], float]:
    """Its interpreter on a network of one convolution, and of several that all read the same packed input."""
    library = _part_of_larq("tflite/python/interpreter_wrapper_lite.so")
    fastest = threads, False, True, False  # of its kernels on x86: the indirect one
    one, many = (library.LiteInterpreter(_flatbuffer(x, w, copies), *fastest) for copies in (1, COPIES))
    _checked("larq-compute-engine", one.predict([])[0].flat[0], expected.flatten()[0])
    return {"theirs": lambda: many.predict([]), "less": lambda: one.predict([])}, COPIES - 1.0


def _part_of_larq(file: str) -> Any:
    """A module of the package by its file: the package itself imports its converter, and that TensorFlow."""
    package = importlib.util.find_spec("larq_compute_engine")
    if package is None or not package.submodule_search_locations:
        raise ImportError("No module named 'larq_compute_engine'")
    path = Path(package.submodule_search_locations[0], file)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _flatbuffer(x: Tensor, w: Tensor, copies: int) -> bytes:
    """A model of Larq's two operations: pack the signs of the image, then `copies` times the same convolution of them.

    The image is a constant of the model: release 0.16.0 can neither read the arrays of NumPy 2 nor fill them. Of its result
    only the first number can be read, and is compared; the time is not touched by that.
    """
    schema = _part_of_larq("mlir/python/tflite_schema.py")
    builder: Any = importlib.import_module("flatbuffers").Builder(1 << 20)
    flex: Any = importlib.import_module("flatbuffers.flexbuffers")
    filters, channels = w.shape[:2]
    words = kernels.pack_activations(w.contiguous()).permute(0, 2, 3, 1).contiguous()
    floats, bits = schema.TensorType.FLOAT32, schema.TensorType.INT32
    pixels = [1, *x.shape[2:]]
    tensors = [
        _tensor(schema, [*pixels, channels], floats, 4), _tensor(schema, [*pixels, words.shape[3]], bits, 0),
        _tensor(schema, list(words.shape), bits, 1), _tensor(schema, [filters], floats, 2),
        _tensor(schema, [filters], floats, 3), *(_tensor(schema, [*pixels, filters], floats, 0) for _ in range(copies)),
    ]  # fmt: skip
    settings = {
        "stride_height": 1, "stride_width": 1, "dilation_height_factor": 1, "dilation_width_factor": 1,
        "padding": schema.Padding.SAME, "pad_values": 0, "channels_in": channels, "fused_activation_function": 0,
    }  # fmt: skip
    options = list(flex.Dumps(settings))
    convolutions = [_operator(schema, 1, [1, 2, 3, 4, -1], [5 + copy], options) for copy in range(copies)]
    graph = schema.SubGraphT()
    graph.tensors, graph.inputs, graph.outputs = tensors, [], [4 + copies]
    graph.operators = [_operator(schema, 0, [0], [1], None), *convolutions]
    model = schema.ModelT()
    model.version, model.subgraphs = 3, [graph]
    model.operatorCodes = [_code(schema, name) for name in ("LceQuantize", "LceBconv2d")]
    image = x.permute(0, 2, 3, 1).contiguous()
    contents = (None, words, torch.ones(filters), torch.zeros(filters), image)
    model.buffers = [_buffer(schema, content) for content in contents]
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _tensor(schema: Any, shape: list[int], kind: int, buffer: int) -> Any:
    tensor = schema.TensorT()
    tensor.shape, tensor.type, tensor.buffer, tensor.name = shape, kind, buffer, b""
    return tensor


def _operator(schema: Any, code: int, inputs: list[int], outputs: list[int], options: list[int] | None) -> Any:
    operator = schema.OperatorT()
    operator.opcodeIndex, operator.inputs, operator.outputs, operator.customOptions = code, inputs, outputs, options
    return operator


def _code(schema: Any, name: str) -> Any:
    code = schema.OperatorCodeT()
    code.builtinCode, code.customCode, code.version = schema.BuiltinOperator.CUSTOM, name, 1
    code.deprecatedBuiltinCode = schema.BuiltinOperator.CUSTOM
    return code


def _buffer(schema: Any, content: Tensor | None) -> Any:
    buffer = schema.BufferT()
    buffer.data = None if content is None else content.numpy().view("uint8").reshape(-1)
    return buffer
