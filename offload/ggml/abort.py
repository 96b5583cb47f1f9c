"""ggml's way to give up is to end the process. Where a device is why, this says so first, in a person's words.

Sources: `ggml_abort` of ggml.c; ggml-rpc.cpp, which gives up when its server does; the GPU backends, which do so when
their driver reports an error, lack of memory in the middle of a graph among them. Those for Vulkan and SYCL let the
exceptions of their API's C++ bindings through, such as vk::DeviceLostError, which end the process as well, by
`std::terminate`. All of ggml 0.25.3.
"""

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from slimoe.offload.errors import DeviceError
from slimoe.offload.ggml.library import Ptr, c_function, open_library
from slimoe.offload.ggml.rpc_endpoint import parse_endpoint, refuses
from slimoe.offload.printable import printable

_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
_BACKENDS = re.compile(r"\bggml-(cuda|hip|musa|metal|vulkan|sycl|opencl|cann|webgpu)\b")
_THROWN = re.compile(r"N(?:2vk|4sycl)")
"""How the mangled names of exceptions begin that Vulkan's and SYCL's C++ bindings throw."""
_TERMINATED = ctypes.CFUNCTYPE(None)
_CPP = {"darwin": "libc++abi.dylib"}
_kept: list[Any] = []
"""ggml holds pointers to these."""


@c_function(open_library("ggml-base"))
def ggml_set_abort_callback(callback: Annotated[Any, _CALLBACK]) -> Ptr:
    """Sets what is called with the message before the process ends; gives what was set before."""


def on_device_abort(rpc: Sequence[str], end: Callable[[DeviceError], None]) -> None:
    """Has `end` called with the reason when ggml gives up because of a device; it should end the process.

    `rpc` are the endpoints in use. The call comes from any thread, and may find locks taken by others. When it comes
    back, or something else is the reason, the process ends by SIGABRT after ggml's own message.
    """

    def called(message: bytes) -> None:
        text = message.decode("utf-8", "replace")
        error = device_error(text, rpc)
        if error is not None:
            end(error)
        print(text, file=sys.stderr, flush=True)

    _kept.append(_CALLBACK(called))
    ggml_set_abort_callback(_kept[-1])
    _on_device_exception(end)


def _on_device_exception(end: Callable[[DeviceError], None]) -> None:
    """Has `end` called when an exception of a device's API ends the process; without a known C++ library nothing."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(_CPP.get(sys.platform, "libstdc++.so.6"))
        set_terminate, current_type = library["_ZSt13set_terminatePFvvE"], library["__cxa_current_exception_type"]
        set_terminate.restype = current_type.restype = ctypes.c_void_p
        set_terminate.argtypes = (ctypes.c_void_p,)

        def terminated() -> None:
            thrown = current_type()
            # A std::type_info is a pointer to its functions, then one to its name.
            name = ctypes.c_char_p.from_address(thrown + ctypes.sizeof(ctypes.c_void_p)).value if thrown else None
            error = thrown_error((name or b"").decode("utf-8", "replace"))
            if error is not None:
                end(error)
            _TERMINATED(before)()

        _kept.append(_TERMINATED(terminated))
        before = set_terminate(ctypes.cast(_kept[-1], ctypes.c_void_p))


def thrown_error(name: str) -> DeviceError | None:
    """The error that an exception of this type means, by its mangled name; None if it is not about a device."""
    if not _THROWN.match(name):
        return None
    parts, rest = [], name[1:]
    while length := re.match(r"\d+", rest):
        begin = length.end()
        parts.append(rest[begin : begin + int(length[0])])
        rest = rest[begin + int(length[0]) :]
    return DeviceError(
        f"The device failed ({'::'.join(parts)}). What its driver said is above; lower --vram, or try --device none."
    )


def device_error(message: str, rpc: Sequence[str]) -> DeviceError | None:
    """The error that ggml's last message before it gave up means, None if it is not about a device."""
    if "ggml-rpc" in message:
        endpoints = [parse_endpoint(text) for text in rpc]
        gone = [endpoint for endpoint in endpoints if refuses(endpoint)] or endpoints
        names = " or ".join(str(endpoint) for endpoint in gone)
        return DeviceError(
            f"The RPC server {names} no longer answers: it has ended, or the connection to it broke. "
            "Start it again there, or leave --rpc out."
        )
    found = _BACKENDS.search(message)
    if found is None:
        return None
    problem = (message.partition(": ")[2] or message).strip()
    return DeviceError(
        f"The {found[1].upper()} device failed ({problem}). What its driver said is above; lower --vram, or try "
        "--device none."
    )


def end_with_error(error: DeviceError) -> None:
    """Ends the process as the command ends for errors, whatever other threads do: one line, and the exit status."""
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""
    print(f"{clear}slimoe: {printable(str(error))}", file=sys.stderr, flush=True)
    os._exit(error.exit_code)
