"""The files of the seed's table: what each method makes of a checkpoint within a number of bytes."""

import bisect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import llama_cpp.llama_cpp as llama
from gguf import GGMLQuantizationType as Type

from bench.baselines.llama_cpp import llama_quantize
from bench.quality.lab import Lab
from slimoe.converter.budget.compress import plan_compression
from slimoe.converter.convert import ConvertOptions, convert
from slimoe.converter.layout.offsets import plan_bytes
from slimoe.converter.layout.plan import CompressPlan
from slimoe.converter.recipe.recipe import ExpertRecipe, FitRecipe, Recipe, StorageRecipe
from slimoe.converter.stats.type_costs import TypeCosts
from slimoe.offload.errors import DoesNotFitError, UsageError

F16 = "F16"
LLAMA_CPP = "llama.cpp"
MIXES = {
    **{name: Type[name] for name in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ4_XS", "Q6_K")},
    **{"IQ2_M": Type.IQ2_S, "IQ3_M": Type.IQ3_S},
    **{"Q3_K_M": Type.Q3_K, "Q4_K_M": Type.Q4_K, "Q5_K_M": Type.Q5_K},
}
"""llama.cpp's mixes with the type of most of their weights; all are made with an importance matrix."""
WITHOUT_IMPORTANCE = ("Q2_K", "Q3_K_M", "Q4_K_M")
"""The mixes that are made without one as well, as that is sometimes better."""
ONE_TYPE = ("Q2_K", "Q3_K", "Q4_K", "Q6_K")
MC_TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ3_XXS")
"""One to three bits, the nearest of ggml's, as Mixture Compressor (arXiv 2410.06270) chooses from."""
FOUR = StorageRecipe(expert="Q4_K", attention="Q4_K", token="Q4_K", output="Q4_K")
FITS_WHOLE = "4 bits alone fit"
"""Why a method that leaves something out has no file of a size."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A file of a method; `name` tells it from the method's others. It is made by a `recipe`, or is a mix by its name.

    `importance` is whether llama.cpp is given an importance matrix.
    """

    method: str
    name: str
    recipe: Recipe | None = None
    importance: bool = False

    @property
    def id(self) -> str:
        """The trial's name among those of all methods."""
        return f"{self.method}: {self.name}"

    @property
    def mix(self) -> str:
        """The name of llama.cpp's mix."""
        return self.name.partition(",")[0]

    def make(self, lab: Lab, path: Path) -> None:
        """Writes the file; raises as `plan_compression`, `convert` and `llama_quantize` do."""
        if self.recipe is not None:
            lab.write(self.recipe, path)
            return
        if self.method == F16:
            convert(ConvertOptions(lab.checkpoint, path, F16, lab.n_threads, force=True))
            return
        source = lab.directory / "whole.gguf"
        if not source.exists():
            convert(ConvertOptions(lab.checkpoint, source, "F32", lab.n_threads))
        file_type = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{self.mix}")
        llama_quantize(source, path, file_type, lab.n_threads, lab.importance() if self.importance else None)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a method has no file of a size."""

    method: str
    n_bytes: int
    reason: str


Found = Iterator[Trial | Refusal]
Sizes = Sequence[int]


class RecipeBytes:
    """The bytes of files by recipes, without what takes long: which experts are dropped or joined does not matter."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._known: dict[Recipe, float] = {}

    def of(self, recipe: Recipe) -> float:
        """The bytes of the recipe's file, or a little more; infinity for a recipe that cannot be carried out."""
        if recipe not in self._known:
            try:
                plan = quick_plan(self._lab, recipe)
                self._known[recipe] = plan_bytes(plan, self._lab.source, self._lab.statistics)
            except (DoesNotFitError, UsageError):
                self._known[recipe] = math.inf
        spec = self._lab.source.spec
        # Native files keep all rows of a router whose experts are merged.
        rows = 4 * spec.n_embd * spec.n_expert * spec.n_layer if recipe.experts.merge is not None else 0
        return self._known[recipe] + rows


def quick_plan(lab: Lab, recipe: Recipe) -> CompressPlan:
    """A plan of about the bytes of a recipe's, made at once; raises DoesNotFitError and UsageError.

    No experts are joined, narrowed or compared, and types that are named get no price.
    """
    experts = recipe.experts
    few = experts.keep is not None and not experts.overall
    experts = replace(experts, merge=None, width=None, main=None, score="frequency" if few else experts.score)
    has_size = recipe.target_size is not None
    return plan_compression(
        lab.source,
        lab.statistics,
        replace(recipe, experts=experts, hints=False),
        n_threads=lab.n_threads,
        costs=None if has_size else TypeCosts((), {}),
    )


def whole(method: str, lab: Lab, sizes: Sizes) -> Found:
    """All weights in 16 bits, as a yardstick of speed and memory."""
    yield Trial(method, F16)


def llama_mixes(method: str, lab: Lab, sizes: Sizes) -> Found:
    """All of llama.cpp's mixes: a size's best is any that fits."""
    for name in MIXES:
        yield Trial(method, f"{name}, imatrix", importance=True)
        if name in WITHOUT_IMPORTANCE:
            yield Trial(method, name)


def one_type(method: str, lab: Lab, sizes: Sizes) -> Found:
    """Quantising alone, all matrices in one type."""
    for name in ONE_TYPE:
        # Q2_K is the name of a mix as well.
        expert = "Q2_K_PURE" if name == "Q2_K" else name
        types = StorageRecipe(expert, attention=name, token=name, output=name)
        yield Trial(method, name, Recipe(types=types, hints=False))


def targeted(method: str, lab: Lab, sizes: Sizes, recipe: Recipe) -> Found:
    """A recipe whose types the allocator chooses, at each size; sizes beyond the largest type make the same file."""
    sizes_of, previous = RecipeBytes(lab), 0.0
    for n_bytes in sizes:
        one = replace(recipe, target_size=n_bytes)
        # Planning with few candidates is quick, and all types are never too few.
        n_filled = sizes_of.of(one) if recipe.types.candidates else n_bytes
        if n_filled > previous:
            yield Trial(method, f"at {round(100 * n_bytes / lab.bf16_bytes, 1):g} %", one)
            previous = n_filled if n_filled < math.inf else previous


def half_computed(method: str, lab: Lab, sizes: Sizes) -> Found:
    """Half of the experts that a token selects are computed, and vectors stand for the others."""
    n_used = lab.source.spec.n_expert_used
    if n_used > 1:
        yield from targeted(method, lab, sizes, Recipe(experts=ExpertRecipe(main=n_used // 2)))


def mildest(method: str, lab: Lab, sizes: Sizes, steps: Sequence[tuple[str, Recipe]]) -> Found:
    """Of recipes from the mildest on, which leaves out nothing, the first that fits each size."""
    sizes_of, seen = RecipeBytes(lab), set[str]()
    for n_bytes in sizes:
        place = bisect.bisect_left(steps, True, key=lambda step: sizes_of.of(step[1]) <= n_bytes)
        if place == 0:
            yield Refusal(method, n_bytes, FITS_WHOLE)
        elif place == len(steps):
            least = sizes_of.of(steps[-1][1])
            yield Refusal(method, n_bytes, f"the least is {100 * least / lab.bf16_bytes:.1f} %")
        elif steps[place][0] not in seen:
            seen.add(steps[place][0])
            yield Trial(method, *steps[place])


def fewer_experts(method: str, lab: Lab, sizes: Sizes, experts: ExpertRecipe) -> Found:
    """In 4 bits with as many experts as fit, dropped or merged down to."""
    n_expert, n_used = lab.source.spec.n_expert, lab.source.spec.n_expert_used
    steps = [
        (f"{keep} of {n_expert} experts", Recipe(experts=replace(experts, keep=keep), types=FOUR, hints=False))
        for keep in range(n_expert - 1, n_used - 1, -1)
    ]
    yield from mildest(method, lab, sizes, [("all", Recipe(types=FOUR, hints=False)), *steps])


def fewer_layers(method: str, lab: Lab, sizes: Sizes) -> Found:
    """In 4 bits without the experts of as few layers as must go."""
    n_layer = lab.source.spec.n_layer
    recipes = [Recipe(drop_ffn=n, types=FOUR, hints=False) for n in range(n_layer)]
    yield from mildest(method, lab, sizes, [(f"without {n} of {n_layer} layers", one) for n, one in enumerate(recipes)])


def fewer_blocks(method: str, lab: Lab, sizes: Sizes) -> Found:
    """In 4 bits without as few blocks as must go."""
    n_layer = lab.source.spec.n_layer
    recipes = [Recipe(drop_blocks=n, types=FOUR, hints=False) for n in range(n_layer)]
    yield from mildest(method, lab, sizes, [(f"without {n} of {n_layer} blocks", one) for n, one in enumerate(recipes)])


def two_copies(method: str, lab: Lab, sizes: Sizes) -> Found:
    """Every expert in 4 and in 2 bits; what is evaluated are the first copies."""
    yield Trial(method, "Q4_K and Q2_K", Recipe(types=replace(FOUR, low="Q2_K")))


METHODS: dict[str, Callable[[str, Lab, Sizes], Found]] = {
    F16: whole,
    LLAMA_CPP: llama_mixes,
    "one type": one_type,
    "Mixture Compressor": partial(
        targeted, recipe=Recipe(types=replace(FOUR, expert=None, candidates=MC_TYPES), hints=False)
    ),
    "HOBBIT": two_copies,
    "Layer Drop": fewer_layers,
    "Block Drop": fewer_blocks,
    "Expert Drop, overall": partial(fewer_experts, experts=ExpertRecipe(score="probability", overall=True)),
    "Expert Drop, by frequency": partial(fewer_experts, experts=ExpertRecipe(score="frequency")),
    "Expert Drop, best subset": partial(fewer_experts, experts=ExpertRecipe(score="subset")),
    "HC-SMoE": partial(fewer_experts, experts=ExpertRecipe(merge="hc-smoe")),
    "M-SMoE": partial(fewer_experts, experts=ExpertRecipe(merge="m-smoe")),
    "slimoe, merged neurons": partial(fewer_experts, experts=ExpertRecipe(merge="neurons")),
    "slimoe, half computed": half_computed,
    "slimoe, stock": partial(targeted, recipe=Recipe(format="stock")),
    "slimoe": partial(targeted, recipe=Recipe()),
    "slimoe, feedback": partial(targeted, recipe=Recipe(fit=FitRecipe(feedback=True, refit=True))),
}
"""The methods, those of others first; each yields its trials, or why it has no file of a size."""
