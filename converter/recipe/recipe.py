"""What a person asks of a slimmed model, as a value: what to leave out, in which types to store the rest, how large.

`recipe_file` reads and writes it as TOML, `structure` and `slim_types` make a plan of it.
"""

from dataclasses import dataclass
from typing import Literal

from slimoe.converter.layout.plan import Format

DEFAULT_EXPERT = "Q4_K_M"
"""The type, or mix of types, of experts where neither a recipe nor a target chooses one."""
Merge = Literal["m-smoe", "hc-smoe"]
Replacement = Literal["nothing", "novice"]


@dataclass(frozen=True, slots=True)
class ExpertRecipe:
    """What becomes of experts, in the order given: dropped or merged down to `keep`, then trimmed to `width` neurons.

    `keep` is per layer on average; `score` names one of `methods.scores.SCORES`, or "subset" for the best set by the
    sketch; `overall` ranks all layers' experts together. A dropped expert is replaced by nothing, so that tokens pick
    among the others, or by a novice, a constant vector. `merge` merges in place of dropping.
    """

    keep: int | None = None
    score: str = "subset"
    overall: bool = False
    replacement: Replacement = "nothing"
    merge: Merge | None = None
    width: int | None = None


@dataclass(frozen=True, slots=True)
class StorageRecipe:
    """In which types matrices are stored: `expert` names one for all experts, None leaves it to the allocator.

    `low` is for a second copy of every expert. The others, if given, are for the attention, the token table and the
    output; the allocator chooses from `candidates`, all that it knows if empty.
    """

    expert: str | None = None
    low: str | None = None
    attention: str | None = None
    token: str | None = None
    output: str | None = None
    candidates: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FitRecipe:
    """How weights are fitted to their types; see `CompressPlan`. `refit` runs the calibration's tokens once more."""

    importance: bool = True
    feedback: bool = False
    refit: bool = False


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything. `target_size` is the file's bytes at most, `target_bpw` the same as bits per weight of the source.

    `drop_ffn`, `drop_attention` and `drop_blocks` are numbers of layers. With `free_novices` the allocator may put
    constants in place of experts, with `free_layers` leave out feed-forward parts and attentions, where bytes are
    better spent elsewhere. `hints` stores what the engine's lossy modes need.
    """

    name: str = ""
    format: Format = "native"
    target_size: int | None = None
    target_bpw: float | None = None
    experts: ExpertRecipe = ExpertRecipe()
    drop_ffn: int = 0
    drop_attention: int = 0
    drop_blocks: int = 0
    types: StorageRecipe = StorageRecipe()
    fit: FitRecipe = FitRecipe()
    free_novices: bool = False
    free_layers: bool = False
    hints: bool = True
