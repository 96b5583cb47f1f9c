"""ggml's tensors and operations: the part of its C API that this program uses, as typed functions over ctypes.

Importing this module opens the libraries and checks that they are of a kind it was written for: version, type names,
block sizes, structure layout. Raises LibraryError otherwise. Source: ggml.h of ggml 0.25.3, from which what is bound
here does not differ up to 0.27; structures and types are in `struct`, buffers and devices in `buffers`. Tensors,
contexts and graphs are plain addresses.
"""

# mypy: disable-error-code="empty-body"

import ctypes
import re
from typing import Annotated, Any

from gguf import GGMLQuantizationType

from slimoe.offload.errors import LibraryError
from slimoe.offload.ggml.library import (
    F32,
    I32,
    I64,
    VERSIONS,
    Bool,
    Ptr,
    Size,
    Str,
    c_function,
    chosen,
    open_library,
)
from slimoe.offload.ggml.struct import InitParams as InitParams
from slimoe.offload.ggml.struct import Tensor as Tensor
from slimoe.offload.ggml.struct import array_at as array_at
from slimoe.offload.ggml.struct import check_types
from slimoe.offload.ggml.struct import ggml_blck_size as ggml_blck_size
from slimoe.offload.ggml.struct import ggml_quantize_chunk as ggml_quantize_chunk
from slimoe.offload.ggml.struct import ggml_type_size as ggml_type_size
from slimoe.offload.ggml.struct import tensor_at as tensor_at

_BASE = open_library("ggml-base")

OBJECT_BYTES = 32
"""`sizeof(struct ggml_object)`, which a context puts before each tensor."""
PREC_F32 = 10
SORT_DESCENDING = 1
HINT_HADAMARD = 1
"""What a product is told whose matrix is Hadamard's: backends with a fast transform then do not multiply."""
BATCH_QUERIES = 64
"""From so many queries on ggml's attention takes its kernel for batches, which is faster and rounds differently."""


LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
LogCallback = Annotated[Any, LOG_CALLBACK]


# --- contexts, tensors, graphs -----------------------------------------------------------------------------


@c_function(_BASE)
def ggml_version() -> Str: ...


@c_function(_BASE)
def ggml_log_set(callback: LogCallback, user_data: Ptr) -> None: ...


@c_function(_BASE)
def ggml_init(params: InitParams) -> Ptr: ...


@c_function(_BASE)
def ggml_free(ctx: Ptr) -> None: ...


@c_function(_BASE)
def ggml_tensor_overhead() -> Size: ...


@c_function(_BASE)
def ggml_graph_overhead_custom(size: Size, grads: Bool) -> Size: ...


@c_function(_BASE)
def ggml_new_graph_custom(ctx: Ptr, size: Size, grads: Bool) -> Ptr: ...


@c_function(_BASE)
def ggml_build_forward_expand(graph: Ptr, tensor: Ptr) -> None: ...


@c_function(_BASE)
def ggml_graph_n_nodes(graph: Ptr) -> I32: ...


@c_function(_BASE)
def ggml_graph_node(graph: Ptr, index: I32) -> Ptr: ...


@c_function(_BASE)
def ggml_op_desc(tensor: Ptr) -> Str: ...


@c_function(_BASE)
def ggml_new_tensor_1d(ctx: Ptr, kind: I32, ne0: I64) -> Ptr: ...


@c_function(_BASE)
def ggml_new_tensor_2d(ctx: Ptr, kind: I32, ne0: I64, ne1: I64) -> Ptr: ...


@c_function(_BASE)
def ggml_new_tensor_3d(ctx: Ptr, kind: I32, ne0: I64, ne1: I64, ne2: I64) -> Ptr: ...


@c_function(_BASE)
def ggml_new_tensor_4d(ctx: Ptr, kind: I32, ne0: I64, ne1: I64, ne2: I64, ne3: I64) -> Ptr: ...


@c_function(_BASE)
def ggml_set_name(tensor: Ptr, name: Str) -> Ptr: ...


@c_function(_BASE)
def ggml_set_input(tensor: Ptr) -> None: ...


@c_function(_BASE)
def ggml_set_output(tensor: Ptr) -> None: ...


@c_function(_BASE)
def ggml_get_data(tensor: Ptr) -> Ptr: ...


@c_function(_BASE)
def ggml_n_dims(tensor: Ptr) -> I32: ...


@c_function(_BASE)
def ggml_nbytes(tensor: Ptr) -> Size: ...


# --- operations --------------------------------------------------------------------------------------------


@c_function(_BASE)
def ggml_get_rows(ctx: Ptr, a: Ptr, rows: Ptr) -> Ptr: ...


@c_function(_BASE)
def ggml_set_rows(ctx: Ptr, a: Ptr, source: Ptr, rows: Ptr) -> Ptr: ...


@c_function(_BASE)
def ggml_add(ctx: Ptr, a: Ptr, b: Ptr) -> Ptr: ...


@c_function(_BASE)
def ggml_mul(ctx: Ptr, a: Ptr, b: Ptr) -> Ptr: ...


@c_function(_BASE)
def ggml_out_prod(ctx: Ptr, a: Ptr, b: Ptr) -> Ptr: ...


@c_function(_BASE)
def ggml_scale(ctx: Ptr, a: Ptr, factor: F32) -> Ptr: ...


@c_function(_BASE)
def ggml_rms_norm(ctx: Ptr, a: Ptr, eps: F32) -> Ptr: ...


@c_function(_BASE)
def ggml_mul_mat(ctx: Ptr, a: Ptr, b: Ptr) -> Ptr: ...


@c_function(_BASE)
def ggml_mul_mat_set_hint(product: Ptr, hint: I32) -> None: ...


@c_function(_BASE)
def ggml_mul_mat_id(ctx: Ptr, stack: Ptr, b: Ptr, ids: Ptr) -> Ptr: ...


@c_function(_BASE)
def ggml_prec_set_acc(a: Ptr, precision: I32) -> Bool: ...


@c_function(_BASE)
def ggml_prec_set_src(a: Ptr, precision: I32, index: I32) -> Bool: ...


@c_function(_BASE)
def ggml_sum_rows(ctx: Ptr, a: Ptr) -> Ptr: ...


@c_function(_BASE)
def ggml_div(ctx: Ptr, a: Ptr, b: Ptr) -> Ptr: ...


@c_function(_BASE)
def ggml_soft_max(ctx: Ptr, a: Ptr) -> Ptr: ...


@c_function(_BASE)
def ggml_clamp(ctx: Ptr, a: Ptr, least: F32, most: F32) -> Ptr: ...


@c_function(_BASE)
def ggml_sigmoid(ctx: Ptr, a: Ptr) -> Ptr: ...


@c_function(_BASE)
def ggml_silu(ctx: Ptr, a: Ptr) -> Ptr: ...


@c_function(_BASE)
def ggml_relu(ctx: Ptr, a: Ptr) -> Ptr: ...


@c_function(_BASE)
def ggml_sqr(ctx: Ptr, a: Ptr) -> Ptr: ...


@c_function(_BASE)
def ggml_softplus(ctx: Ptr, a: Ptr) -> Ptr: ...


@c_function(_BASE)
def ggml_ssm_conv(ctx: Ptr, inputs: Ptr, taps: Ptr) -> Ptr: ...


@c_function(_BASE)
def ggml_gated_delta_net(
    ctx: Ptr, q: Ptr, k: Ptr, v: Ptr, gate: Ptr, beta: Ptr, state: Ptr, n_snapshots: I64
) -> Ptr: ...


@c_function(_BASE)
def ggml_ssm_scan(
    ctx: Ptr, states: Ptr, x: Ptr, dt: Ptr, a: Ptr, b: Ptr, c: Ptr, ids: Ptr, n_snapshots: I64
) -> Ptr: ...


@c_function(_BASE)
def ggml_fill(ctx: Ptr, a: Ptr, value: F32) -> Ptr: ...


@c_function(_BASE)
def ggml_argsort(ctx: Ptr, a: Ptr, order: I32) -> Ptr: ...


@c_function(_BASE)
def ggml_argsort_top_k(ctx: Ptr, a: Ptr, k: I32) -> Ptr: ...


@c_function(_BASE)
def ggml_add_id(ctx: Ptr, a: Ptr, b: Ptr, ids: Ptr) -> Ptr: ...


@c_function(_BASE)
def ggml_swiglu(ctx: Ptr, a: Ptr) -> Ptr: ...


@c_function(_BASE)
def ggml_swiglu_split(ctx: Ptr, gate: Ptr, up: Ptr) -> Ptr: ...


@c_function(_BASE)
def ggml_swiglu_oai(ctx: Ptr, gate: Ptr, up: Ptr, alpha: F32, limit: F32) -> Ptr: ...


@c_function(_BASE)
def ggml_geglu_split(ctx: Ptr, gate: Ptr, up: Ptr) -> Ptr: ...


@c_function(_BASE)
def ggml_tanh(ctx: Ptr, a: Ptr) -> Ptr: ...


@c_function(_BASE)
def ggml_repeat_4d(ctx: Ptr, a: Ptr, ne0: I64, ne1: I64, ne2: I64, ne3: I64) -> Ptr: ...


@c_function(_BASE)
def ggml_rope_ext(
    ctx: Ptr,
    a: Ptr,
    positions: Ptr,
    factors: Ptr,
    n_dims: I32,
    mode: I32,
    n_ctx_orig: I32,
    freq_base: F32,
    freq_scale: F32,
    ext_factor: F32,
    attn_factor: F32,
    beta_fast: F32,
    beta_slow: F32,
) -> Ptr: ...


@c_function(_BASE)
def ggml_rope_set_offset(rotated: Ptr, n_offset: I32) -> Ptr: ...


@c_function(_BASE)
def ggml_concat(ctx: Ptr, a: Ptr, b: Ptr, axis: I32) -> Ptr: ...


@c_function(_BASE)
def ggml_cont(ctx: Ptr, a: Ptr) -> Ptr: ...


@c_function(_BASE)
def ggml_cont_2d(ctx: Ptr, a: Ptr, ne0: I64, ne1: I64) -> Ptr: ...


@c_function(_BASE)
def ggml_flash_attn_ext(
    ctx: Ptr, q: Ptr, k: Ptr, v: Ptr, mask: Ptr, scale: F32, max_bias: F32, softcap: F32
) -> Ptr: ...


@c_function(_BASE)
def ggml_flash_attn_ext_add_sinks(attended: Ptr, sinks: Ptr) -> None: ...


@c_function(_BASE)
def ggml_cpy(ctx: Ptr, a: Ptr, b: Ptr) -> Ptr: ...


@c_function(_BASE)
def ggml_reshape_2d(ctx: Ptr, a: Ptr, ne0: I64, ne1: I64) -> Ptr: ...


@c_function(_BASE)
def ggml_reshape_3d(ctx: Ptr, a: Ptr, ne0: I64, ne1: I64, ne2: I64) -> Ptr: ...


@c_function(_BASE)
def ggml_reshape_4d(ctx: Ptr, a: Ptr, ne0: I64, ne1: I64, ne2: I64, ne3: I64) -> Ptr: ...


@c_function(_BASE)
def ggml_view_1d(ctx: Ptr, a: Ptr, ne0: I64, offset: Size) -> Ptr: ...


@c_function(_BASE)
def ggml_view_2d(ctx: Ptr, a: Ptr, ne0: I64, ne1: I64, nb1: Size, offset: Size) -> Ptr: ...


@c_function(_BASE)
def ggml_view_3d(ctx: Ptr, a: Ptr, ne0: I64, ne1: I64, ne2: I64, nb1: Size, nb2: Size, offset: Size) -> Ptr: ...


@c_function(_BASE)
def ggml_view_4d(
    ctx: Ptr, a: Ptr, ne0: I64, ne1: I64, ne2: I64, ne3: I64, nb1: Size, nb2: Size, nb3: Size, offset: Size
) -> Ptr: ...


@c_function(_BASE)
def ggml_permute(ctx: Ptr, a: Ptr, axis0: I32, axis1: I32, axis2: I32, axis3: I32) -> Ptr: ...


# --- the check at load -------------------------------------------------------------------------------------


def _check_library() -> None:
    version = ggml_version().decode()
    number = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if not VERSIONS[0] <= number <= VERSIONS[1]:
        oldest, newest = (".".join(map(str, each)) for each in VERSIONS)
        raise LibraryError(f"{chosen()} has ggml {version}, but {oldest} to {newest} is needed")
    check_types()
    ctx = ggml_init(InitParams(1 << 16, None, True))
    address = ggml_new_tensor_4d(ctx, GGMLQuantizationType.Q8_0, 64, 3, 5, 7)
    ggml_set_name(address, b"layout")
    tensor = tensor_at(address)
    seen = (tensor.type, tuple(tensor.ne), tuple(tensor.nb), tensor.name, tensor.data)
    expected = (8, (64, 3, 5, 7), (34, 68, 204, 1020), b"layout", None)
    n_bytes = ggml_tensor_overhead() - OBJECT_BYTES
    ggml_free(ctx)
    if seen != expected or n_bytes != ctypes.sizeof(Tensor):
        raise LibraryError(
            f"{chosen()} has a tensor structure of {n_bytes} bytes, not the known one of {ctypes.sizeof(Tensor)}"
        )


_check_library()
