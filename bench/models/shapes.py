"""The sizes of the models that are measured: Mixtral's, large and small, and those of `fine_models`."""

from dataclasses import dataclass, replace

from bench.models.fine_models import FINE_MODELS
from slimoe.offload.errors import UsageError
from slimoe.offload.model.architectures import LLAMA
from slimoe.offload.model.attention_spec import AttentionSpec
from slimoe.offload.model.expert_spec import ExpertSpec
from slimoe.offload.model.rope import RopeSpec
from slimoe.offload.model.spec import ModelSpec

_N_CTX = 32768


@dataclass(frozen=True, slots=True)
class Shape:
    """What a random Mixtral looks like, in GGUF's words; widths are multiples of 256."""

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
    "natural_medium": Shape(8, 1024, 3584, 8, 4, 128, 8, 2, 32000),
    "natural_small": Shape(8, 256, 512, 4, 2, 64, 8, 2, 4096),
    "smoke": Shape(2, 256, 512, 4, 2, 64, 4, 2, 512),
}
"""Mixtrals: of these there are random checkpoints as well."""


MODELS = (*SHAPES, *FINE_MODELS)
"""Every name of a random GGUF file."""


def model_named(name: str, n_layer: int | None = None) -> ModelSpec:
    """A model of MODELS, with `n_layer` layers where given; raises UsageError for an unknown name."""
    changed = {} if n_layer is None else {"n_layer": n_layer}
    if name in SHAPES:
        return replace(SHAPES[name], **changed).spec
    if name in FINE_MODELS:
        return FINE_MODELS[name](**changed)
    raise UsageError(f"There is no shape {name}. Choose one of {' '.join(MODELS)}.")
