"""Keys that are added to a file that is there already."""

from pathlib import Path

import gguf
import pytest

from slimoe.converter.convert import ConvertOptions, convert
from slimoe.converter.gguf.late_keys import ROOM_BYTES, add_late_keys
from slimoe.converter.source.checkpoint_source import checkpoint_source
from slimoe.converter.write.writer import write_planned
from slimoe.offload.errors import ModelFileError
from slimoe.offload.gguf import keys
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.model.native_format import read_layout
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.plan.engine_plan import plan_engine
from tests.models.compress_plans import same_plan
from tests.models.configs import engine_config


@pytest.fixture
def native(tmp_path: Path, moe_checkpoint: Path) -> Path:
    source = checkpoint_source(moe_checkpoint)
    return write_planned(source, same_plan(source, "Q8_0", "native"), tmp_path / "m.gguf").path


def test_a_file_learns_its_quality(native: Path) -> None:
    before, metadata = native.read_bytes(), read_gguf(native).metadata
    add_late_keys(native, {"slimoe.measured_kl": [0.125], keys.QUALITY: '{"kl": 0.1}'})
    file = read_gguf(native)
    assert read_layout(file, ModelSpec.from_gguf(file)).measured_kl == (0.125,)
    assert file.metadata[keys.QUALITY] == '{"kl": 0.1}'
    others = {name for name in metadata if name != keys.RESERVED}
    assert all(str(file.metadata[name]) == str(metadata[name]) for name in others)
    changed = [n for n, (a, b) in enumerate(zip(before, native.read_bytes(), strict=True)) if a != b]
    assert changed[-1] < 24 + 64 + ROOM_BYTES
    assert {field.name for field in gguf.GGUFReader(native).fields.values()} >= {keys.QUALITY, "slimoe.measured_kl"}
    assert plan_engine(engine_config(native, n_ctx=256)).spec.n_expert == 6


def test_what_is_said_again_takes_the_place(native: Path) -> None:
    add_late_keys(native, {"slimoe.measured_kl": [0.1, 0.2], keys.QUALITY: "old"})
    add_late_keys(native, {"slimoe.measured_kl": [0.3]})
    metadata = read_gguf(native).metadata
    assert metadata["slimoe.measured_kl"].tolist() == pytest.approx([0.3])
    assert metadata[keys.QUALITY] == "old"
    for n in range(20):
        add_late_keys(native, {keys.QUALITY: "x" * 10 * n})
    assert read_gguf(native).metadata[keys.QUALITY] == "x" * 190


def test_the_room_ends(native: Path) -> None:
    before = native.read_bytes()
    with pytest.raises(ModelFileError, match=r"no room for slimoe.quality: \d+ bytes are missing"):
        add_late_keys(native, {keys.QUALITY: "x" * ROOM_BYTES})
    assert native.read_bytes() == before
    add_late_keys(native, {keys.QUALITY: "x" * (ROOM_BYTES - 64)})


def test_files_without_room(tmp_path: Path, moe_checkpoint: Path) -> None:
    path = convert(ConvertOptions(moe_checkpoint, tmp_path / "m.gguf", "Q8_0", n_threads=1)).path
    with pytest.raises(ModelFileError, match="no room for further keys"):
        add_late_keys(path, {keys.QUALITY: "x"})
