"""What carrying a plan out is said to take: it grows with what has to be made, and copies cost their bytes only."""

from pathlib import Path

import pytest
from gguf import GGMLQuantizationType

from slimoe.converter.budget.compress import plan_compression
from slimoe.converter.convert import ConvertOptions, convert
from slimoe.converter.layout.offsets import lay_out
from slimoe.converter.recipe.recipe import Recipe, StorageRecipe
from slimoe.converter.source.open_source import open_source
from slimoe.converter.write.estimate import seconds_per_weight, writing_seconds


def test_copies_cost_their_bytes_and_other_types_their_weights(moe_checkpoint: Path, tmp_path: Path) -> None:
    stored = tmp_path / "q8.gguf"
    convert(ConvertOptions(moe_checkpoint, stored, "Q8_0"))
    named = {name: StorageRecipe(name, None, name, name, name) for name in ("Q8_0", "Q4_0")}
    found, prices = {}, {"Q8_0": 1.0, "Q4_0": 3.0}
    for path in (moe_checkpoint, stored):
        source = open_source(path)
        for name, types in named.items():
            plan = plan_compression(source, None, Recipe(types=types))
            found[path, name] = writing_seconds(source, lay_out(source, plan), 2, lambda kind: prices[kind.name])
    n_weights = sum(shape[0] * shape[1] for shape in source.shapes.values() if len(shape) == 2 and shape[0] != 6)
    assert found[stored, "Q8_0"] < 0.1
    assert found[moe_checkpoint, "Q8_0"] == pytest.approx(n_weights / 2, rel=1e-3)
    assert found[stored, "Q4_0"] == pytest.approx(3 * n_weights / 2, rel=1e-3)


@pytest.mark.parametrize("kind", ["Q8_0", "Q3_K", "F16"])
def test_every_type_is_tried(kind: str) -> None:
    assert 0 < seconds_per_weight(GGMLQuantizationType[kind]) < 1e-3
