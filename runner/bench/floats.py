"""The float32 convolutions that a packed one is compared with: every library that is installed, each as it likes its data."""

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from runner.bench.timing import Action


def float_convolutions(x: Tensor, w: Tensor, padding: int, threads: int) -> dict[str, Action]:
    """`torch` is conv2d on contiguous tensors, as a network is built unless somebody asks for something else."""
    x_last, w_last = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, w))
    found: dict[str, Action] = {
        "torch": lambda: F.conv2d(x, w, padding=padding),
        "torch channels_last": lambda: F.conv2d(x_last, w_last, padding=padding),
    }
    session = _onnxruntime(x, w, padding, threads)
    if session is not None:
        feed = {"x": x.numpy()}
        found["onnxruntime"] = lambda: session.run(None, feed)
    return found


def _onnxruntime(x: Tensor, w: Tensor, padding: int, threads: int) -> Any | None:
    """A session of ONNX Runtime that holds this one convolution; None where it is not installed."""
    try:
        onnx, runtime = (importlib.import_module(name) for name in ("onnx", "onnxruntime"))
    except ImportError:
        return None
    make = onnx.helper
    values = [make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("x", "y")]
    node = make.make_node("Conv", ["x", "w"], ["y"], pads=[padding] * 4)
    graph = make.make_graph(
        [node], "convolution", values[:1], values[1:], [onnx.numpy_helper.from_array(w.numpy(), "w")]
    )
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8)
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    return runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
