"""Which ggml type each tensor gets: a table of recipes, and a function that asks it.

Every role is named explicitly. llama.cpp's own mixes raise the attention of a model only when it has exactly 8
experts, so that dropping two experts costs attention bits; here any mixture of experts gets them. Router and norms
are always F32: they are small and everything depends on them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as Type

from slimoe.converter.quant.quantize import needs_importance
from slimoe.offload.errors import UsageError

Rule = Callable[[int, int], Type]
"""From (layer, number of layers) to the type."""


def always(kind: Type) -> Rule:
    """The same type in every layer."""
    return lambda _layer, _n_layer: kind


def first(part: int, high: Type, low: Type) -> Rule:
    """`high` in the first 1 / `part` of the layers, `low` after them."""
    return lambda layer, n_layer: high if layer < n_layer // part else low


def first_two(high: Type, low: Type) -> Rule:
    """`high` in two layers, `low` after them."""
    return lambda layer, _n_layer: high if layer < 2 else low


def more_bits(high: Type, low: Type) -> Rule:
    """`high` in the first and last eighth of the layers and in every third one between."""

    def rule(layer: int, n_layer: int) -> Type:
        eighth = n_layer // 8
        between = (layer - eighth) % 3 == 2
        return high if layer < eighth or layer >= 7 * n_layer // 8 or between else low

    return rule


@dataclass(frozen=True, slots=True)
class TypeRecipe:
    """A named choice of types. `roles` differ from `base`, keyed by the middle of a GGUF tensor name, such as attn_v.

    `moe_roles` come on top of them in a mixture of experts, where attention is a few percent of the bytes.
    """

    name: str
    base: Type
    file_type: LlamaFileType
    roles: Mapping[str, Rule] = field(default_factory=dict)
    moe_roles: Mapping[str, Rule] = field(default_factory=dict)

    def type_of(self, name: str, n_layer: int, *, moe: bool, tied: bool) -> Type:
        """The type of the matrix `name`; `tied` says that the token table is also the output matrix."""
        is_output = name == "output.weight" or name.endswith(".nextn.shared_head_head.weight")
        if is_output or (tied and name == "token_embd.weight"):
            return output_type(self.base)
        layer, role = layer_and_role(name.replace("_shexp.", "."))
        rule = (self.moe_roles if moe else {}).get(role) or self.roles.get(role)
        return rule(layer, n_layer) if rule else self.base


def output_type(base: Type) -> Type:
    """The output matrix has at least Q6_K: every token's probability passes through it."""
    bits = [n_bytes / n for n, n_bytes in (GGML_QUANT_SIZES[base], GGML_QUANT_SIZES[Type.Q6_K])]
    return base if bits[0] > bits[1] else Type.Q6_K


def layer_and_role(name: str) -> tuple[int, str]:
    """(3, "ffn_down") for blk.3.ffn_down_exps.weight; layer -1 outside the blocks."""
    parts = name.split(".")
    if parts[0] != "blk":
        return -1, parts[0]
    n_parts = 2 if parts[2] in _OF_TWO_PARTS else 1
    return int(parts[1]), ".".join(parts[2 : 2 + n_parts]).removesuffix("_exps")


_OF_TWO_PARTS = ("shortconv", "nextn")
"""How roles begin that have a point in them."""
_SHIELD = {
    **dict.fromkeys((f"attn_{role}" for role in ("k", "v", "kv_a_mqa", "k_b", "v_b", "kv_b")), always(Type.Q8_0)),
    "attn_output": always(Type.Q5_K),
    **dict.fromkeys(("ssm_alpha", "ssm_beta", "ssm_ba"), always(Type.Q8_0)),
    **dict.fromkeys(("attn_qkv", "ssm_in", "ssm_out", "shortconv.in_proj"), always(Type.Q6_K)),
    **dict.fromkeys(("attn_gate", "shortconv.out_proj"), always(Type.Q5_K)),
    "nextn.eh_proj": always(Type.Q8_0),
    **dict.fromkeys(("ffn_latent_down", "ffn_latent_up"), always(Type.Q8_0)),
}
"""Keys and values, or the low-rank matrices that make them, are few, and every head reads them. So are the matrices of
recurrent layers, whose errors add up in a state: most of all those that say what a state forgets and takes in. All that
an MTP block knows of a text passes one small matrix, and all that some models' experts read and say passes two.
"""
_FILE_TYPES = {
    Type.F32: LlamaFileType.ALL_F32,
    Type.F16: LlamaFileType.MOSTLY_F16,
    Type.BF16: LlamaFileType.MOSTLY_BF16,
    Type.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    Type.Q6_K: LlamaFileType.MOSTLY_Q6_K,
    Type.Q5_K: LlamaFileType.MOSTLY_Q5_K_S,
    Type.Q4_K: LlamaFileType.MOSTLY_Q4_K_S,
    Type.Q3_K: LlamaFileType.MOSTLY_Q3_K_S,
    Type.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    Type.IQ4_NL: LlamaFileType.MOSTLY_IQ4_NL,
    Type.IQ4_XS: LlamaFileType.MOSTLY_IQ4_XS,
    Type.IQ3_S: LlamaFileType.MOSTLY_IQ3_S,
}
_CODEBOOKS = {
    Type.IQ3_XXS: LlamaFileType.MOSTLY_IQ3_XXS,
    Type.IQ2_S: LlamaFileType.MOSTLY_IQ2_S,
    Type.IQ2_XS: LlamaFileType.MOSTLY_IQ2_XS,
    Type.IQ2_XXS: LlamaFileType.MOSTLY_IQ2_XXS,
    Type.IQ1_M: LlamaFileType.MOSTLY_IQ1_M,
    Type.IQ1_S: LlamaFileType.MOSTLY_IQ1_S,
}
# A token table is only read, so that no importance is known of its columns.
_CODEBOOK_ROLES = {"token_embd": always(Type.IQ3_S), "attn_v": always(Type.Q4_K)}
_MIXES = (
    TypeRecipe(
        "Q4_K_M",
        Type.Q4_K,
        LlamaFileType.MOSTLY_Q4_K_M,
        {"attn_v": more_bits(Type.Q6_K, Type.Q4_K), "ffn_down": more_bits(Type.Q6_K, Type.Q4_K)},
        _SHIELD,
    ),
    TypeRecipe(
        "Q3_K_M",
        Type.Q3_K,
        LlamaFileType.MOSTLY_Q3_K_M,
        {
            "attn_v": first_two(Type.Q5_K, Type.Q4_K),
            "attn_output": always(Type.Q4_K),
            "ffn_down": first(16, Type.Q5_K, Type.Q4_K),
        },
        _SHIELD,
    ),
    TypeRecipe(
        "Q2_K",
        Type.Q2_K,
        LlamaFileType.MOSTLY_Q2_K,
        {role: always(Type.Q3_K) for role in ("attn_v", "attn_output", "ffn_down")},
        _SHIELD,
    ),
    TypeRecipe("Q2_K_PURE", Type.Q2_K, LlamaFileType.MOSTLY_Q2_K_S),
    TypeRecipe(
        "MXFP4_MOE",
        Type.Q8_0,
        LlamaFileType.MOSTLY_MXFP4_MOE,
        moe_roles={f"ffn_{name}": always(Type.MXFP4) for name in ("gate", "up", "down")},
    ),
)
RECIPES = {kind.name: TypeRecipe(kind.name, kind, file_type) for kind, file_type in _FILE_TYPES.items()}
RECIPES |= {mix.name: mix for mix in _MIXES}
RECIPES |= {
    kind.name: TypeRecipe(kind.name, kind, file_type, _CODEBOOK_ROLES, _SHIELD | {"attn_q": always(Type.Q4_K)})
    for kind, file_type in _CODEBOOKS.items()
}
"""Every value of --type. A plain type is for all matrices but the output (see `output_type`); Q2_K is, as everywhere,
the mix, and Q2_K_PURE the plain type. Types that need importance are mixes too: attention is shielded from them."""
FOR_IMPORTANCE = tuple(name for name, recipe in RECIPES.items() if needs_importance(recipe.base))
"""Those that can be made only where an importance matrix is given."""


def find_recipe(name: str) -> TypeRecipe:
    """The recipe of that name, in any case; raises UsageError with all names."""
    recipe = RECIPES.get(name.upper())
    if recipe is None:
        raise UsageError(f"There is no type {name!r}. Use one of {', '.join(RECIPES)}.")
    return recipe


def fits(kind: Type, n_per_row: int) -> bool:
    """Whether rows of `n_per_row` weights divide into the type's blocks."""
    return bool(n_per_row % GGML_QUANT_SIZES[kind][0] == 0)


_FALLBACKS = {
    Type.Q6_K: Type.Q8_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q4_K: Type.Q5_0,
    **dict.fromkeys((Type.Q3_K, Type.Q2_K, Type.IQ4_XS, Type.IQ3_S, *_CODEBOOKS), Type.IQ4_NL),
}


def fitting_type(kind: Type, n_per_row: int) -> Type:
    """The type for rows that one does not divide: the one of smaller blocks and as many bits or more that llama.cpp's
    quantizer takes, or else F16.
    """
    found = kind if fits(kind, n_per_row) else _FALLBACKS.get(kind, Type.F16)
    return found if fits(found, n_per_row) else Type.F16


def fitting_types(n_per_row: int) -> list[str]:
    """The names of the plain types whose blocks divide such rows, the smallest ones last; none needs importance."""
    kinds = sorted(_FILE_TYPES, key=lambda kind: -GGML_QUANT_SIZES[kind][1] / GGML_QUANT_SIZES[kind][0])
    return [kind.name for kind in kinds if fits(kind, n_per_row)]
