"""The sizes of the models that are measured: Mixtral's, large and small, and one model of each further kind.

The files of the latter are as true models' but for the number of layers, so that a layer takes what it takes there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from slimoe.offload.errors import UsageError
from slimoe.offload.model.architectures import DEEPSEEK2, GPT_OSS, LLAMA, QWEN3MOE
from slimoe.offload.model.attention_spec import AttentionSpec, LatentSpec
from slimoe.offload.model.expert_spec import ExpertSpec, LayerShape
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


def _qwen3moe(n_layer: int = 8) -> ModelSpec:
    """Qwen3-30B-A3B."""
    return ModelSpec(
        architecture=QWEN3MOE,
        n_layer=n_layer,
        n_embd=2048,
        n_ff=768,
        n_vocab=151936,
        n_ctx_train=_N_CTX,
        rms_eps=1e-6,
        attention=AttentionSpec(n_head=32, n_head_kv=4, n_embd_head=128),
        experts=ExpertSpec(n_expert=128, n_expert_used=8),
        rope=RopeSpec(128, _N_CTX, 1e6),
    )


def _deepseek2(n_layer: int = 8) -> ModelSpec:
    """DeepSeek-V2-Lite, whose first layer is dense, but with queries of low rank, as GLM-4.7-Flash has them.

    llama.cpp takes queries of full rank from files of 26 or 27 layers alone.
    """
    n_ctx_orig, n_rot, n_lora_q, n_lora_kv = 4096, 64, 768, 512
    routed = (LayerShape(64, 1408),) * (n_layer - 1)
    return ModelSpec(
        architecture=DEEPSEEK2,
        n_layer=n_layer,
        n_embd=2048,
        n_ff=1408,
        n_vocab=102400,
        n_ctx_train=40 * n_ctx_orig,
        rms_eps=1e-6,
        attention=AttentionSpec(16, 1, n_lora_kv + n_rot, n_lora_kv, LatentSpec(n_lora_q, n_lora_kv, 128 + n_rot, 128)),
        experts=ExpertSpec(
            64, 6, layers=(LayerShape(0, 10944), *routed), score="softmax", renormalise=False, n_ff_shared=2 * 1408
        ),
        rope=RopeSpec(n_rot, n_ctx_orig, 1e4, "yarn", 40.0, yarn_log_multiplier=0.0707, is_mscale_shared=True),
    )


def _gpt_oss(n_layer: int = 6) -> ModelSpec:
    """gpt-oss-20b."""
    n_ctx_orig = 4096
    return ModelSpec(
        architecture=GPT_OSS,
        n_layer=n_layer,
        n_embd=2880,
        n_ff=2880,
        n_vocab=201088,
        n_ctx_train=32 * n_ctx_orig,
        rms_eps=1e-5,
        attention=AttentionSpec(n_head=64, n_head_kv=8, n_embd_head=64),
        experts=ExpertSpec(n_expert=32, n_expert_used=4),
        rope=RopeSpec(64, n_ctx_orig, 150000.0, "yarn", 32.0),
        n_window=128,
        windowed=tuple(layer % 2 == 0 for layer in range(n_layer)),
    )


FINE_MODELS: Mapping[str, Callable[..., ModelSpec]] = {
    "qwen3moe": _qwen3moe,
    "deepseek2": _deepseek2,
    "gpt-oss": _gpt_oss,
}
"""Models of many small experts by their architecture: functions of the number of layers."""
PUBLISHED = {"gpt-oss": "Q8_0,MXFP4"}
"""Types of matrices, and of those of experts, of architectures whose published files are not rounded any further."""
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
