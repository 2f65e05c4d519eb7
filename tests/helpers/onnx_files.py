"""Small ONNX files, with outputs that a test has written down."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = [helper.make_opsetid('', 17)]


def write(path, nodes, outputs, shape=(1, 3, 64, 64), kind=TensorProto.FLOAT):
    """Write a graph with the input ``image`` and outputs of these names."""
    image = helper.make_tensor_value_info('image', kind, shape)
    infos = [
        helper.make_tensor_value_info(name, kind, None)
        for name, kind in outputs.items()
    ]
    graph = helper.make_graph(nodes, 'g', [image], infos)
    model = helper.make_model(graph, opset_imports=OPSET)
    model.ir_version = 9
    onnx.save(model, path)
    return str(path)


def constant(path, outputs, **options):
    """Write a file that answers the same to every image.

    Args:
        path: The file.
        outputs: Arrays by name.
        options: As of :func:`write`.
    """
    nodes = [
        helper.make_node(
            'Constant', [], [name], value=numpy_helper.from_array(value)
        )
        for name, value in outputs.items()
    ]
    kinds = {
        name: helper.np_dtype_to_tensor_dtype(value.dtype)
        for name, value in outputs.items()
    }
    return write(path, nodes, kinds, **options)


def brightness(path, shape=('B', 3, 64, 64), weights=(1, 1, 1)):
    """Write a YOLO of one class, whose only box is about its input.

    With m the weighted mean of the input, the box has its centre at
    (40 m, 30 m), is 20 m by 10 m large, and m is its score.
    """
    channels = np.array(weights, np.float32).reshape(1, 3, 1, 1)
    box = np.array([40, 30, 20, 10, 1], np.float32).reshape(1, 5, 1)
    fixed = dict(c=channels, b=box, s=np.array([-1, 1, 1]))
    nodes = [
        helper.make_node(
            'Constant', [], [name], value=numpy_helper.from_array(value)
        )
        for name, value in fixed.items()
    ]
    nodes += [
        helper.make_node('Mul', ['image', 'c'], ['weighted']),
        helper.make_node('ReduceMean', ['weighted'], ['m'], axes=[1, 2, 3]),
        helper.make_node('Reshape', ['m', 's'], ['mean']),
        helper.make_node('Mul', ['mean', 'b'], ['out']),
    ]
    return write(path, nodes, dict(out=TensorProto.FLOAT), shape=shape)
