"""What a file will hold: decisions as values, made by methods and the allocator, carried out by the writer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType
from numpy.typing import NDArray

from slimoe.offload.gguf.header import Value
from slimoe.offload.model.architecture import PROJECTIONS

Format = Literal["stock", "native"]
"""stock: what an unmodified llama.cpp loads. native: our own format, which can hold all of this."""
MERGED = "merged experts"
"""What an expected loss lacks until their neurons are chosen."""
Types = tuple[GGMLQuantizationType, ...]
"""Of an expert's matrices in the order of use: gate, where it has one, up and down."""


@dataclass(frozen=True, slots=True)
class ExpertPlan:
    """One stored expert of the result. `low_types` is for a second copy of fewer bytes.

    `members` are the source's stored experts: one, or several that are merged, with their `weights` (which sum to 1)
    and for all but the first the order `neurons` of theirs that match the first's [n_ff]. `kept` are the neurons that
    are left after trimming, all if None; `down` [n_embd, n_kept] is then the matrix fitted to them. Without `neurons`
    the members are not averaged but lie side by side: `kept` then counts on from one member's neurons to the next's.
    """

    members: tuple[int, ...]
    types: Types
    low_types: Types | None = None
    weights: tuple[float, ...] = (1.0,)
    neurons: tuple[NDArray[np.int64], ...] = ()
    kept: NDArray[np.int64] | None = None
    down: NDArray[np.float32] | None = None

    @property
    def projections(self) -> tuple[str, ...]:
        """The names of its matrices, which have a type each."""
        return PROJECTIONS[-len(self.types) :]

    @property
    def is_joined(self) -> bool:
        """Whether it has neurons of several members, in place of their means."""
        return len(self.members) > 1 and not self.neurons

    @property
    def is_open(self) -> bool:
        """Whether it is still to be chosen which neurons it has: as many as one member has, so that sizes are known."""
        return self.is_joined and self.kept is None

    def picked(self, n_ff: int) -> list[tuple[int, NDArray[np.int64]]]:
        """The members that lie side by side, `n_ff` neurons each, and which of its own neurons each of them keeps."""
        kept = np.arange(len(self.members) * n_ff) if self.kept is None else self.kept
        return [(member, kept[kept // n_ff == place] % n_ff) for place, member in enumerate(self.members)]


@dataclass(frozen=True, slots=True)
class AuxPlan:
    """What stands for selected experts that are not computed: `gain` and `shift` [n_row, n_embd] of a router's rows."""

    gain: NDArray[np.float32]
    shift: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One block of the result, made of the source's `block`.

    `rows` are the rows of the source's router that are kept, in order, `target` says for each which of `experts` it
    means, or -1 - n for constant n. `router` [n_row, n_embd] replaces their values, and `router_biases` [n_row] what is
    added to their logits or scores, by role. `constants`
    [n_constant, n_embd] are the constant experts' vectors. `types` are those of the other matrices by role: such as
    attn_q of attention, ffn_gate_shexp of a shared expert, and of a dense layer ffn_gate, ffn_up and ffn_down. Without
    these and without `experts` there is no feed-forward part (`rows` is then empty). `hints` are for the engine, as
    `LayerHints` names them. `aux`, if any, is in the order of `rows`.
    """

    block: int
    experts: tuple[ExpertPlan, ...]
    rows: tuple[int, ...]
    target: tuple[int, ...]
    types: Mapping[str, GGMLQuantizationType]
    has_attention: bool = True
    router: NDArray[np.float32] | None = None
    router_biases: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    constants: NDArray[np.float32] | None = None
    hints: Mapping[str, object] = field(default_factory=dict)
    aux: AuxPlan | None = None

    @property
    def has_ffn(self) -> bool:
        """Whether there is a feed-forward part, of experts or dense."""
        return bool(self.rows) or "ffn_down" in self.types


@dataclass(frozen=True, slots=True)
class CompressPlan:
    """A whole result. `recipe` is what was asked for, in words that can be asked for again (TOML).

    `importance`: types are fitted to what matrices read (needs statistics); `feedback`: errors of a block of columns
    are made up for in the later ones, against inputs that the quantised layers before produce, in all matrices, or, if
    it is a number, in those that so many seconds are best spent on: `fitted`, by the file's tensor and the slot in it,
    all if None; `refit`: routers are fitted to the quantised experts. `expected_kl` is the KL divergence per token that
    the statistics foretell, `uncounted` what they say nothing of.

    `n_main`, if any, is how many of a token's selected experts are computed; the layers' `aux` stand for the others.

    `file_type` is the number of a mix of types that all matrices have by name, in a plan that removes nothing: the file
    then has no room for keys that come late. `provenance` are the keys about an importance matrix, or about the task
    that the file is for.
    """

    format: Format
    layers: tuple[LayerPlan, ...]
    token_type: GGMLQuantizationType
    output_type: GGMLQuantizationType | None
    recipe: str
    importance: bool = False
    feedback: bool | float = False
    fitted: frozenset[tuple[str, int]] | None = None
    refit: bool = False
    expected_kl: float | None = None
    uncounted: tuple[str, ...] = ()
    file_type: LlamaFileType | None = None
    provenance: Mapping[str, Value] = field(default_factory=dict)
    n_main: int = 0

    @property
    def is_open(self) -> bool:
        """Whether neurons of merged experts are still to be chosen: sizes are known, and nothing can be written."""
        return any(expert.is_open for layer in self.layers for expert in layer.experts)
