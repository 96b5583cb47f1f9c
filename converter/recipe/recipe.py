"""A recipe of a compressed model, as a value: what is left out, in which types the rest is stored, and how large it is.

`toml_file` reads and writes it as TOML; `budget.structure` and `budget.types` make a plan of it.
"""

from dataclasses import dataclass
from typing import Literal

from slimoe.converter.layout.plan import Format

DEFAULT_EXPERT = "Q4_K_M"
"""The type, or mix of types, of experts where neither a recipe nor a target chooses one."""
Merge = Literal["m-smoe", "hc-smoe", "neurons"]
Replacement = Literal["nothing", "constant"]
Order = Literal["router", "co-selection"]
"""In which experts lie in a native file: that of the router's rows, or those selected together next to each other."""


@dataclass(frozen=True, slots=True)
class ExpertRecipe:
    """How experts are reduced: dropped or merged down to `keep`, and then trimmed to `width` neurons.

    `keep` is per layer on average. `score` names one of `methods.scores.SCORES`, or "subset" for the best subset by
    Gram matrices; `overall` ranks the experts of all layers together. A dropped expert is replaced by "nothing", so
    that tokens select among the others, or by a "constant" expert, a vector. With `merge`, experts are merged
    instead of dropped. Those that are left lie in the file in an `order`. Of the experts that a token selects only the
    first `main` are computed, and fitted vectors stand for the others.
    """

    keep: int | None = None
    score: str = "subset"
    overall: bool = False
    replacement: Replacement = "nothing"
    merge: Merge | None = None
    width: int | None = None
    order: Order = "router"
    main: int | None = None


@dataclass(frozen=True, slots=True)
class StorageRecipe:
    """The types in which matrices are stored; None leaves a type to the allocator.

    `expert` is that of all experts, and `low` that of a low-bit copy of every expert, which is made only if it is
    given. `attention` is that of what every token passes: attention, shared experts and dense layers. `token` and
    `output` are those of the token table and the output matrix. The allocator chooses from `candidates`, or from all
    types if there are none.
    """

    expert: str | None = None
    low: str | None = None
    attention: str | None = None
    token: str | None = None
    output: str | None = None
    candidates: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FitRecipe:
    """How weights are quantised; see `CompressPlan`. `refit` runs the calibration's tokens once more to fit routers.

    `feedback` is for all matrices, or, as a number, for those that so many seconds are best spent on. For `heal`
    seconds the written file's small tensors are trained against the source; None does not.
    """

    importance: bool = True
    feedback: bool | float = False
    refit: bool = False
    heal: float | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe of a compressed model.

    `target_size` is the most bytes that the file may have, `target_bpw` the same in bits per weight of the source.
    `drop_ffn`, `drop_attention` and `drop_blocks` are numbers of layers. With `free_constants` the allocator may put
    constants in place of experts, and with `free_layers` it may leave out feed-forward parts and attentions, where
    bytes are better spent elsewhere. With `hints` the file has what the engine's lossy modes need. For `search` seconds
    the types that meet a size are improved by measuring. `specialise` is the text of a task, in place of other texts'
    statistics, whose experts are merged by what they do there.
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
    free_constants: bool = False
    free_layers: bool = False
    hints: bool = True
    search: float | None = None
    specialise: str | None = None
