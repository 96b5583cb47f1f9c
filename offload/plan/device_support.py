"""What a device computes of a model's experts, asked of its driver before anything is planned: by type, shape and size.

Drivers refuse types that they have no kernels for, and whatever lies in a tensor that is larger than what a shader may
bind (`maxStorageBufferRange` of Vulkan, 128 MiB on some); a single buffer has a largest size, too. An RPC device says
that it computes everything.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from gguf import GGMLQuantizationType

from slimoe.offload.ggml import device as ggml_device
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.devices import Device
from slimoe.offload.graph.expert_ffn import add_expert_ffn, layer_extras
from slimoe.offload.model.architecture import Architecture
from slimoe.offload.model.experts import MatrixClass, SlotClass
from slimoe.offload.model.tensors import LayerSources

_N_NODES = 16
_PADDING = 4096
"""Bytes of a buffer beyond a tensor: for its alignment, and for what kernels read past the last row."""


def most_stacked(device: Device, architecture: Architecture, slot_class: SlotClass, n_wanted: int) -> int:
    """How many experts of a class, up to `n_wanted`, the device computes from one stack; 0 if it computes none."""
    sizes = range(1, n_wanted + 1)
    if _computes_experts(device, architecture, slot_class.matrices, n_wanted):
        return n_wanted
    return bisect_left(sizes, True, key=lambda n: not _computes_experts(device, architecture, slot_class.matrices, n))


def is_layer_computed(device: Device, architecture: Architecture, layer: LayerSources) -> bool:
    """Whether the device computes a layer's experts from stacks of them all, gate and up joined where they are."""
    matrices = [part.weight for part in (*layer.gate_up, *((layer.down,) if layer.down else ()))]
    if not matrices or len(matrices[0].ne) < 3:
        return True
    shapes = [(weight.type, (weight.ne[0], weight.ne[1])) for weight in matrices]
    return _computes_experts(device, architecture, shapes, matrices[0].ne[2])


def _computes_experts(
    device: Device, architecture: Architecture, matrices: Sequence[MatrixClass], n_experts: int
) -> bool:
    with _context() as ctx:
        graph = ggml.ggml_new_graph_custom(ctx, _N_NODES, False)
        stacks = [ggml.ggml_new_tensor_3d(ctx, kind, ne[0], ne[1], n_experts) for kind, ne in matrices]
        *gate_up, down = stacks
        rows = ggml.ggml_new_tensor_3d(ctx, GGMLQuantizationType.F32, ggml.tensor_at(gate_up[0]).ne[0], 1, 1)
        ids = ggml.ggml_new_tensor_2d(ctx, GGMLQuantizationType.I32, 1, 1)
        outputs = add_expert_ffn(ctx, gate_up, down, rows, ids, layer_extras(ctx, architecture, None))
        ggml.ggml_build_forward_expand(graph, outputs)
        nodes = [ggml.ggml_graph_node(graph, index) for index in range(ggml.ggml_graph_n_nodes(graph))]
        return all(has_room(device, stack) for stack in stacks) and all(
            ggml_device.ggml_backend_dev_supports_op(device.handle, node) for node in nodes
        )


def has_room(device: Device, tensor: int) -> bool:
    """Whether a tensor finds room in a single buffer."""
    buft = ggml_device.ggml_backend_dev_buffer_type(device.handle)
    return bool(ggml.ggml_nbytes(tensor) + _PADDING <= ggml_device.ggml_backend_buft_get_max_size(buft))


@contextmanager
def _context() -> Iterator[int]:
    n_bytes = 2 * _N_NODES * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead_custom(_N_NODES, False)
    ctx = ggml.ggml_init(ggml.InitParams(n_bytes, None, True))
    try:
        yield ctx
    finally:
        ggml.ggml_free(ctx)
