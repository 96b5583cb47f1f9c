"""The part of libllama's C API that this program uses: its vocabulary, made from metadata in memory.

Sources: llama.h and gguf.h of the pinned version. Models, vocabularies and GGUF contexts are plain addresses.
"""
# ruff: noqa: D103 - the functions are llama.cpp's own, documented in its headers
# mypy: disable-error-code="empty-body"

import ctypes

from slimoe.offload.ggml.library import I32, U32, Bool, Ptr, Size, Str, c_function, open_library

_BASE = open_library("ggml-base")
_LLAMA = open_library("llama")

LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
LOG_ERROR = 4
GGUF_INT32, GGUF_FLOAT32 = 5, 6


class ModelParams(ctypes.Structure):
    """`struct llama_model_params`, with room for what newer versions have behind it: they fill and read that too."""

    _fields_ = (
        ("devices", ctypes.c_void_p),
        ("tensor_buft_overrides", ctypes.c_void_p),
        ("n_gpu_layers", ctypes.c_int32),
        ("split_mode", ctypes.c_int),
        ("load_mode", ctypes.c_int),
        ("lazy_mode", ctypes.c_int),
        ("main_gpu", ctypes.c_int32),
        ("tensor_split", ctypes.c_void_p),
        ("progress_callback", ctypes.c_void_p),
        ("progress_callback_user_data", ctypes.c_void_p),
        ("kv_overrides", ctypes.c_void_p),
        ("vocab_only", ctypes.c_bool),
        ("check_tensors", ctypes.c_bool),
        ("use_extra_bufts", ctypes.c_bool),
        ("no_host", ctypes.c_bool),
        ("no_alloc", ctypes.c_bool),
        ("load_mtp", ctypes.c_bool),
        ("further", ctypes.c_char * 256),
    )


# --- metadata in memory --------------------------------------------------------------------------------------


@c_function(_BASE)
def gguf_init_empty() -> Ptr: ...


@c_function(_BASE)
def gguf_free(ctx: Ptr) -> None: ...


@c_function(_BASE)
def gguf_set_val_u32(ctx: Ptr, key: Str, value: U32) -> None: ...


@c_function(_BASE)
def gguf_set_val_bool(ctx: Ptr, key: Str, value: Bool) -> None: ...


@c_function(_BASE)
def gguf_set_val_str(ctx: Ptr, key: Str, value: Str) -> None: ...


@c_function(_BASE)
def gguf_set_arr_data(ctx: Ptr, key: Str, kind: I32, data: Ptr, n: Size) -> None: ...


@c_function(_BASE)
def gguf_set_arr_str(ctx: Ptr, key: Str, data: Ptr, n: Size) -> None: ...


# --- the vocabulary ------------------------------------------------------------------------------------------


@c_function(_LLAMA)
def llama_log_get(callback: Ptr, user_data: Ptr) -> None: ...


@c_function(_LLAMA)
def llama_log_set(callback: Ptr, user_data: Ptr) -> None: ...


@c_function(_LLAMA)
def llama_model_default_params() -> ModelParams: ...


@c_function(_LLAMA)
def llama_model_init_from_user(metadata: Ptr, set_tensor_data: Ptr, user_data: Ptr, params: ModelParams) -> Ptr: ...


@c_function(_LLAMA)
def llama_model_free(model: Ptr) -> None: ...


@c_function(_LLAMA)
def llama_model_get_vocab(model: Ptr) -> Ptr: ...


@c_function(_LLAMA)
def llama_vocab_bos(vocab: Ptr) -> I32: ...


@c_function(_LLAMA)
def llama_vocab_eos(vocab: Ptr) -> I32: ...


@c_function(_LLAMA)
def llama_vocab_get_add_bos(vocab: Ptr) -> Bool: ...


@c_function(_LLAMA)
def llama_tokenize(
    vocab: Ptr, text: Str, n_bytes: I32, tokens: Ptr, n_tokens_max: I32, add_special: Bool, parse_special: Bool
) -> I32: ...


@c_function(_LLAMA)
def llama_token_to_piece(vocab: Ptr, token: I32, buffer: Ptr, n_bytes: I32, lstrip: I32, special: Bool) -> I32: ...
