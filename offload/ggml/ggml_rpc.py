"""ggml's devices on other machines: the part of ggml-rpc.h (ggml 0.25.3 to 0.27) that this program uses.

Import it only when such a device is asked for: raises LibraryError where the library in use has none. Run as
`python -m slimoe.offload.ggml.ggml_rpc PORT`, it lends this machine's CPU to programs on this machine.
"""
# ruff: noqa: D103 - the functions are ggml's own, documented in its headers
# mypy: disable-error-code="empty-body"

import ctypes
import functools
import socket
import subprocess
import sys
import time

from slimoe.offload.errors import DeviceError
from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml.library import Ptr, Size, Str, c_function, chosen, open_library
from slimoe.offload.ggml.packages import NATIVE
from slimoe.offload.ggml.rpc_endpoint import RpcEndpoint, spoken_version

PROTOCOL_VERSION = (7, 0)
"""RPC_PROTO_MAJOR_VERSION and RPC_PROTO_MINOR_VERSION of the library that is built for this machine."""
_SECONDS = 20.0
"""More than a server takes to start."""

_RPC = open_library("ggml-rpc")


@c_function(_RPC)
def ggml_backend_rpc_add_server(endpoint: Str) -> Ptr: ...


@c_function(_RPC)
def ggml_backend_rpc_start_server(
    endpoint: Str, cache_dir: Ptr, n_threads: Size, n_devices: Size, devices: Ptr
) -> None: ...


def protocol_version() -> tuple[int, int]:
    """The protocol that the library in use speaks, and the newest minor version of it; raises as `own_version` does."""
    library = chosen()
    is_known = library.package == NATIVE and library.version == NATIVE.wanted
    return PROTOCOL_VERSION if is_known else own_version()


@functools.cache
def own_version() -> tuple[int, int]:
    """The protocol that a server of the library in use speaks, which is started and asked.

    No function tells it, and packages change it for themselves. Raises DeviceError where the server does not answer.
    """
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = (sys.executable, "-P", "-m", "slimoe.offload.ggml.ggml_rpc", str(port))
    pipe, deadline = subprocess.DEVNULL, time.monotonic() + _SECONDS
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as server:
        try:
            while True:
                try:
                    return spoken_version(RpcEndpoint("127.0.0.1", port))[:2]
                except DeviceError:
                    if server.poll() is not None or time.monotonic() > deadline:
                        raise
                    time.sleep(0.02)
        finally:
            server.kill()


def serve(port: int, n_threads: int = 1) -> None:
    """Lends this machine's CPU to programs on this machine; never returns."""
    cpu = ggml_backend.ggml_backend_reg_dev_get(ggml_backend.ggml_backend_cpu_reg(), 0)
    devices = (ctypes.c_void_p * 1)(cpu)
    ggml_backend_rpc_start_server(f"127.0.0.1:{port}".encode(), None, n_threads, 1, ctypes.addressof(devices))


if __name__ == "__main__":
    serve(int(sys.argv[1]))
