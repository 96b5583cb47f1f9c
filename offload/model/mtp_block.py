"""The block behind a model's layers that predicts a further token (multi-token prediction, MTP), as in llama.cpp.

It is a layer of the model with its own router and experts. It reads a token's row and what the model has made of the
tokens before, both normalised and joined by a matrix; the model's output turns its own into logits. Sources:
llama.cpp's models/qwen35moe.cpp and glm4-moe.cpp, `nextn` tensors.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from slimoe.offload.gguf.header import GGUFFile
from slimoe.offload.model.expert_spec import LayerShape
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensor_list import ModelTensor, check_shapes, layer_tensors, with_listed_shapes
from slimoe.offload.model.tensors import LinearSource, ModelSources, WeightSource
from slimoe.offload.model.weight_reader import read_block

_JOINT, _TOKEN_NORM, _HIDDEN_NORM = "nextn.eh_proj", "nextn.enorm", "nextn.hnorm"
_TABLE, _OUTPUT, _OUTPUT_NORM = "nextn.embed_tokens", "nextn.shared_head_head", "nextn.shared_head_norm"


@dataclass(frozen=True, slots=True)
class MtpBlock:
    """The block as the last layer of a model: `spec` and `sources` are those of the whole model with it.

    `joint` [2 * n_embd, n_embd] is multiplied with the token's row and the hidden states, normalised by `token_norm`
    and `hidden_norm`. The token table, the output and its norm are those of `sources`, which are the model's own but
    where the file has them for the block; then it `has_output`, or `has_output_norm`.
    """

    spec: ModelSpec
    sources: ModelSources
    joint: LinearSource
    token_norm: WeightSource
    hidden_norm: WeightSource
    has_output: bool
    has_output_norm: bool

    @property
    def index(self) -> int:
        """The number of the block."""
        return self.spec.n_layer - 1

    @property
    def weights(self) -> tuple[WeightSource, ...]:
        """What is loaded for it, beside the model's own weights; of a token table only rows are."""
        layer = self.sources.layers[-1]
        linears = (*layer.matrices, *layer.gate_up, *((layer.down,) if layer.down else ()), self.joint)
        linears += (self.sources.output,) if self.has_output else ()
        linears += (self.sources.output_norm,) if self.has_output_norm else ()
        return (
            *(part for linear in linears for part in linear.parts),
            *layer.vectors,
            self.token_norm,
            self.hidden_norm,
        )


def mtp_block(gguf: GGUFFile, spec: ModelSpec, sources: ModelSources) -> MtpBlock | None:
    """The block of a file; None where there is none, or none that can be run.

    Raises ModelFileError for a tensor of it that is missing or has another shape.
    """
    block = f"blk.{spec.n_layer}."
    if spec.n_layer_nextn != 1 or not spec.architecture.has_mtp or f"{block}{_JOINT}.weight" not in gguf.tensors:
        return None
    whole = _with_block(spec)
    gguf = with_listed_shapes(gguf, whole)
    check_shapes(gguf, whole, [*layer_tensors(whole, spec.n_layer), *_own_tensors(spec, block)])

    def found(name: str) -> WeightSource | None:
        return own.get(f"{block}{name}.weight")

    layer, own = read_block(gguf, whole, spec.n_layer, [tensor.name for tensor in _own_tensors(spec, block)])
    table, output, norm = found(_TABLE), found(_OUTPUT), found(_OUTPUT_NORM)
    return MtpBlock(
        spec=whole,
        sources=replace(
            sources,
            layers=(*sources.layers, layer),
            token_embd=table or sources.token_embd,
            output=LinearSource(output) if output else sources.output,
            output_norm=LinearSource(norm) if norm else sources.output_norm,
        ),
        joint=LinearSource(own[f"{block}{_JOINT}.weight"]),
        token_norm=own[f"{block}{_TOKEN_NORM}.weight"],
        hidden_norm=own[f"{block}{_HIDDEN_NORM}.weight"],
        has_output=output is not None,
        has_output_norm=norm is not None,
    )


def _with_block(spec: ModelSpec) -> ModelSpec:
    """The model with the block as a further layer: with attention, and experts if any layer has some."""
    shapes, recurrent = spec.experts.layers, spec.recurrent
    layers = (*shapes, LayerShape(spec.n_expert, spec.n_ff)) if shapes else ()
    return replace(
        spec,
        n_layer=spec.n_layer + 1,
        n_layer_nextn=0,
        experts=replace(spec.experts, layers=layers),
        windowed=(*spec.windowed, False) if spec.windowed else (),
        recurrent=replace(recurrent, layers=(*recurrent.layers, False)) if recurrent else None,
    )


def _own_tensors(spec: ModelSpec, block: str) -> Iterator[ModelTensor]:
    """What the block has that no layer has."""
    shapes = {
        _JOINT: (2 * spec.n_embd, spec.n_embd),
        _TOKEN_NORM: (spec.n_embd,),
        _HIDDEN_NORM: (spec.n_embd,),
        _TABLE: (spec.n_embd, spec.n_vocab),
        _OUTPUT: (spec.n_embd, spec.n_vocab),
        _OUTPUT_NORM: (spec.n_embd,),
    }
    for role, ne in shapes.items():
        is_optional = role in (_TABLE, _OUTPUT, _OUTPUT_NORM)
        yield ModelTensor(role, f"{block}{role}.weight", ne, spec.n_layer, is_optional)
