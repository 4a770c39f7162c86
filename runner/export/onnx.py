"""A trained network as ONNX: standard operators of one opset, no custom ones, run here by onnxruntime."""

from collections.abc import Callable

import torch
from torch import Tensor

from quant.inference.graph import Node
from runner.evaluate import Stored
from runner.export.trace import trace
from runner.faults import BadData, ConfigError, Fault

try:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    from runner.export.onnx_ops import TO_ROWS, WRITERS, Writer
except ImportError as error:
    needed = "format=onnx needs onnx and onnxruntime: pip install -e '.[onnx]'"
    raise ConfigError([Fault("format", f"{needed} ({error})")]) from error

OPSET = 21  # the first with int4
IR_VERSION = 10  # that goes with it


def onnx_bytes(stored: Stored) -> tuple[bytes, tuple[str, ...]]:
    """The model, and what is to be said about it."""
    writer = Writer()
    values = ["images"]
    nodes = trace(stored.model)
    for node in nodes:
        values.append(_write(writer, node, [values[i] for i in node.inputs]))
    size, classes = stored.sizes["input_size"], len(stored.data.classes)
    image = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", stored.data.in_channels, size, size])
    logits = helper.make_tensor_value_info(values[-1], TensorProto.FLOAT, ["N", classes])
    graph = helper.make_graph(writer.nodes, stored.config.model.name, [image], [logits], writer.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    facts = {
        "model": stored.config.model.name,
        "quant": stored.config.quant.name,
        "classes": "\n".join(stored.data.classes),
    }
    helper.set_model_props(model, facts | {"mean": str(stored.data.mean), "std": str(stored.data.std)})
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BadData(f"the network gives no valid ONNX model: {error}") from error
    return model.SerializeToString(), tuple(writer.remarks)


def session(content: bytes) -> Callable[[Tensor], Tensor]:
    """The model in onnxruntime, on as many threads as torch uses."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    opened = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = opened.run(None, {"images": images.numpy()})
        return torch.from_numpy(logits)

    return run


def _write(writer: Writer, node: Node, x: list[str]) -> str:
    make = WRITERS.get(node.op)
    if make is None:
        raise BadData(f"{node.name}: {node.op} has no ONNX form here")
    made = make(writer, node, x)
    if node.op in TO_ROWS or x[0] in writer.rows:
        writer.rows.add(made)
    return made
