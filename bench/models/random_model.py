"""Writes random models of true shape: a shape and a seed give a GGUF file in seconds.

Speed does not depend on the weights' values, so none have to be downloaded. Values are drawn with the deviation
that keeps activations and logits near 1. A pool of blocks is quantised once for each kind of tensor and every
tensor is filled with blocks drawn from it, so that a file is written about as fast as the disk takes it and
experts differ from each other. llama.cpp loads the files, with a made-up vocabulary or without any. Experts are
chosen evenly, or about as a trained model chooses them (`bench.models.topics`).

    python -m bench.models.random_model mixtral2 /tmp/mixtral2.gguf --seed 1 --type Q4_K
"""

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType

from bench.models.fine_models import PUBLISHED, TIED
from bench.models.random_blocks import RandomTensor, block_pool, random_pieces, topical_pieces
from bench.models.shapes import MODELS, model_named
from bench.models.topics import STYLES, RoutingStyle
from slimoe.converter.quant.mixes import fitting_type
from slimoe.offload.errors import SlimoeError, UsageError
from slimoe.offload.files.whole_file import whole_file
from slimoe.offload.gguf.header import Value
from slimoe.offload.model.mtp_block import with_mtp_layer
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensor_list import RECURRENT_FLOATS, ModelTensor, model_tensors

TYPES = (
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q6_K",
    "Q5_K",
    "Q4_K",
    "Q3_K",
    "Q2_K",
    "Q5_0",
    "Q5_1",
    "Q4_0",
    "Q4_1",
    "IQ4_NL",
    "IQ4_XS",
    "IQ3_S",
    "IQ2_S",
    "MXFP4",
)
SPECIAL_TOKENS = (("<unk>", TokenType.UNKNOWN), ("<s>", TokenType.CONTROL), ("</s>", TokenType.CONTROL))
BYTE_TOKENS = tuple((f"<0x{byte:02X}>", TokenType.BYTE) for byte in range(256))


_ATTENTION_BIASES = {
    "qwen2moe": ("attn_q", "attn_k", "attn_v"),
    "glm4moe": ("attn_q", "attn_k", "attn_v"),
    "gpt-oss": ("attn_q", "attn_k", "attn_v"),
}
"""Matrices whose products have biases that a file may lack, by architecture: the engine takes them where they are."""


@dataclass(frozen=True, slots=True)
class WeightTypes:
    """The types of a random model's matrices: of experts, of the output, and of all others."""

    experts: GGMLQuantizationType
    output: GGMLQuantizationType
    others: GGMLQuantizationType

    @classmethod
    def parse(cls, kind: str, output: str | None = None) -> "WeightTypes":
        """Reads TYPE or TYPE,EXPERTS; raises UsageError for types that random weights cannot have."""
        others, _, experts = kind.partition(",")
        return cls(weight_type(experts or others), weight_type(output or others), weight_type(others))

    def of(self, tensor: ModelTensor) -> GGMLQuantizationType:
        """The type of a matrix, or the one that llama.cpp takes in its place for rows that the type does not divide."""
        if tensor.role in ("ffn_gate_inp", *RECURRENT_FLOATS) or tensor.name.endswith(".bias") or len(tensor.ne) == 1:
            return GGMLQuantizationType.F32
        is_expert = tensor.role.endswith("_exps")
        kind = self.experts if is_expert else self.output if tensor.role == "output" else self.others
        return fitting_type(kind, tensor.ne[0])


def random_tensors(spec: ModelSpec, types: WeightTypes, style: RoutingStyle) -> Iterator[RandomTensor]:
    """All tensors of a stock model, in the order of the file; routers, norms and biases are F32."""
    n_qkv = (spec.n_head + 2 * spec.n_head_kv) * spec.n_embd_head
    for tensor in model_tensors(spec):
        if _is_absent(tensor, spec):
            continue
        if spec.architecture.joins_qkv and tensor.role in ("attn_k", "attn_v"):
            continue
        if spec.architecture.joins_qkv and tensor.role == "attn_q":
            tensor = replace(tensor, name=tensor.name.replace("attn_q", "attn_qkv"), ne=(spec.n_embd, n_qkv))
        yield _random_tensor(tensor, spec, types, style)
        if tensor.role in _ATTENTION_BIASES.get(spec.architecture.name, ()):
            bias = replace(tensor, name=tensor.name.replace(".weight", ".bias"), ne=tensor.ne[1:])
            yield _random_tensor(bias, spec, types, style)


def _is_absent(tensor: ModelTensor, spec: ModelSpec) -> bool:
    """Whether published models of the kind go without it: most optional vectors, and what is the same as another."""
    if tensor.role.startswith("nextn."):
        return tensor.is_optional  # They share the model's token table and output.
    if tensor.role == "output":
        return spec.architecture.name in TIED
    if tensor.role == "attn_v" and tensor.is_optional:  # Values are the keys in layers without a window.
        return not spec.window(tensor.layer)
    return tensor.is_optional and len(tensor.ne) == 1 and tensor.role != "layer_output_scale"


def _random_tensor(tensor: ModelTensor, spec: ModelSpec, types: WeightTypes, style: RoutingStyle) -> RandomTensor:
    kind, role = types.of(tensor), tensor.role
    if role == "token_embd":
        std = 1.0 / spec.multipliers.embedding
        return RandomTensor(tensor.name, tensor.ne, kind, std, topical=style.topical)
    vector = _vector_values(tensor, spec, style)
    if vector:
        mean, std = vector
        return RandomTensor(tensor.name, tensor.ne, kind, std, mean)
    factors = dict.fromkeys(("attn_output", "ssm_out", "shortconv.out_proj"), style.attention)
    factors |= {"ffn_gate_inp": style.router}
    factors |= dict.fromkeys(("ffn_down_exps", "ffn_down_shexp", "ffn_down"), style.feed_forward)
    return RandomTensor(tensor.name, tensor.ne, kind, factors.get(role, 1.0) * tensor.ne[0] ** -0.5)


def _vector_values(tensor: ModelTensor, spec: ModelSpec, style: RoutingStyle) -> tuple[float, float] | None:
    """Mean and deviation of a vector that multiplies, decays or is added; None for a matrix."""
    role = tensor.role
    if tensor.name.endswith(".bias"):
        return 0.0, 0.1
    if role == "rope_freqs":  # All pairs rotate, which takes no less time than a quarter of them.
        return 1.0, 0.0
    if role == "ssm_a":  # Minus the rate of decay.
        return -1.0, 0.2
    if tensor.name.endswith("ffn_gate_inp.scale"):  # Such a router's input is divided by the root of its length.
        return spec.n_embd**0.5, 0.1
    if role == "output_norm" and spec.architecture.name in TIED:  # The output matrix is as large as embeddings.
        mean = spec.multipliers.embedding / (spec.n_embd**0.5 * spec.multipliers.logits)
        return mean, 0.1 * mean
    if spec.architecture.has_post_norms and role in ("post_attention_norm", "post_ffw_norm"):
        return (style.attention if role == "post_attention_norm" else style.feed_forward), 0.1
    is_factor = role.endswith("norm") or "_norm_" in role or role == "layer_output_scale" or ".scale" in tensor.name
    return (1.0, 0.1) if is_factor else None


def describe(writer: GGUFWriter, values: Mapping[str, Value]) -> None:
    """Adds the metadata that llama.cpp needs to load a model, its tokenizer left out; `values` are the sizes."""
    writer.add_name("random")
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            assert isinstance(value, int)
            writer.add_uint32(key, value)
    writer.add_quantization_version(2)


def write_random_model(
    path: Path,
    spec: ModelSpec,
    *,
    seed: int = 1,
    kind: str | None = None,
    output: str | None = None,
    vocabulary: bool = False,
    routing: str = "uniform",
) -> int:
    """Writes a model to `path` and returns its bytes.

    All matrices are of type `kind`, or TYPE,EXPERTS where those of experts have another one; without it they are as the
    architecture's published files have them. The output may have a type of its own. With a `vocabulary`, made up in
    SentencePiece's form (three special tokens, the 256 bytes, numbered words), the model can be served as text; without
    one it can only be spoken to in token ids. `routing` is one of STYLES.
    Raises UsageError for a type whose blocks do not fit or that needs calibration.
    """
    weights = WeightTypes.parse(kind or PUBLISHED.get(spec.architecture.name, "Q4_K"), output)
    tensors = list(random_tensors(spec, weights, STYLES[routing]))
    with whole_file(path) as part:
        writer = GGUFWriter(part, spec.stored_architecture)
        describe(writer, spec.metadata())
        if vocabulary:
            n_words = spec.n_vocab - len(SPECIAL_TOKENS) - len(BYTE_TOKENS)
            words = ((f"▁w{number}", TokenType.NORMAL) for number in range(n_words))
            tokens, types = zip(*SPECIAL_TOKENS, *BYTE_TOKENS, *words, strict=True)
            writer.add_tokenizer_model("llama")
            writer.add_token_list(tokens)
            writer.add_token_scores([0.0] * spec.n_vocab)
            writer.add_token_types(types)
            writer.add_unk_token_id(0)
            writer.add_bos_token_id(1)
            writer.add_eos_token_id(2)
        else:
            writer.add_tokenizer_model("none")
        write_file(writer, tensors, seed)
    return path.stat().st_size


def write_file(writer: GGUFWriter, tensors: list[RandomTensor], seed: int) -> None:
    """Writes the metadata and the tensors, then closes the file; equal kinds of tensors share a pool of blocks."""
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.ne[::-1], np.dtype(np.float32), tensor.n_bytes, tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    pools: dict[tuple[GGMLQuantizationType, float, float], np.ndarray] = {}
    file = writer.fout[0]
    for tensor in tensors:
        key = (tensor.type, tensor.std, tensor.mean)
        if not tensor.topical and key not in pools:
            pools[key] = block_pool(*key, seed)
        writer.write_padding(file, file.tell())
        pieces = topical_pieces(tensor, seed) if tensor.topical else random_pieces(tensor, pools[key], seed)
        for piece in pieces:
            piece.tofile(file)
    writer.write_padding(file, file.tell())
    writer.close()


def weight_type(name: str) -> GGMLQuantizationType:
    """The ggml type of that name; raises UsageError for one that random weights cannot have."""
    if name.upper() not in TYPES:
        raise UsageError(f"{name} is no type for random weights. Choose one of {' '.join(TYPES)}.")
    return GGMLQuantizationType[name.upper()]


@contextmanager
def random_model_file(
    shape: str, kind: str | None = None, *, vocabulary: bool = False, routing: str = "uniform"
) -> Iterator[Path]:
    """A random model in the temporary directory, deleted at the end."""
    parts = ("slimoe", shape, *([kind] if kind else []), str(os.getpid()))
    path = Path(tempfile.gettempdir()) / f"{'-'.join(parts)}.gguf"
    try:
        write_random_model(path, model_named(shape), kind=kind, vocabulary=vocabulary, routing=routing)
        yield path
    finally:
        path.unlink(missing_ok=True)


@click.command()
@click.argument("shape", type=click.Choice(MODELS))
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--seed", default=1, show_default=True)
@click.option(
    "--type", "kind", help="TYPE of all matrices, or TYPE,EXPERTS.  [default: the architecture's, mostly Q4_K]"
)
@click.option("--output-type", help="Type of the output matrix.  [default: the same]")
@click.option("--layers", type=click.IntRange(1), help="Number of layers.  [default: the shape's]")
@click.option("--routing", type=click.Choice(list(STYLES)), default="uniform", show_default=True)
@click.option("--vocabulary", is_flag=True, help="Add a made-up vocabulary, so that text goes in and out.")
@click.option("--mtp", "has_block", is_flag=True, help="Add a block that predicts a further token, mostly a wrong one.")
def main(
    shape: str,
    path: Path,
    seed: int,
    kind: str | None,
    output_type: str | None,
    layers: int | None,
    routing: str,
    vocabulary: bool,
    has_block: bool,
) -> None:
    """Write a random model of SHAPE to PATH."""
    try:
        spec = model_named(shape, layers)
        if has_block and not spec.architecture.has_mtp:
            raise UsageError(f"--mtp: nothing runs such a block of {shape}. Use qwen3next or qwen35moe.")
        n_bytes = write_random_model(
            path,
            with_mtp_layer(spec) if has_block else spec,
            seed=seed,
            kind=kind,
            output=output_type,
            vocabulary=vocabulary,
            routing=routing,
        )
    except (SlimoeError, OSError) as error:
        sys.exit(f"{error}")
    print(f"{os.fspath(path)}: {n_bytes / 1e9:.2f} GB", file=sys.stderr)


if __name__ == "__main__":
    main()
