"""Finds and opens the ggml libraries that llama-cpp-python installed, once per process.

The package installs three copies of every library; only the one named by the SONAME (`.so.0`) is the one the
others link to. Opening another maps a second ggml with its own registry, so this module opens no other.
"""

import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from slimoe.offload.errors import LibraryError

PINNED = "llama-cpp-python 0.3.36 (ggml 0.25.3)"
GGML_VERSION = "0.25.3"

Ptr = Annotated[int | None, ctypes.c_void_p]
Size = Annotated[int, ctypes.c_size_t]
I32 = Annotated[int, ctypes.c_int32]
I64 = Annotated[int, ctypes.c_int64]
U32 = Annotated[int, ctypes.c_uint32]
U8 = Annotated[int, ctypes.c_uint8]
F32 = Annotated[float, ctypes.c_float]
Bool = Annotated[bool, ctypes.c_bool]
Str = Annotated[bytes, ctypes.c_char_p]

_FILES = {
    "linux": "lib{}.so.0",
    "darwin": "lib{}.0.dylib",
    "win32": "{}.dll",
}
_INSTALL = 'Install it as docs/building.md says: CMAKE_ARGS="-DGGML_RPC=ON" pip install llama-cpp-python==0.3.36.'


# A ggml that aborts would start a debugger for a backtrace; two threads that abort at once wait for each other's.
os.environ.setdefault("GGML_NO_BACKTRACE", "1")
# ggml's threads wait for each other asleep after some 150 microseconds. libgomp's own limit is 300,000 turns, about
# 15 ms: with another program on the cores, every operation of a graph can burn that much before the thread it waits for
# gets a core, and a token takes 20 times as long. It reads the variable when it is loaded; who has set one of the two
# keeps their choice.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def library_directory() -> Path:
    """Where llama-cpp-python keeps its libraries; raises LibraryError when it is not installed."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise LibraryError(f"{PINNED} is not installed. {_INSTALL}")
    return Path(spec.origin).parent / "lib"


def open_library(name: str) -> ctypes.CDLL:
    """Opens one library, such as `ggml-base`, by the name the others link to."""
    path = library_directory() / _FILES.get(sys.platform, "lib{}.so.0").format(name)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryError(f"{path} cannot be opened ({error}). {_INSTALL}") from None


def c_function(library: ctypes.CDLL) -> Callable[[Callable[..., Any]], Any]:
    """Binds the C function of the decorated stub's name and signature; the stub's body never runs."""

    def bind(stub: Callable[..., Any]) -> Any:
        try:
            function = getattr(library, stub.__name__)
        except AttributeError:
            raise LibraryError(f"ggml has no function {stub.__name__}: {PINNED} is needed. {_INSTALL}") from None
        hints = get_type_hints(stub, include_extras=True)
        function.restype = _c_type(hints.pop("return"))
        function.argtypes = [_c_type(hint) for hint in hints.values()]
        return function

    return bind


def _c_type(hint: Any) -> Any:
    if hint is type(None):
        return None
    if get_args(hint):
        return get_args(hint)[1]
    return hint
