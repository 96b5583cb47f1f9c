"""Instructions of the processor, and those that the library was compiled for."""

import contextlib
import ctypes
from collections.abc import Mapping

from slimoe.offload.ggml import buffers as ggml_backend

_FLAGS = {
    "AVX": "avx",
    "AVX2": "avx2",
    "FMA": "fma",
    "F16C": "f16c",
    "BMI2": "bmi2",
    "AVX_VNNI": "avx_vnni",
    "AVX512": "avx512f",
    "AVX512_VBMI": "avx512vbmi",
    "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16",
    "NEON": "asimd",
    "DOTPROD": "asimddp",
    "MATMUL_INT8": "i8mm",
    "SVE": "sve",
    "SME": "sme",
}
"""ggml's names of instructions that make products faster, and Linux's in /proc/cpuinfo.

AMX is left out, since GCC breaks it."""


class _Feature(ctypes.Structure):
    """`struct ggml_backend_feature`."""

    _fields_ = (("name", ctypes.c_char_p), ("value", ctypes.c_char_p))


def library_features() -> tuple[str, ...]:
    """ggml's names of the instructions that the library in use computes with, of those that are known here."""
    registry = ggml_backend.ggml_backend_cpu_reg()
    address = ggml_backend.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_get_features")
    if not address:
        return ()
    features = ctypes.CFUNCTYPE(ctypes.POINTER(_Feature), ctypes.c_void_p)(address)(registry)
    found, index = set[str](), 0
    while features[index].name:
        if features[index].value == b"1":
            found.add(features[index].name.decode())
        index += 1
    return tuple(name for name in _FLAGS if name in found)


def processor_features() -> tuple[str, ...] | None:
    """The same names of what the processor has, as Linux says it; None on other systems."""
    lines: Mapping[str, str] = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        lines = {name.strip(): flags for name, _, flags in (line.partition(":") for line in file)}
    flags = lines.get("flags") or lines.get("Features")
    return None if flags is None else tuple(name for name, flag in _FLAGS.items() if flag in flags.split())
