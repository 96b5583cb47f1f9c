"""The block behind a model's layers that predicts a further token (multi-token prediction, MTP), as in llama.cpp.

It is a layer of the model with its own router and experts. It reads a token's row and what the model has made of the
tokens before, both normalised and joined by a matrix; the model's output turns its own into logits. Sources:
llama.cpp's models/qwen35moe.cpp, glm4-moe.cpp and deepseek2.cpp, `nextn` tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from slimoe.offload.gguf.header import GGUFFile
from slimoe.offload.model.expert_spec import LayerShape
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensor_list import check_shapes, layer_tensors, with_listed_shapes
from slimoe.offload.model.tensors import LinearSource, ModelSources, WeightSource
from slimoe.offload.model.weight_reader import read_block

MOST_WAITING = 256
"""Tokens of an answer whose hidden states wait, while the block rests, until it reads all of them at once."""
_TABLE, _OUTPUT, _OUTPUT_NORM = "nextn.embed_tokens", "nextn.shared_head_head", "nextn.shared_head_norm"


@dataclass(frozen=True, slots=True)
class MtpBlock:
    """The block as the last layer of a model: `spec` and `sources` are those of the whole model with it.

    `own` has what it has that no layer has, by role. The token table, the output and its norm in `sources` are the
    model's but where the file has some of the block's own.
    """

    spec: ModelSpec
    sources: ModelSources
    own: Mapping[str, WeightSource]

    @property
    def index(self) -> int:
        """The number of the block."""
        return self.spec.n_layer - 1

    @property
    def joint(self) -> LinearSource:
        """The matrix [2 * n_embd, n_embd] that is multiplied with a token's row above the hidden states before it."""
        return LinearSource(self.own["nextn.eh_proj"])

    @property
    def norms(self) -> tuple[WeightSource, WeightSource]:
        """Those of the token's row, and of the hidden states."""
        return self.own["nextn.enorm"], self.own["nextn.hnorm"]

    @property
    def has_output(self) -> bool:
        """Whether the file has an output matrix of the block's own."""
        return _OUTPUT in self.own

    @property
    def has_output_norm(self) -> bool:
        """Whether the file has a norm before the block's output of its own."""
        return _OUTPUT_NORM in self.own

    @property
    def weights(self) -> tuple[WeightSource, ...]:
        """What is loaded for it, beside the model's own weights; of a token table only rows are."""
        layer = self.sources.layers[-1]
        linears = (*layer.matrices, *layer.gate_up, *((layer.down,) if layer.down else ()))
        parts = (part for linear in linears for part in linear.parts)
        return (*parts, *layer.vectors, *(one for role, one in self.own.items() if role != _TABLE))


def mtp_block(gguf: GGUFFile, spec: ModelSpec, sources: ModelSources) -> MtpBlock | None:
    """The block of a file, of several the first; None where there is none, or none that can be run.

    Raises ModelFileError for a tensor of it that is missing or has another shape.
    """
    if not spec.n_layer_nextn or not spec.architecture.has_mtp:
        return None
    whole = with_mtp_layer(spec)
    tensors = list(layer_tensors(whole, spec.n_layer))
    names = {tensor.name: tensor.role for tensor in tensors if tensor.role.startswith("nextn.")}
    if not names.keys() & gguf.tensors.keys():
        return None
    gguf = with_listed_shapes(gguf, whole)
    check_shapes(gguf, whole, tensors)
    layer, found = read_block(gguf, whole, spec.n_layer, names)
    own = {names[name]: source for name, source in found.items()}
    sources = replace(
        sources,
        layers=(*sources.layers, layer),
        token_embd=own.get(_TABLE, sources.token_embd),
        output=LinearSource(own[_OUTPUT]) if _OUTPUT in own else sources.output,
        output_norm=LinearSource(own[_OUTPUT_NORM]) if _OUTPUT_NORM in own else sources.output_norm,
    )
    return MtpBlock(whole, sources, own)


def with_mtp_layer(spec: ModelSpec) -> ModelSpec:
    """The model with the first block as a further layer: with attention, and experts if any layer has some."""
    shapes, recurrent = spec.experts.layers, spec.recurrent
    layers = (*shapes, LayerShape(spec.n_expert, spec.n_ff)) if shapes else ()
    return replace(
        spec,
        n_layer=spec.n_layer + 1,
        n_layer_nextn=max(0, spec.n_layer_nextn - 1),
        has_mtp_layer=True,
        experts=replace(spec.experts, layers=layers),
        windowed=(*spec.windowed, False) if spec.windowed else (),
        recurrent=replace(recurrent, layers=(*recurrent.layers, False)) if recurrent else None,
    )
