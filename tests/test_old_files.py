"""Files that the version before wrote are read as it read them, or refused with the way to make them again.

`tests/old_files/` holds one small file of each kind; nothing here writes them anew.
"""

import contextlib
import io
import json
import lzma
from pathlib import Path

import numpy as np
import pytest

from bench.replay import RATES, figures, make_plan, replay
from bench.traces.cache_replay import Tier
from slimoe.converter.stats.imatrix_file import read_imatrix
from slimoe.converter.stats.statistics_file import StatisticsError, load_statistics
from slimoe.offload.cache.router_trace import read_trace, routers_hash
from slimoe.offload.gguf.header import read_gguf
from slimoe.server.cli import run

OLD_FILES = Path(__file__).parent / "old_files"
ANSWER = [119, 431, 332, 398, 505, 294]


def unpacked(name: str, folder: Path) -> Path:
    path = folder / name
    path.write_bytes(lzma.decompress((OLD_FILES / f"{name}.xz").read_bytes()))
    return path


@pytest.mark.parametrize("name", ["stock.gguf", "native.gguf", "pair.gguf"])
def test_models_answer_as_before(name: str, tmp_path: Path) -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        arguments = ["-p", "hello world", "-n", "6", "--temp", "0", "--threads", "1", "--json"]
        status = run(["run", str(unpacked(name, tmp_path)), *arguments])
    assert status == 0
    assert json.loads(out.getvalue())["tokens"] == ANSWER


def test_statistics_have_the_values_of_before(tmp_path: Path) -> None:
    statistics = load_statistics(unpacked("calibrated.stats", tmp_path))
    assert statistics.source_hash == "b7b3aae09a8544155a088026c1415c7c6108db676448a039c5b59f4e8b32f05e"
    assert statistics.tokens[0][:5] == (1, 451, 501, 451, 502)
    assert statistics.token_count.sum() == statistics.n_tokens == 2048
    assert statistics.output_input[:3] == pytest.approx([2220.5173, 1933.053, 2180.6765])
    (layer,) = statistics.layers
    assert layer.router is not None
    assert layer.router.rank_count.tolist() == [[1571], [477]]
    assert layer.router.probability == pytest.approx([1435.72514984, 612.27485327])
    parts = (layer.outputs, layer.trace, layer.type_errors, layer.sketch, layer.sensitivity, layer.removals)
    assert None not in parts
    costs = statistics.matrix_costs
    assert costs is not None
    assert costs.nats[costs.matrices.index("output.weight"), costs.types.index("Q8_0")] == pytest.approx(1.67875597e-05)
    assert np.isinf(costs.nats[:, costs.types.index("Q4_K")]).all()


@pytest.mark.parametrize("version", [0, 1, 2])
def test_statistics_of_an_older_format_say_how_to_make_them_again(version: int, tmp_path: Path) -> None:
    path = unpacked("calibrated.stats", tmp_path)
    data = path.read_bytes()
    named = b'\\"version\\": 3'
    assert data.count(named) == 1
    path.write_bytes(data.replace(named, named[:-1] + str(version).encode()))
    with pytest.raises(StatisticsError, match=rf"version {version}.* Make it again with `slimoe calibrate`\.$"):
        load_statistics(path)


def test_trace_is_replayed_as_before(tmp_path: Path) -> None:
    model = routers_hash(read_gguf(unpacked("stock.gguf", tmp_path)))
    trace = read_trace(OLD_FILES / "router.trace", model)
    assert len(trace.steps) == 8
    assert trace.steps[0].layers[0].selected.tolist() == [[3, 0]] * 3
    assert np.allclose(trace.steps[-1].layers[1].weights, [[0.717, 0.2834]], atol=5e-4)
    move, hit, miss = (1e9 * rate for rate in RATES["host"])
    tier = Tier(move, hit, miss, computes_misses=False)
    tally = replay(make_plan(trace, 4, tier, None), ["lru"])["lru"]
    seen = {phase: figures(of_phase, tier) for phase, of_phase in tally.items()}
    assert [seen["answer"][name] for name in ("tokens", "hits", "misses", "moved_bytes")] == [7, 16, 12, 65088]
    assert [seen["prompt"][name] for name in ("tokens", "hits", "misses", "moved_bytes")] == [3, 2, 2, 9408]


def test_imatrix_has_the_values_of_before(tmp_path: Path) -> None:
    imatrix = read_imatrix(unpacked("calibrated.imatrix", tmp_path))
    assert (imatrix.datasets, imatrix.n_chunks, imatrix.chunk_size) == (("text",), 32, 64)
    assert len(imatrix.entries) == 17
    entry = imatrix.entries["blk.1.ffn_down_exps.weight"]
    assert entry.counts.tolist() == [1029, 551, 1578, 938]
    assert entry.sums.sum() == pytest.approx(100659.90625)
