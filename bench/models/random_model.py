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

from bench.models.random_blocks import RandomTensor, block_pool, random_pieces, topical_pieces
from bench.models.topics import STYLES, RoutingStyle
from slimoe.offload.errors import SlimoeError, UsageError
from slimoe.offload.files.whole_file import whole_file
from slimoe.offload.gguf.header import Value
from slimoe.offload.model.architectures import LLAMA
from slimoe.offload.model.expert_spec import ExpertSpec
from slimoe.offload.model.rope import RopeSpec
from slimoe.offload.model.spec import AttentionSpec, ModelSpec
from slimoe.offload.model.tensor_list import model_tensors

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
_N_CTX = 32768
BYTE_TOKENS = tuple((f"<0x{byte:02X}>", TokenType.BYTE) for byte in range(256))


@dataclass(frozen=True, slots=True)
class Shape:
    """What a random model looks like, in GGUF's words; widths are multiples of 256."""

    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_expert: int
    n_expert_used: int
    n_vocab: int

    @property
    def spec(self) -> ModelSpec:
        """The same in the engine's terms, of a stock file."""
        return ModelSpec(
            architecture=LLAMA,
            n_layer=self.n_layer,
            n_embd=self.n_embd,
            n_ff=self.n_ff,
            n_vocab=self.n_vocab,
            n_ctx_train=_N_CTX,
            rms_eps=1e-5,
            attention=AttentionSpec(self.n_head, self.n_head_kv, self.head_dim),
            experts=ExpertSpec(self.n_expert, self.n_expert_used),
            rope=RopeSpec(self.head_dim, _N_CTX, 1e6),
        )


SHAPES = {
    "design8": Shape(8, 2048, 7168, 16, 8, 128, 8, 2, 32000),
    "mixtral2": Shape(2, 4096, 14336, 32, 8, 128, 8, 2, 32000),
    "mixtral": Shape(32, 4096, 14336, 32, 8, 128, 8, 2, 32000),
    "finegrained": Shape(8, 2048, 768, 32, 4, 128, 128, 8, 32000),
    "natural_medium": Shape(8, 1024, 3584, 8, 4, 128, 8, 2, 32000),
    "natural_small": Shape(8, 256, 512, 4, 2, 64, 8, 2, 4096),
    "smoke": Shape(2, 256, 512, 4, 2, 64, 4, 2, 512),
}


def random_tensors(
    spec: ModelSpec, kind: GGMLQuantizationType, output: GGMLQuantizationType, style: RoutingStyle
) -> Iterator[RandomTensor]:
    """All tensors of a stock model, in the order of the file; the router and the norms are F32."""
    factors = {"attn_output": style.attention, "ffn_gate_inp": style.router, "ffn_down_exps": style.feed_forward}
    types = {"ffn_gate_inp": GGMLQuantizationType.F32, "output": output}
    for tensor in model_tensors(spec):
        std = factors.get(tensor.role, 1.0) * tensor.ne[0] ** -0.5
        if tensor.role == "token_embd":
            yield RandomTensor(tensor.name, tensor.ne, kind, 1.0, topical=style.topical)
        elif len(tensor.ne) > 1:
            yield RandomTensor(tensor.name, tensor.ne, types.get(tensor.role, kind), std)
        elif not tensor.is_optional:
            yield RandomTensor(tensor.name, tensor.ne, GGMLQuantizationType.F32, 0.1, mean=1.0)


def describe(writer: GGUFWriter, values: Mapping[str, Value]) -> None:
    """Adds the metadata that llama.cpp needs to load a model, its tokenizer left out; `values` are the sizes."""
    writer.add_name("random")
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            assert isinstance(value, int)
            writer.add_uint32(key, value)
    writer.add_quantization_version(2)


def write_random_model(
    path: Path,
    shape: Shape,
    *,
    seed: int = 1,
    kind: str = "Q4_K",
    output: str | None = None,
    vocabulary: bool = False,
    routing: str = "uniform",
) -> int:
    """Writes a model to `path`, all matrices of type `kind` but the output of type `output`; returns its bytes.

    With a `vocabulary`, made up in SentencePiece's form (three special tokens, the 256 bytes, numbered words), it can
    be served as text; without one it can only be spoken to in token ids. `routing` is one of STYLES.
    Raises UsageError for a type whose blocks do not fit or that needs calibration.
    """
    tensors = list(random_tensors(shape.spec, weight_type(kind), weight_type(output or kind), STYLES[routing]))
    with whole_file(path) as part:
        writer = GGUFWriter(part, "llama")
        describe(writer, shape.spec.metadata())
        if vocabulary:
            n_words = shape.n_vocab - len(SPECIAL_TOKENS) - len(BYTE_TOKENS)
            words = ((f"▁w{number}", TokenType.NORMAL) for number in range(n_words))
            tokens, types = zip(*SPECIAL_TOKENS, *BYTE_TOKENS, *words, strict=True)
            writer.add_tokenizer_model("llama")
            writer.add_token_list(tokens)
            writer.add_token_scores([0.0] * shape.n_vocab)
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


def shape_named(name: str, n_layer: int | None = None) -> Shape:
    """A shape of SHAPES, with `n_layer` layers where given; raises UsageError for an unknown name."""
    if name not in SHAPES:
        raise UsageError(f"There is no shape {name}. Choose one of {' '.join(SHAPES)}.")
    return SHAPES[name] if n_layer is None else replace(SHAPES[name], n_layer=n_layer)


@contextmanager
def random_model_file(
    shape: str, kind: str, *, vocabulary: bool = False, keep: bool = False, routing: str = "uniform"
) -> Iterator[Path]:
    """A random model in the temporary directory, deleted at the end unless it is to `keep`."""
    path = Path(tempfile.gettempdir()) / f"slimoe-{shape}-{kind}-{os.getpid()}.gguf"
    try:
        write_random_model(path, shape_named(shape), kind=kind, vocabulary=vocabulary, routing=routing)
        yield path
    finally:
        if not keep:
            path.unlink(missing_ok=True)


@click.command()
@click.argument("shape", type=click.Choice(list(SHAPES)))
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--seed", default=1, show_default=True)
@click.option("--type", "kind", default="Q4_K", show_default=True, help="Type of all matrices.")
@click.option("--output-type", help="Type of the output matrix.  [default: the same]")
@click.option("--layers", type=click.IntRange(1), help="Number of layers.  [default: the shape's]")
@click.option("--routing", type=click.Choice(list(STYLES)), default="uniform", show_default=True)
@click.option("--vocabulary", is_flag=True, help="Add a made-up vocabulary, so that text goes in and out.")
def main(
    shape: str,
    path: Path,
    seed: int,
    kind: str,
    output_type: str | None,
    layers: int | None,
    routing: str,
    vocabulary: bool,
) -> None:
    """Write a random model of SHAPE to PATH."""
    try:
        n_bytes = write_random_model(
            path,
            shape_named(shape, layers),
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
