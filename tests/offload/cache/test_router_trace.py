"""Traces come back as they were written, and whatever else is in a file is an answer in a sentence."""

import json
import os
import resource
import struct
from pathlib import Path

import numpy as np
import psutil
import pytest

from slimoe.offload.cache.router_trace import (
    ANSWER,
    MAGIC,
    PROMPT,
    TraceFileError,
    TraceHeader,
    TraceRun,
    TraceWriter,
    read_trace,
    routers_hash,
)
from slimoe.offload.errors import SlimoeError
from slimoe.offload.gguf.header import read_gguf
from tests.models.tiny_gguf import write_tiny_gguf

N_USED = 3
HEADER = TraceHeader("abc", N_USED, ((7,) * 6, (), (9, 9, 8, 8)))
Written = list[tuple[list[TraceRun], list[tuple[int, np.ndarray, np.ndarray]]]]


def random_steps(header: TraceHeader, n_steps: int, seed: int = 0) -> Written:
    """Steps of prompts, answers and both; the last layer has rows only for what is asked of it."""
    rng = np.random.default_rng(seed)
    steps = []
    for _ in range(n_steps):
        sizes = [int(n) for n in rng.choice([1, 1, 5, 20], rng.integers(1, 4))]
        runs = [TraceRun(ANSWER if n == 1 else PROMPT, at + 4, 100 * at, n) for at, n in enumerate(sizes)]
        layers = []
        for layer, experts in enumerate(header.expert_bytes):
            if experts:
                n_rows = sum(sizes) if layer == 0 else int(rng.integers(1, sum(sizes) + 1))
                selected = rng.integers(-1, len(experts), (n_rows, header.n_expert_used))
                layers.append((layer, selected, rng.random(selected.shape, np.float32)))
        steps.append((runs, layers))
    return steps


def write(path: Path, header: TraceHeader, steps: Written) -> None:
    writer = TraceWriter(path, header)
    for runs, layers in steps:
        writer.step(runs)
        for layer in layers:
            writer.layer(*layer)
    writer.close()
    assert writer.failure is None


@pytest.mark.parametrize("n_expert", [4, 254, 255, 300, 70000])
def test_what_was_written_is_read(tmp_path: Path, n_expert: int) -> None:
    header = TraceHeader("abc", N_USED, ((7,) * n_expert, (), (9, 9, 8, 8)))
    steps = random_steps(header, 30)
    steps[3][1][0][1][0, :] = n_expert - 1
    write(tmp_path / "trace", header, steps)
    trace = read_trace(tmp_path / "trace", model="abc")
    assert trace.header == header
    assert len(trace.steps) == 30
    for step, (runs, layers) in zip(trace.steps, steps, strict=True):
        assert list(step.runs) == runs
        for got, (layer, selected, weights) in zip(step.layers, layers, strict=True):
            assert got.layer == layer
            assert np.array_equal(got.selected, selected)
            assert np.array_equal(got.weights, weights.astype(np.float16))


def test_a_decoded_token_takes_few_bytes(tmp_path: Path) -> None:
    """The file grows by a byte for each selected expert and two for its weight, and by 10 bytes for a layer."""
    header = TraceHeader("abc", 2, ((7,) * 8,) * 32)
    selected, weights = np.array([[3, 5]]), np.array([[0.75, 0.25]])
    step = ([TraceRun(ANSWER, 0, 9, 1)], [(layer, selected, weights) for layer in range(32)])
    write(tmp_path / "one", header, [step])
    write(tmp_path / "eleven", header, [step] * 11)
    sizes = [(tmp_path / name).stat().st_size for name in ("one", "eleven")]
    assert sizes[1] - sizes[0] == 10 * (4 + 2 + 13 + 32 * (10 + 2 * 3))


def test_a_file_that_ends_anywhere_gives_its_whole_steps(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    steps = random_steps(HEADER, 4)
    ends = []
    for n in range(5):
        write(path, HEADER, steps[:n])
        ends.append(path.stat().st_size)
    data = path.read_bytes()
    for size in range(ends[0], len(data) + 1):
        path.write_bytes(data[:size])
        assert len(read_trace(path).steps) == sum(end <= size for end in ends) - 1


def test_rows_of_prompts_and_answers_are_told_apart(tmp_path: Path) -> None:
    """The last layer computes the step's last rows only: here the answer's and the last of the prompt's."""
    path = tmp_path / "trace"
    rows = np.array([[0, 1, 2], [1, 2, 3], [2, 3, 0], [3, 0, 1]])
    runs = [TraceRun(PROMPT, 0, 0, 3), TraceRun(ANSWER, 1, 50, 1)]
    write(path, HEADER, [(runs, [(0, rows, rows), (2, rows[2:], rows[2:])])])
    (step,) = read_trace(path).steps
    assert [step.is_answer(len(part.selected)).tolist() for part in step.layers] == [
        [False] * 3 + [True],
        [False, True],
    ]


def test_what_was_foreseen_stays_with_its_layer_in_its_order(tmp_path: Path) -> None:
    selected = np.array([[0, 1, 2]])
    writer = TraceWriter(tmp_path / "trace", HEADER)
    writer.step([TraceRun(ANSWER, 0, 0, 1)])
    writer.layer(0, selected, selected)
    writer.predicted([(2, 3), (0, 5), (2, 0)])
    writer.layer(2, selected, selected)
    writer.close()
    (step,) = read_trace(tmp_path / "trace").steps
    assert [part.predicted for part in step.layers] == [((2, 3), (0, 5), (2, 0)), ()]
    assert [part.selected.tolist() for part in step.layers] == [selected.tolist()] * 2


@pytest.mark.parametrize("key", [(1, 0), (2, 4), (3, 0)])
def test_foreseen_experts_that_the_model_does_not_have_are_damage(tmp_path: Path, key: tuple[int, int]) -> None:
    writer = TraceWriter(tmp_path / "trace", HEADER)
    writer.step([TraceRun(ANSWER, 0, 0, 1)])
    writer.layer(0, np.array([[0, 1, 2]]), np.array([[0, 1, 2]]))
    writer.predicted([(0, 0), key])
    writer.close()
    with pytest.raises(TraceFileError, match="damaged"):
        read_trace(tmp_path / "trace")


def test_rates_are_picks_per_token(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    first, second = np.array([[0, 1, -1], [0, 4, 5]]), np.array([[0, 2, 1]])
    write(
        path,
        HEADER,
        [
            ([TraceRun(PROMPT, 0, 0, 2)], [(0, first, first)]),
            ([TraceRun(ANSWER, 0, 2, 1)], [(0, second, second), (2, second, second)]),
        ],
    )
    rates = read_trace(path).rates()
    assert rates[0] == pytest.approx([1, 2 / 3, 1 / 3, 0, 1 / 3, 1 / 3])
    assert rates[1].tolist() == [0] * 6
    assert rates[2].tolist() == [1, 1, 1, 0, 0, 0]


def test_a_cancelled_step_keeps_the_layers_it_had(tmp_path: Path) -> None:
    steps = random_steps(HEADER, 2)
    steps[0] = (steps[0][0], steps[0][1][:1])
    write(tmp_path / "trace", HEADER, steps)
    assert [len(step.layers) for step in read_trace(tmp_path / "trace").steps] == [1, 2]


def damaged(path: Path) -> dict[str, bytes]:
    """Files that are no whole trace, by the words of the answer."""
    write(path, HEADER, random_steps(HEADER, 2))
    data = path.read_bytes()
    (n_header,) = struct.unpack_from("<I", data, 12)
    begin = 16 + n_header
    no_json = data[:16] + b"{" * n_header + data[begin:]
    no_sizes = json.dumps({"model": "abc", "n_expert_used": 2}).encode()
    layer_at = begin + 4 + 2 + 13 * struct.unpack_from("<H", data, begin + 4)[0]
    return {
        "is not a trace": b"GGUF" + data[4:],
        "ends within its header": data[:10],
        "version 99": data[:8] + struct.pack("<I", 99) + data[12:],
        "damaged header": no_json,
        "has a damaged header": MAGIC + struct.pack("<II", 1, len(no_sizes)) + no_sizes,
        "is damaged": data[:layer_at] + b"\xff" + data[layer_at + 1 :],
        "damaged. Record": data[: begin + 4] + b"\xff\xff" + data[begin + 6 :],
        "damaged.": data[: begin + 15] + b"\xff" * 4 + data[begin + 19 :],
    }


def test_what_is_no_trace_is_said_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    for words, data in damaged(path).items():
        path.write_bytes(data)
        with pytest.raises(TraceFileError, match=words) as caught:
            read_trace(path)
        assert str(path) in str(caught.value)
        assert isinstance(caught.value, SlimoeError)


def test_experts_that_the_model_does_not_have_are_damage(tmp_path: Path) -> None:
    selected = np.array([[0, 1, 4]])
    write(tmp_path / "trace", HEADER, [([TraceRun(ANSWER, 0, 0, 1)], [(2, selected, selected)])])
    with pytest.raises(TraceFileError, match="damaged"):
        read_trace(tmp_path / "trace")


def test_random_damage_is_never_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    write(path, HEADER, random_steps(HEADER, 3))
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(3)
    for _ in range(300):
        wrong = bytearray(data)
        wrong[int(rng.integers(len(wrong)))] = int(rng.integers(256))
        path.write_bytes(wrong)
        try:
            trace = read_trace(path)
        except TraceFileError:
            continue
        trace.rates()


def test_another_models_trace_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "trace", HEADER, [])
    with pytest.raises(TraceFileError, match="another model"):
        read_trace(tmp_path / "trace", model="def")


def test_a_missing_file_and_a_missing_folder_are_said(tmp_path: Path) -> None:
    with pytest.raises(TraceFileError, match="cannot be read"):
        read_trace(tmp_path / "none")
    with pytest.raises(TraceFileError, match="--trace"):
        TraceWriter(tmp_path / "none" / "trace", HEADER)


def test_a_file_that_is_no_trace_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF and more")
    with pytest.raises(TraceFileError, match="left alone"):
        TraceWriter(path, HEADER)
    assert path.read_bytes() == b"GGUF and more"


def test_a_trace_or_an_empty_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.touch()
    write(path, HEADER, random_steps(HEADER, 9))
    write(path, HEADER, [])
    assert read_trace(path).steps == ()


def test_a_full_disk_is_said_before_anything_runs(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, before[1]))
    try:
        with pytest.raises(TraceFileError, match="File too large"):
            TraceWriter(tmp_path / "trace", HEADER)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_one_run_records_at_a_time(tmp_path: Path) -> None:
    first = TraceWriter(tmp_path / "trace", HEADER)
    first.step([TraceRun(ANSWER, 0, 0, 1)])
    with pytest.raises(TraceFileError, match="another run"):
        TraceWriter(tmp_path / "trace", HEADER)
    first.close()
    assert len(read_trace(tmp_path / "trace").steps) == 1
    TraceWriter(tmp_path / "trace", HEADER).close()


@pytest.mark.parametrize("place", ["pipe", "/dev/null", "."])
def test_what_is_no_file_is_not_recorded_to(tmp_path: Path, place: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TraceFileError, match=r"(a pipe|a device|a directory)"):
        TraceWriter(tmp_path / place, HEADER)


def test_a_disk_that_fills_up_later_is_reported_and_not_raised(tmp_path: Path) -> None:
    n_files = psutil.Process().num_fds()
    writer = TraceWriter(tmp_path / "trace", HEADER)
    selected = np.zeros((400, N_USED))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        for _ in range(300):
            writer.step([TraceRun(PROMPT, 0, 0, 400)])
            writer.layer(0, selected, selected)
        assert writer.failure is not None
        assert "File too large" in writer.failure
        writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in writer.failure
    assert psutil.Process().num_fds() == n_files


def test_a_models_hash_is_its_routers(tmp_path: Path) -> None:
    """Other experts, the same hash; another router, another."""
    path = write_tiny_gguf(tmp_path / "a.gguf", None)
    gguf = read_gguf(path)
    first = routers_hash(gguf)
    data = bytearray(path.read_bytes())
    for name, changes in (("ffn_down_exps", False), ("ffn_gate_inp", True)):
        tensor = next(tensor for tensor in gguf.tensors.values() if name in tensor.name)
        data[tensor.offset] ^= 0xFF
        path.write_bytes(data)
        assert (routers_hash(gguf) != first) is changes
