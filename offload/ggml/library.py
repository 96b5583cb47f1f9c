"""Finds and opens the libraries of ggml and llama.cpp, once per process, and binds their functions.

Several packages install them. The first one that is there and passes `trial` is taken.
"""

import ctypes
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints

from slimoe.offload.errors import LibraryError, UsageError
from slimoe.offload.ggml import trial
from slimoe.offload.ggml.packages import PACKAGES, PREBUILT, Library, Package

VERSIONS = ((0, 25), (0, 27))
"""The oldest and the newest ggml, by major and minor version, that this program has been run with."""
ENVIRONMENT = "SLIMOE_LIBRARY"
"""The environment variable that names the only package to take the library from."""

Ptr = Annotated[int | None, ctypes.c_void_p]
Size = Annotated[int, ctypes.c_size_t]
I32 = Annotated[int, ctypes.c_int32]
I64 = Annotated[int, ctypes.c_int64]
U32 = Annotated[int, ctypes.c_uint32]
U8 = Annotated[int, ctypes.c_uint8]
F32 = Annotated[float, ctypes.c_float]
Bool = Annotated[bool, ctypes.c_bool]
Str = Annotated[bytes, ctypes.c_char_p]

# A ggml that aborts would start a debugger for a backtrace; two threads that abort at once wait for each other's.
os.environ.setdefault("GGML_NO_BACKTRACE", "1")
# ggml's threads wait for each other asleep after some 150 microseconds. libgomp's own limit is 300,000 turns, about
# 15 ms: with another program on the cores, every operation of a graph can burn that much before the thread it waits for
# gets a core, and a token takes 20 times as long. It reads the variable when it is loaded; who has set one of the two
# keeps their choice.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")


_INSTALL = f"Install one as docs/building.md says: {PREBUILT.install}"
_BUILD = "Build one that has it: scripts/install native in the checkout, or by hand as docs/building.md says."


@dataclass(frozen=True, slots=True)
class Refusal:
    """A library that is installed and cannot be used; `why` is a sentence without its stop."""

    library: Library
    why: str


_chosen: list[Library] = []
"""The library of this process, once there is one: two of them would know nothing of each other's devices."""


def use(library: Library) -> None:
    """Makes this process take a library untried, as the process does that tries it."""
    assert not _chosen, f"{_chosen[0]} is open already"
    _chosen.append(library)


def chosen() -> Library:
    """The library of this process, which is the first that can be used. Raises LibraryError where none can."""
    if not _chosen:
        refused = list[Refusal]()
        for found in candidates():
            if isinstance(found, Library):
                use(found)
                return found
            refused.append(found)
        raise no_library(refused)
    return _chosen[0]


def no_library(refused: Sequence[Refusal]) -> LibraryError:
    """The error for a machine on which no library can be used, with the reasons and what to do."""
    if os.environ.get(ENVIRONMENT):
        return _not_the_named(refused)
    names = ", ".join(package.name for package in wanted())
    reasons = "".join(f"{refusal.why}. " for refusal in refused) or f"None of {names} is installed. "
    is_refused = any(refusal.library.package == PREBUILT for refusal in refused)
    another = "What else can be installed is in docs/building.md." if is_refused else _INSTALL
    return LibraryError(f"No ggml can be used. {reasons}{another}")


def _not_the_named(refused: Sequence[Refusal]) -> LibraryError:
    """The error where the only package to look at is not installed, or cannot be used: no other is of any help."""
    (package,) = wanted()
    others = [name for name in _installed() if name != package.name]
    instead = f"set {ENVIRONMENT} to {' or '.join(others)}" if others else f"leave {ENVIRONMENT} out"
    if refused:
        problem, repair = f"cannot be used. {refused[0].why}", f"Install it again: {package.install}"
    else:
        problem, repair = "is not installed", f"Install it: {package.install}"
    return LibraryError(f"{ENVIRONMENT} asks for {package.name}, which {problem}. {repair}; or {instead}.")


def _installed() -> list[str]:
    """The names of the packages that are installed, usable or not."""
    return [package.name for package in PACKAGES if package.find() is not None]


def candidates() -> Iterator[Library | Refusal]:
    """The installed library of each package, in order: itself where it can be used, else why it cannot."""
    for package in wanted():
        library = package.find()
        if library is not None:
            why = trial.problem(library)
            yield library if why is None else Refusal(library, why)


def wanted() -> tuple[Package, ...]:
    """The packages to look at: all, or the one that SLIMOE_LIBRARY names; raises UsageError where that is none."""
    name = os.environ.get(ENVIRONMENT, "")
    found = tuple(package for package in PACKAGES if name in ("", package.name))
    if not found:
        names = ", ".join(package.name for package in PACKAGES)
        there = f"Of those, {' and '.join(_installed())} can be taken here" if _installed() else "None is installed"
        advice = f"leave {ENVIRONMENT} out for the first that works"
        raise UsageError(f"{ENVIRONMENT} is {name!r}, which is none of {names}. {there}; {advice}.")
    return found


@functools.cache
def ggml_version() -> str:
    """The version of the ggml in use, such as 0.25.3; raises LibraryError as `chosen` does."""
    function = open_library("ggml-base").ggml_version
    function.restype = ctypes.c_char_p
    return str(function().decode())


def library_name() -> str:
    """The package in use with its version, and its ggml's; raises LibraryError as `chosen` does."""
    return f"{chosen()} (ggml {ggml_version()})"


def open_library(part: str) -> ctypes.CDLL:
    """Opens one library, such as `ggml-base`; raises LibraryError where none can be used, or it lacks that part."""
    library = chosen()
    path = library.path(part)
    if part == "ggml-rpc" and (library.package.single or not path.is_file()):
        raise LibraryError(f"{library} has no RPC (libggml-rpc), which --rpc needs. {_BUILD}")
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryError(f"{library} cannot be opened ({error})") from None


def c_function(library: ctypes.CDLL) -> Callable[[Callable[..., Any]], Any]:
    """Binds the C function of the decorated stub's name and signature; the stub's body never runs."""

    def bind(stub: Callable[..., Any]) -> Any:
        try:
            function = getattr(library, stub.__name__)
        except AttributeError:
            raise LibraryError(f"{chosen()} has no function {stub.__name__}") from None
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
