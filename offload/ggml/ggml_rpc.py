"""ggml's devices on other machines: the part of ggml-rpc.h (ggml 0.25.3 to 0.27) that this program uses.

Import it only when such a device is asked for: raises LibraryError where the library in use has none.
"""
# ruff: noqa: D103 - the functions are ggml's own, documented in its headers
# mypy: disable-error-code="empty-body"

from slimoe.offload.ggml.library import Ptr, Size, Str, c_function, open_library

PROTOCOL_VERSION = (7, 0)
"""RPC_PROTO_MAJOR_VERSION and the newest minor version that is understood."""

_RPC = open_library("ggml-rpc")


@c_function(_RPC)
def ggml_backend_rpc_add_server(endpoint: Str) -> Ptr: ...


@c_function(_RPC)
def ggml_backend_rpc_start_server(
    endpoint: Str, cache_dir: Ptr, n_threads: Size, n_devices: Size, devices: Ptr
) -> None: ...
