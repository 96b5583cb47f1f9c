"""llama.cpp's own quantizer, with an importance matrix: the rival of everything that makes files smaller."""

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path

import llama_cpp
import numpy as np

from slimoe.offload.errors import SlimoeError

FILE_TYPES = {"Q2_K": 10, "Q3_K_M": 12, "Q4_K_M": 15}
"""llama.cpp's numbers of the mixes that are compared with."""


_SILENT = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)


class QuantizerError(SlimoeError):
    """llama.cpp did not make the file."""


def llama_quantize(source: Path, target: Path, name: str, importance: Mapping[str, np.ndarray], n_threads: int) -> None:
    """Makes the mix `name` of a GGUF file in F32 or F16; `importance` has the mean squares of what each tensor reads,
    [matrices, n_per_row] float32. Raises QuantizerError.
    """
    llama_cpp.llama_log_set(_SILENT, None)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = FILE_TYPES[name], n_threads
    rows = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
    for row, (tensor, values) in zip(rows, importance.items(), strict=False):
        row.name, row.size = tensor.encode(), values.size
        row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if importance:
        params.imatrix = rows
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), params):
        raise QuantizerError(f"llama.cpp could not make {name} of {source}.")
