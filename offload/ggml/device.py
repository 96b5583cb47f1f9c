"""ggml's devices: finding them, what they can do, and moving data to and from their memory.

Sources: ggml-backend.h of ggml 0.25.3. The registry, which asks every driver what there is when it is first used,
lies in a library of its own. `ggml_backend_load_all` is not used: where backends are linked in, as llama-cpp-python
links them, it only looks for further libraries beside the program and in the working directory.
"""
# ruff: noqa: D103 - the functions are ggml's own, documented in its headers
# mypy: disable-error-code="empty-body"

import ctypes

from slimoe.offload.ggml.library import I32, Bool, Ptr, Size, c_function, open_library

TYPE_CPU, TYPE_GPU, TYPE_IGPU, TYPE_ACCEL, TYPE_META = range(5)

_BASE = open_library("ggml-base")
_REGISTRY = open_library("ggml")


class DeviceCaps(ctypes.Structure):
    """`struct ggml_backend_dev_caps`."""

    _fields_ = (
        ("asynchronous", ctypes.c_bool),
        ("host_buffer", ctypes.c_bool),
        ("buffer_from_host_ptr", ctypes.c_bool),
        ("events", ctypes.c_bool),
        ("mmap_support", ctypes.c_bool),
    )


class DeviceProps(ctypes.Structure):
    """`struct ggml_backend_dev_props`."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("memory_free", ctypes.c_size_t),
        ("memory_total", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("device_id", ctypes.c_char_p),
        ("caps", DeviceCaps),
    )


# --- finding devices ---------------------------------------------------------------------------------------


@c_function(_REGISTRY)
def ggml_backend_dev_count() -> Size: ...


@c_function(_REGISTRY)
def ggml_backend_dev_get(index: Size) -> Ptr: ...


@c_function(_BASE)
def ggml_backend_reg_dev_count(registry: Ptr) -> Size: ...


@c_function(_BASE)
def ggml_backend_dev_type(device: Ptr) -> I32: ...


@c_function(_BASE)
def ggml_backend_dev_get_props(device: Ptr, props: Ptr) -> None: ...


@c_function(_BASE)
def ggml_backend_dev_memory(device: Ptr, free: Ptr, total: Ptr) -> None: ...


@c_function(_BASE)
def ggml_backend_dev_init(device: Ptr, params: Ptr) -> Ptr: ...


@c_function(_BASE)
def ggml_backend_dev_buffer_type(device: Ptr) -> Ptr: ...


@c_function(_BASE)
def ggml_backend_dev_host_buffer_type(device: Ptr) -> Ptr: ...


@c_function(_BASE)
def ggml_backend_dev_supports_op(device: Ptr, operation: Ptr) -> Bool: ...


# --- their memory ------------------------------------------------------------------------------------------


@c_function(_BASE)
def ggml_backend_buft_is_host(buft: Ptr) -> Bool: ...


@c_function(_BASE)
def ggml_backend_buft_get_alignment(buft: Ptr) -> Size: ...


@c_function(_BASE)
def ggml_backend_buft_get_max_size(buft: Ptr) -> Size: ...


@c_function(_BASE)
def ggml_backend_tensor_set_async(backend: Ptr, tensor: Ptr, data: Ptr, offset: Size, n_bytes: Size) -> None: ...


@c_function(_BASE)
def ggml_backend_tensor_get_async(backend: Ptr, tensor: Ptr, data: Ptr, offset: Size, n_bytes: Size) -> None: ...


# --- computing ---------------------------------------------------------------------------------------------


@c_function(_BASE)
def ggml_backend_graph_compute_async(backend: Ptr, graph: Ptr) -> I32: ...


@c_function(_BASE)
def ggml_backend_synchronize(backend: Ptr) -> None: ...


@c_function(_BASE)
def ggml_backend_event_new(device: Ptr) -> Ptr: ...


@c_function(_BASE)
def ggml_backend_event_free(event: Ptr) -> None: ...


@c_function(_BASE)
def ggml_backend_event_synchronize(event: Ptr) -> None: ...


@c_function(_BASE)
def ggml_backend_event_record(event: Ptr, backend: Ptr) -> None: ...


@c_function(_BASE)
def ggml_backend_event_wait(backend: Ptr, event: Ptr) -> None: ...
