"""A graph of a few operations on arrays, computed by the CPU."""

from collections.abc import Callable
from contextlib import closing

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.cpu_backend import CpuBackend

Floats = NDArray[np.float32]


def computed(build: Callable[..., int], *arrays: Floats) -> tuple[list[str], Floats]:
    """The operations of a graph of these inputs, whose shapes have their last axis first, and its result."""
    with closing(CpuBackend(2)) as backend:
        ctx = ggml.ggml_init(ggml.InitParams(1 << 18, None, True))
        graph = ggml.ggml_new_graph_custom(ctx, 128, False)
        tensors = [int(ggml.ggml_new_tensor_3d(ctx, Type.F32, *reversed(array.shape))) for array in arrays]
        for tensor in tensors:
            ggml.ggml_set_input(tensor)
        result = build(ctx, *tensors)
        ggml.ggml_build_forward_expand(graph, result)
        allocator = ggml_backend.ggml_gallocr_new(backend.buft)
        assert ggml_backend.ggml_gallocr_alloc_graph(allocator, graph)
        for tensor, array in zip(tensors, arrays, strict=True):
            backend.set(tensor, array)
        backend.compute(graph)
        values = np.empty(tuple(reversed(ggml.tensor_at(result).ne)), np.float32)
        backend.get(result, values)
        nodes = [ggml.ggml_graph_node(graph, index) for index in range(ggml.ggml_graph_n_nodes(graph))]
        names = [ggml.ggml_op_desc(node).decode() for node in nodes]
        ggml_backend.ggml_gallocr_free(allocator)
        ggml.ggml_free(ctx)
    return names, values
