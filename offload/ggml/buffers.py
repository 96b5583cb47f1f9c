"""ggml's buffers, allocators, devices and threads: the part of its C API that this program uses.

Sources: ggml-backend.h, ggml-alloc.h and ggml-cpu.h of ggml 0.25.3. Importing `ops` checks the library.
"""
# ruff: noqa: D103 - the functions are ggml's own, documented in its headers
# mypy: disable-error-code="empty-body"

import ctypes
from typing import Annotated, Any

from slimoe.offload.ggml.library import I32, U8, Bool, Ptr, Size, Str, c_function, open_library

STATUS_SUCCESS, STATUS_ABORTED = 0, 1
USAGE_WEIGHTS = 1

_BASE = open_library("ggml-base")
_CPU = open_library("ggml-cpu")

ABORT_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)
AbortCallback = Annotated[Any, ABORT_CALLBACK]


class ThreadpoolParams(ctypes.Structure):
    """`struct ggml_threadpool_params`."""

    _fields_ = (
        ("cpumask", ctypes.c_bool * 512),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    )


# --- buffers and allocation --------------------------------------------------------------------------------


@c_function(_BASE)
def ggml_backend_buft_name(buft: Ptr) -> Str: ...


@c_function(_BASE)
def ggml_backend_buft_alloc_buffer(buft: Ptr, n_bytes: Size) -> Ptr: ...


@c_function(_BASE)
def ggml_backend_buft_is_host(buft: Ptr) -> Bool: ...


@c_function(_BASE)
def ggml_backend_buft_get_alloc_size(buft: Ptr, tensor: Ptr) -> Size: ...


@c_function(_BASE)
def ggml_backend_buffer_free(buffer: Ptr) -> None: ...


@c_function(_BASE)
def ggml_backend_buffer_get_base(buffer: Ptr) -> Ptr: ...


@c_function(_BASE)
def ggml_backend_buffer_get_size(buffer: Ptr) -> Size: ...


@c_function(_BASE)
def ggml_backend_buffer_get_type(buffer: Ptr) -> Ptr: ...


@c_function(_BASE)
def ggml_backend_buffer_clear(buffer: Ptr, value: U8) -> None: ...


@c_function(_BASE)
def ggml_backend_buffer_set_usage(buffer: Ptr, usage: I32) -> None: ...


@c_function(_BASE)
def ggml_backend_tensor_alloc(buffer: Ptr, tensor: Ptr, address: Ptr) -> I32: ...


@c_function(_BASE)
def ggml_backend_tensor_set(tensor: Ptr, data: Ptr, offset: Size, n_bytes: Size) -> None: ...


@c_function(_BASE)
def ggml_backend_tensor_get(tensor: Ptr, data: Ptr, offset: Size, n_bytes: Size) -> None: ...


@c_function(_BASE)
def ggml_backend_tensor_set_2d(
    tensor: Ptr, data: Ptr, offset: Size, n_bytes: Size, n_copies: Size, tensor_stride: Size, data_stride: Size
) -> None: ...


@c_function(_BASE)
def ggml_backend_tensor_get_2d(
    tensor: Ptr, data: Ptr, offset: Size, n_bytes: Size, n_copies: Size, tensor_stride: Size, data_stride: Size
) -> None: ...


@c_function(_BASE)
def ggml_backend_cpu_buffer_type() -> Ptr: ...


@c_function(_BASE)
def ggml_backend_cpu_buffer_from_ptr(address: Ptr, n_bytes: Size) -> Ptr: ...


@c_function(_BASE)
def ggml_gallocr_new(buft: Ptr) -> Ptr: ...


@c_function(_BASE)
def ggml_gallocr_free(allocator: Ptr) -> None: ...


@c_function(_BASE)
def ggml_gallocr_reserve(allocator: Ptr, graph: Ptr) -> Bool: ...


@c_function(_BASE)
def ggml_gallocr_alloc_graph(allocator: Ptr, graph: Ptr) -> Bool: ...


@c_function(_BASE)
def ggml_gallocr_get_buffer_size(allocator: Ptr, buffer_id: I32) -> Size: ...


# --- devices and computing ---------------------------------------------------------------------------------


@c_function(_BASE)
def ggml_backend_graph_compute(backend: Ptr, graph: Ptr) -> I32: ...


@c_function(_BASE)
def ggml_backend_free(backend: Ptr) -> None: ...


@c_function(_BASE)
def ggml_backend_reg_dev_get(registry: Ptr, index: Size) -> Ptr: ...


@c_function(_BASE)
def ggml_backend_reg_get_proc_address(registry: Ptr, name: Str) -> Ptr: ...


@c_function(_CPU)
def ggml_backend_cpu_init() -> Ptr: ...


@c_function(_CPU)
def ggml_backend_cpu_reg() -> Ptr: ...


@c_function(_CPU)
def ggml_backend_cpu_set_n_threads(backend: Ptr, n_threads: I32) -> None: ...


@c_function(_CPU)
def ggml_backend_cpu_set_threadpool(backend: Ptr, threadpool: Ptr) -> None: ...


@c_function(_CPU)
def ggml_backend_cpu_set_abort_callback(backend: Ptr, callback: AbortCallback, user_data: Ptr) -> None: ...


@c_function(_BASE)
def ggml_threadpool_params_init(params: Ptr, n_threads: I32) -> None: ...


@c_function(_CPU)
def ggml_threadpool_new(params: Ptr) -> Ptr: ...


@c_function(_CPU)
def ggml_threadpool_free(threadpool: Ptr) -> None: ...
