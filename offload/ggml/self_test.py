"""Tries a library: structures, a small graph, matrices of many types and a vocabulary, next to what they must be.

Run as `python -m slimoe.offload.ggml.self_test PACKAGE FOLDER` by `trial`, in a process of its own, since a library of
another version may end it. It prints what is wrong, a sentence without its stop. What must come out is numpy's.
"""

import ctypes
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from numpy.typing import NDArray

from slimoe.offload.errors import LibraryError
from slimoe.offload.ggml.library import chosen, use
from slimoe.offload.ggml.packages import PACKAGES, Library

Array = NDArray[np.float32]

_GUARD = 1024
"""Bytes behind a structure that nobody may write to."""
_TYPES = ("Q4_0", "Q5_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4")
_N_EMBD, _N_HEAD, _N_EXPERT, _N_USED, _N_FF, _N_TOKENS = 64, 2, 4, 2, 32, 5
_EPS, _BASE, _SCALE = 1e-5, 10000.0, 0.25
_TOLERANCE = 2e-2
"""Of the largest value: ggml's attention reads halves, and quantised products round what they are multiplied with."""


def main() -> None:
    """Tries the library that the command line names and ends the process, with status 1 if something is wrong."""
    _, name, folder = sys.argv
    package = next(package for package in PACKAGES if package.name == name)
    use(Library(package, Path(folder)))
    try:
        # These import the modules that bind its functions, which checks types and the structure of tensors as well.
        check_structures()
        check_vocabulary()
        check_graph()
        check_types()
    except LibraryError as error:
        print(error)
        sys.exit(1)


def check_structures() -> None:
    """Raises LibraryError where the library fills other structures than ours."""
    from slimoe.offload.ggml import abort, buffers, device, llama

    assert abort.ggml_set_abort_callback
    cpu = buffers.ggml_backend_reg_dev_get(buffers.ggml_backend_cpu_reg(), 0)
    pool = _filled(
        buffers.ThreadpoolParams, lambda address: buffers.ggml_threadpool_params_init(address, 3), "thread pool"
    )
    props = _filled(
        device.DeviceProps, lambda address: device.ggml_backend_dev_get_props(cpu, address), "device properties"
    )
    model = llama.llama_model_default_params()
    seen = (
        (pool.n_threads, pool.prio, pool.strict_cpu, pool.paused),
        (props.name, props.type, props.memory_total > 0),
        (model.devices, model.main_gpu, model.progress_callback, model.vocab_only, model.check_tensors, model.no_alloc),
    )
    expected = ((3, 0, False, False), (b"CPU", device.TYPE_CPU, True), (None, 0, None, False, False, False))
    if seen != expected:
        raise LibraryError(f"{chosen()} has other structures: {seen} in place of {expected}")


def _filled(structure: type[ctypes.Structure], fill: Callable[[int], object], what: str) -> Any:
    """A structure that the library has filled; raises LibraryError if it wrote beyond it."""
    n_bytes = ctypes.sizeof(structure)
    memory = ctypes.create_string_buffer(b"\xa5" * (n_bytes + _GUARD), n_bytes + _GUARD)
    fill(ctypes.addressof(memory))
    if memory.raw[n_bytes:] != b"\xa5" * _GUARD:
        raise LibraryError(f"{chosen()} has a larger structure of {what} than the known one of {n_bytes} bytes")
    return structure.from_buffer_copy(memory)


def check_vocabulary() -> None:
    """Raises LibraryError where libllama makes no vocabulary of metadata in memory, or splits a text otherwise."""
    from slimoe.offload.ggml import llama

    texts = [b"<unk>", b"<s>", b"c", b"ab", b"abc", *(b"<0x%02X>" % byte for byte in range(256))]
    types = np.array([2, 3, 1, 1, 1, *[6] * 256], np.int32)
    scores = np.array([0, 0, -3, -1, -2, *[0] * 256], np.float32)
    silent = llama.LOG_CALLBACK(lambda *_: None)
    llama.llama_log_set(ctypes.cast(silent, ctypes.c_void_p).value, None)
    metadata = llama.gguf_init_empty()
    llama.gguf_set_val_str(metadata, b"general.architecture", b"llama")
    llama.gguf_set_val_str(metadata, b"tokenizer.ggml.model", b"llama")
    llama.gguf_set_val_bool(metadata, b"tokenizer.ggml.add_space_prefix", False)
    llama.gguf_set_val_u32(metadata, b"tokenizer.ggml.bos_token_id", 1)
    array = (ctypes.c_char_p * len(texts))(*texts)
    llama.gguf_set_arr_str(metadata, b"tokenizer.ggml.tokens", ctypes.addressof(array), len(texts))
    for key, kind, values in (
        (b"tokenizer.ggml.token_type", llama.GGUF_INT32, types),
        (b"tokenizer.ggml.scores", llama.GGUF_FLOAT32, scores),
    ):
        llama.gguf_set_arr_data(metadata, key, kind, values.ctypes.data, len(values))
    params = llama.llama_model_default_params()
    params.vocab_only = True
    model = llama.llama_model_init_from_user(metadata, None, None, params)
    llama.gguf_free(metadata)
    if not model:
        raise LibraryError(f"{chosen()} does not load a vocabulary")
    vocab = llama.llama_model_get_vocab(model)
    tokens = (ctypes.c_int32 * 16)()
    n = llama.llama_tokenize(vocab, b"abcab", 5, ctypes.addressof(tokens), 16, False, False)
    piece = ctypes.create_string_buffer(16)
    n_bytes = llama.llama_token_to_piece(vocab, 4, ctypes.addressof(piece), 16, 0, True)
    seen = (tokens[: max(0, n)], piece.raw[: max(0, n_bytes)], llama.llama_vocab_bos(vocab))
    expected = ([4, 3], b"abc", 1)
    llama.llama_model_free(model)
    if seen != expected:
        raise LibraryError(f"{chosen()} splits a text into {seen}, not {expected}")


class _Graph:
    """Tensors of given values and what is computed of them on two threads."""

    def __init__(self) -> None:
        from slimoe.offload.ggml import ops

        self.ctx = ops.ggml_init(ops.InitParams(1 << 20, None, True))
        self._values = dict[int, NDArray[Any]]()

    def tensor(self, values: NDArray[Any], kind: int | None = None) -> int:
        """A tensor of an array, whose last axis is the fastest; of another type its bytes are the array's."""
        from slimoe.offload.ggml import ops

        kinds = {np.dtype(np.float32): Type.F32, np.dtype(np.float16): Type.F16, np.dtype(np.int32): Type.I32}
        ne = [1] * (4 - values.ndim) + list(values.shape)
        ne[-1] = ne[-1] if kind is None else ne[-1] // ops.ggml_type_size(kind) * ops.ggml_blck_size(kind)
        tensor: int = ops.ggml_new_tensor_4d(self.ctx, kinds[values.dtype] if kind is None else kind, *reversed(ne))
        ops.ggml_set_input(tensor)
        self._values[tensor] = np.ascontiguousarray(values)
        return tensor

    def computed(self, result: int) -> Array:
        """The values of a tensor of floats, flat."""
        from slimoe.offload.ggml import buffers, ops
        from slimoe.offload.ggml.cpu_backend import CpuBackend

        graph = ops.ggml_new_graph_custom(self.ctx, 256, False)
        ops.ggml_set_output(result)
        ops.ggml_build_forward_expand(graph, result)
        with closing(CpuBackend(2)) as backend:
            allocator = buffers.ggml_gallocr_new(backend.buft)
            if not buffers.ggml_gallocr_alloc_graph(allocator, graph):
                raise LibraryError(f"{chosen()} does not allocate a graph")
            for tensor, values in self._values.items():
                backend.set(tensor, values)
            backend.compute(graph)
            found = np.empty(ops.ggml_nbytes(result) // 4, np.float32)
            backend.get(result, found)
            buffers.ggml_gallocr_free(allocator)
        return found


def check_graph() -> None:
    """Raises LibraryError where a layer of attention and experts gives other numbers than numpy."""
    from slimoe.offload.ggml import ops

    random = np.random.default_rng(0)
    hidden, norm, q, k, v, router, gate, up, down = (
        (random.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
        for shape in (
            *((_N_TOKENS, _N_EMBD), (_N_EMBD,)),
            *((_N_EMBD, _N_EMBD), (_N_EMBD, _N_EMBD), (_N_EMBD, _N_EMBD), (_N_EXPERT, _N_EMBD)),
            *((_N_EXPERT, _N_FF, _N_EMBD), (_N_EXPERT, _N_FF, _N_EMBD), (_N_EXPERT, _N_EMBD, _N_FF)),
        )
    )
    graph, n_rot = _Graph(), _N_EMBD // _N_HEAD
    ctx, x = graph.ctx, graph.tensor(hidden)
    normed = ops.ggml_mul(ctx, ops.ggml_rms_norm(ctx, x, _EPS), graph.tensor(norm))
    heads = []
    for matrix, is_rotated in ((q, True), (k, True), (v, False)):
        head = ops.ggml_mul_mat(ctx, graph.tensor(matrix), normed)
        head = ops.ggml_reshape_3d(ctx, head, n_rot, _N_HEAD, _N_TOKENS)
        if is_rotated:
            positions = graph.tensor(np.arange(_N_TOKENS, dtype=np.int32))
            head = ops.ggml_rope_ext(ctx, head, positions, None, n_rot, 0, 0, _BASE, 1.0, 0.0, 1.0, 32.0, 1.0)
        heads.append(ops.ggml_permute(ctx, head, 0, 2, 1, 3))
    stored = [graph.tensor(np.zeros((_N_HEAD, _N_TOKENS, n_rot), np.float16)) for _ in range(2)]
    copies = [ops.ggml_cpy(ctx, head, cell) for head, cell in zip(heads[1:], stored, strict=True)]
    mask = np.triu(np.full((_N_TOKENS, _N_TOKENS), -np.inf, np.float16), 1)
    attended = ops.ggml_flash_attn_ext(ctx, heads[0], *copies, graph.tensor(mask), _SCALE, 0.0, 0.0)
    x = ops.ggml_add(ctx, x, ops.ggml_reshape_2d(ctx, attended, _N_EMBD, _N_TOKENS))
    scores = ops.ggml_soft_max(ctx, ops.ggml_mul_mat(ctx, graph.tensor(router), x))
    ids = ops.ggml_argsort_top_k(ctx, scores, _N_USED)
    weights = ops.ggml_get_rows(ctx, ops.ggml_reshape_3d(ctx, scores, 1, _N_EXPERT, _N_TOKENS), ids)
    rows = ops.ggml_reshape_3d(ctx, x, _N_EMBD, 1, _N_TOKENS)
    projected = [ops.ggml_mul_mat_id(ctx, graph.tensor(stack), rows, ids) for stack in (gate, up)]
    answers = ops.ggml_mul_mat_id(ctx, graph.tensor(down), ops.ggml_swiglu_split(ctx, *projected), ids)
    found = graph.computed(ops.ggml_scale(ctx, ops.ggml_mul(ctx, answers, weights), 2.0))
    ops.ggml_free(ctx)
    expected = 2.0 * _layer(hidden, norm, (q, k, v), router, (gate, up, down))
    _compare("a layer's numbers", found, expected)


def _layer(hidden: Array, norm: Array, qkv: tuple[Array, ...], router: Array, experts: tuple[Array, ...]) -> Array:
    """The selected experts' weighted answers [n_tokens, n_used, n_embd], the strongest expert first."""
    normed = hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + _EPS) * norm
    q, k, v = (np.reshape(normed @ matrix.T, (_N_TOKENS, _N_HEAD, -1)) for matrix in qkv)
    n_rot = q.shape[-1]
    angles = np.arange(_N_TOKENS)[:, None, None] * _BASE ** (-np.arange(0, n_rot, 2) / n_rot)
    turned = np.exp(1j * angles)
    pairs = ((head[..., ::2] + 1j * head[..., 1::2]) * turned for head in (q, k))
    q, k = (pair[..., None].view(float).reshape(v.shape) for pair in pairs)
    logits = np.einsum("thd,shd->hts", q, k) * _SCALE + np.triu(np.full((_N_TOKENS, _N_TOKENS), -np.inf), 1)
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    x = hidden + np.einsum("hts,shd->thd", shares, v).reshape(hidden.shape)
    scores = np.exp(x @ router.T)
    scores /= scores.sum(-1, keepdims=True)
    ids = np.argsort(-scores)[:, :_N_USED]
    gate, up, down = (stack[ids] for stack in experts)
    gated, lifted = (np.einsum("tufe,te->tuf", stack, x) for stack in (gate, up))
    answers = np.einsum("tuef,tuf->tue", down, gated / (1 + np.exp(-gated)) * lifted)
    weighted: Array = (answers * np.take_along_axis(scores, ids, 1)[..., None]).astype(np.float32)
    return weighted


def check_types() -> None:
    """Raises LibraryError where a quantised matrix gives other products than gguf's own reader of its blocks."""
    from slimoe.offload.ggml import ops

    random = np.random.default_rng(1)
    matrix, rows = (random.standard_normal((n, 512)).astype(np.float32) for n in (8, 3))
    for name in _TYPES:
        kind = Type[name]
        blocks = np.empty((8, 512 // ops.ggml_blck_size(kind) * ops.ggml_type_size(kind)), np.uint8)
        n_bytes = ops.ggml_quantize_chunk(kind, matrix.ctypes.data, blocks.ctypes.data, 0, 8, 512, None)
        if n_bytes != blocks.size:
            raise LibraryError(f"{chosen()} writes {n_bytes} bytes of {name}, not {blocks.size}")
        graph = _Graph()
        found = graph.computed(ops.ggml_mul_mat(graph.ctx, graph.tensor(blocks, kind), graph.tensor(rows)))
        ops.ggml_free(graph.ctx)
        _compare(f"products of {name}", found, rows @ dequantize(blocks, kind).T)
        _compare(f"weights of {name}", dequantize(blocks, kind).ravel(), matrix, tolerance=0.5)


def _compare(what: str, found: Array, expected: Array, tolerance: float = _TOLERANCE) -> None:
    error = float(np.abs(found - expected.ravel()).max() / np.abs(expected).max())
    if not error < tolerance:
        raise LibraryError(f"{chosen()} computes {what} wrongly, by {error:.3g} of the largest")


if __name__ == "__main__":
    main()
