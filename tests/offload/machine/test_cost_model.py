"""Predictions worked out by hand, and what must hold of all of them."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.machine.cost_model import Residency, Step, expected_uses, predict
from slimoe.offload.machine.speed import LinkSpeed, MatrixKernel, Overheads
from slimoe.offload.machine.workload import Workload, workload
from slimoe.offload.model.experts import expert_layers
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.weight_reader import model_sources
from tests.models.gguf_content import read_content, write_content
from tests.models.measured_machine import machine, processor
from tests.models.native_files import native_content, plain_ffn, set_array
from tests.models.tiny_gguf import TinyShape, write_tiny_gguf

DENSE, EXPERT = MatrixKernel(Type.Q8_0, 256, False), MatrixKernel(Type.Q4_K, 256, True)
KERNELS = [DENSE, EXPERT]
LOAD = Workload(
    n_layer=5,
    attention_layers=(0, 1, 2, 3, 4),
    routed_layers=(1, 2, 3, 4),
    n_embd=1000,
    n_embd_expert=1000,
    n_expert=8,
    n_used=2,
    dense={DENSE: 1e6},
    output={DENSE: 1e5},
    expert={EXPERT: 1e6},
    read_bytes=1e6,
)
CPU, GPU = processor(1e9, KERNELS), processor(1e11, KERNELS)
DENSE_MS, EXPERT_MS = 1.1, 1.0
IN_RAM = Residency(0.0, 1.0, is_cut=False)


# --- predictions -------------------------------------------------------------------------------------------


def test_a_resident_model_takes_what_its_bytes_take() -> None:
    prediction = predict(LOAD, IN_RAM, machine(CPU))
    assert prediction.ms_per_token == pytest.approx(DENSE_MS + 4 * 2 * EXPERT_MS)
    assert prediction.bound_ms == pytest.approx(prediction.ms_per_token)
    assert prediction.bound_name == "cpu"
    assert prediction.tokens_per_second == pytest.approx(1000 / 9.1)


@pytest.mark.parametrize(
    ("disk", "look_ahead", "expected", "bound", "name"),
    [
        (1e9, 1.0, 11.66, 9.1, "cpu"),  # 4 ms of reading, all behind computing, which takes 0.2 of it longer
        (1e9, 0.75, 12.66, 9.1, "cpu"),
        (1e9, 0.0, 15.66, 9.1, "cpu"),
        (1e8, 1.0, 40.0, 40.0, "disk"),  # 40 ms of reading, all computing behind it
        (1e8, 0.5, 46.516, 40.0, "disk"),  # half of the computing has nothing to read beside it
        (1e8, 0.0, 53.032, 40.0, "disk"),
    ],
)
def test_reading_overlaps_as_far_as_it_is_known_ahead(
    disk: float, look_ahead: float, expected: float, bound: float, name: str
) -> None:
    """Besides computing there are 0.3 ms of Python in each of four layers, and 0.14 ms for each of four reads."""
    prediction = predict(LOAD, Residency(0.0, 0.5), machine(CPU, disk), Step(look_ahead=look_ahead))
    assert prediction.ms_per_token == pytest.approx(expected)
    assert prediction.bound_ms == pytest.approx(bound)
    assert prediction.bound_name == name
    assert prediction.tier_ms == pytest.approx({"cpu": 9.1, "disk": 4e9 / disk})


def test_device_and_cpu_work_side_by_side() -> None:
    """Half of the selected experts on each: of two, both, one or none are on the device.

    The link carries the token's row and what it sees there, and for each layer what the router says and its input back,
    and the CPU's outputs there.
    """
    prediction = predict(LOAD, Residency(0.5, 0.5), machine(CPU, None, GPU), device="GPU0")
    layer = 0.25 * 0.02 + 0.5 * 1.0 + 0.25 * 2.0
    read, written = 4 * (1000 + 8 + 2), 4 * 1000 * 2 * 0.5
    link = (4 * (read + written) + 4 * 1000 + 2) / 1e10 * 1000
    assert prediction.ms_per_token == pytest.approx(0.011 + 4 * layer + link)
    assert prediction.tier_ms == pytest.approx({"GPU0": 0.011 + 4 * 0.01, "cpu": 4 * 1.0})
    assert prediction.bound_name == "cpu"


def test_the_published_limit_of_a_12_gb_card() -> None:
    """Mixtral 8x7B, Q4_K, RTX 3060, a cache that costs nothing to fill: 12.0 tokens/s in the published tables."""
    expert, rest, kv = 3 * 4096 * 14336 * 4.5 / 8, 1.06e9, 0.268e9
    share = ((11.2e9 - rest - 0.131e9 - kv) / expert / 256) ** 0.66
    experts = {EXPERT: expert}
    load = Workload(32, (*range(32),), (*range(32),), 4096, 4096, 8, 2, {DENSE: rest + kv / 2}, {}, experts, expert)
    speed = machine(processor(42e9, KERNELS), None, processor(306e9, KERNELS))
    slow_link = dataclasses.replace(speed, links={"GPU0": LinkSpeed(1e18 / 2, 1e18 / 2)})
    prediction = predict(load, Residency(share, 1 - share), slow_link, device="GPU0")
    assert 1000 / (prediction.ms_per_token + 2.5) == pytest.approx(12.0, abs=0.1)


def test_cuts_cost_what_graphs_cost() -> None:
    slow = dataclasses.replace(CPU, overheads=Overheads(1e-3, 1e-12))
    whole, cut = (predict(LOAD, Residency(0.0, 1.0, is_cut), machine(slow)).ms_per_token for is_cut in (False, True))
    assert whole == pytest.approx(9.1 + 1)
    assert cut == pytest.approx(whole + 4 * 2)


def test_attention_grows_with_what_came_before() -> None:
    cpu = dataclasses.replace(CPU, attention_seconds=1e-6)
    short, long = (predict(LOAD, IN_RAM, machine(cpu), Step(n_past=n)).ms_per_token for n in (0, 1000))
    assert long - short == pytest.approx(5 * 1000 * 1e-3)


def test_attention_of_a_batch_has_a_speed_of_its_own() -> None:
    cpu = dataclasses.replace(CPU, attention_seconds=1e-6, batch_attention_seconds=1e-8)
    for n_tokens, seconds in ((63, 1e-6), (64, 1e-8)):
        step = Step(n_tokens, 10, n_tokens)
        free, timed = (predict(LOAD, IN_RAM, machine(one), step).ms_per_token * n_tokens for one in (CPU, cpu))
        pairs = 5 * (10 * n_tokens + n_tokens * (n_tokens + 1) / 2)
        assert timed - free == pytest.approx(pairs * seconds * 1e3, rel=1e-3)


def test_layers_without_attention_attend_to_nothing() -> None:
    cpu = dataclasses.replace(CPU, attention_seconds=1e-6)
    for layers in ((0,), (1, 3), (2, 4), (0, 1, 2, 3, 4)):
        load = dataclasses.replace(LOAD, attention_layers=layers)
        short, long = (predict(load, IN_RAM, machine(cpu), Step(n_past=n)).ms_per_token for n in (0, 1000))
        assert long - short == pytest.approx(len(layers) * 1000 * 1e-3)
        free, timed = (predict(load, IN_RAM, machine(one), Step(10, 7)).ms_per_token * 10 for one in (CPU, cpu))
        seen = sum(17 if layer == 4 else 10 * 7 + 55 for layer in layers)
        assert timed - free == pytest.approx(seen * 1e-3)


def test_a_token_sees_no_more_than_its_window() -> None:
    cpu = dataclasses.replace(CPU, attention_seconds=1e-6, batch_attention_seconds=1e-6)
    for n_past, n_tokens in ((0, 3), (0, 9), (5, 9), (20, 1), (20, 80)):
        load = dataclasses.replace(LOAD, windows=(8, 8, 8, 8, 0))
        step = Step(n_tokens, n_past, 1)
        free, timed = (predict(load, IN_RAM, machine(one), step).ms_per_token * n_tokens for one in (CPU, cpu))
        seen = [min(8, place + 1) for place in range(n_past, n_past + n_tokens)]
        assert timed - free == pytest.approx((4 * sum(seen) + n_past + n_tokens) * 1e-3)


def test_small_operations_are_those_of_the_parts_that_there_are() -> None:
    slow = dataclasses.replace(CPU, overheads=Overheads(1e-12, 1e-3))

    def op_ms(attention: tuple[int, ...], routed: tuple[int, ...]) -> float:
        load = dataclasses.replace(LOAD, attention_layers=attention, routed_layers=routed)
        return predict(load, IN_RAM, machine(slow)).ms_per_token - predict(load, IN_RAM, machine(CPU)).ms_per_token

    whole = op_ms((0, 1, 2, 3, 4), (0, 1, 2, 3, 4))
    without_attention, without_experts = op_ms((0, 1, 2), (0, 1, 2, 3, 4)), op_ms((0, 1, 2, 3, 4), (1, 2))
    assert 0 < without_attention < whole
    assert 0 < without_experts < whole
    assert op_ms((0, 1, 2), (1, 2)) == pytest.approx(without_attention + without_experts - whole)


def test_a_last_layer_without_experts_saves_none_of_the_others() -> None:
    load = dataclasses.replace(LOAD, routed_layers=(0, 1, 2))
    whole, prompt = (predict(load, Residency(0, 0.25), machine(CPU, 1e9), Step(1000, 0, n)) for n in (1000, 1))
    assert whole.tier_ms["disk"] == pytest.approx(3 * 8 * 0.75 / 1000)
    assert prompt.tier_ms["disk"] == whole.tier_ms["disk"]


def test_a_batch_visits_each_expert_once() -> None:
    """A thousand tokens visit all eight experts, 250 pairs each, with which 101 rows take twice as long as one."""
    prediction = predict(LOAD, IN_RAM, machine(CPU), Step(n_tokens=1000, n_out=1000))
    experts = 4 * 8 * 1.0 * 2 * 250 / 101
    dense = (1.0 + 0.1) * 2 * 1000 / 101
    assert prediction.ms_per_token == pytest.approx((experts + dense) / 1000)
    step = Step(n_tokens=1000, n_out=1000)
    reading = predict(LOAD, Residency(0, 0.25), machine(CPU, 1e9), step).tier_ms["disk"]
    assert reading == pytest.approx(4 * 8 * 0.75 / 1000)


def test_of_a_prompt_the_last_layer_is_computed_for_its_end_only() -> None:
    prediction = predict(LOAD, IN_RAM, machine(CPU), Step(n_tokens=1000))
    experts = 3 * 8 * 1.0 * 2 * 250 / 101 + 2 * 1.0
    dense = 0.8 * 2 * 1000 / 101 + 0.2 + 0.1
    assert prediction.ms_per_token == pytest.approx((experts + dense) / 1000)
    reading = predict(LOAD, Residency(0, 0.25), machine(CPU, 1e9), Step(n_tokens=1000)).tier_ms["disk"]
    assert reading == pytest.approx((3 * 8 + 2) * 0.75 / 1000)
    cpu = dataclasses.replace(CPU, attention_seconds=1e-6)
    seen = 4 * (10 * 7 + 55) + 17
    attention = predict(LOAD, IN_RAM, machine(cpu), Step(10, 7)).ms_per_token * 10
    attention -= predict(LOAD, IN_RAM, machine(CPU), Step(10, 7)).ms_per_token * 10
    assert attention == pytest.approx(seen * 1e-3)


def test_a_batch_streams_experts_when_that_is_faster() -> None:
    speed = machine(CPU, None, GPU)
    few, many = (predict(LOAD, Residency(0.5, 0.5), speed, Step(n_tokens=n), "GPU0") for n in (2, 1000))
    # Of four experts that take the CPU 4.95 ms each, three are copied: of the last, the copy would be the last to end.
    assert many.tier_ms["link"] == pytest.approx(3 * 4 * 0.1 / 1000)
    assert many.tier_ms["cpu"] == pytest.approx(2 * 0.5 * 1.0 / 1000)
    slow_link = dataclasses.replace(speed, links={"GPU0": LinkSpeed(1e8, 1e8)})
    assert "link" in few.tier_ms
    assert "link" not in predict(LOAD, Residency(0.5, 0.5), slow_link, Step(n_tokens=2), "GPU0").tier_ms


def test_a_device_that_computes_while_it_is_copied_to_ends_sooner() -> None:
    """With 1000 rows an expert takes the device 20 / 101 ms, the CPU 100 times that, and a copy takes 0.1 ms.

    Of eight, four are there and all others are copied: one after the other that takes four times the copy longer.
    """
    speed, step = machine(CPU, None, GPU), Step(n_tokens=4000, n_out=4000)
    apart = dataclasses.replace(speed, links={"GPU0": LinkSpeed(1e10, 1e10, is_apart=True)})
    in_turn, beside = (predict(LOAD, Residency(0.5, 0.5), one, step, "GPU0") for one in (speed, apart))
    assert beside.tier_ms == in_turn.tier_ms
    assert 4000 * (in_turn.ms_per_token - beside.ms_per_token) == pytest.approx(4 * 4 * 0.1, rel=1e-3)
    # Where a copy takes 2 ms, each of the four is computed as soon as it is there.
    slow = LinkSpeed(5e8, 5e8)
    slow_speed, slow_apart = (
        dataclasses.replace(speed, links={"GPU0": dataclasses.replace(slow, is_apart=is_apart)})
        for is_apart in (False, True)
    )
    in_turn, beside = (predict(LOAD, Residency(0.5, 0.5), one, step, "GPU0") for one in (slow_speed, slow_apart))
    assert 4000 * (in_turn.ms_per_token - beside.ms_per_token) == pytest.approx(4 * (8 - 1) * 20 / 101, rel=1e-3)


def test_experts_of_one_layer_in_one_place_are_not_side_by_side() -> None:
    """Two layers on the device and two on the CPU: one waits for the other, whatever their mean."""
    speed = machine(CPU, None, GPU)
    spread, apart = (
        predict(LOAD, Residency(0.5, 0.5, by_layer=shares), speed, device="GPU0").ms_per_token
        for shares in ((0.5,) * 4, (1.0, 1.0, 0.0, 0.0))
    )
    assert spread == predict(LOAD, Residency(0.5, 0.5), speed, device="GPU0").ms_per_token
    assert apart - spread == pytest.approx(2 * 0.02 + 2 * 2.0 - 4 * (0.25 * 0.02 + 0.5 * 1.0 + 0.25 * 2.0), abs=1e-3)
    disk = Residency(0.5, 0.25, by_layer=(1.0, 1.0, 0.0, 0.0))
    reading = predict(LOAD, disk, machine(CPU, 1e9, GPU), device="GPU0").tier_ms["disk"]
    assert reading == pytest.approx(2 * 2 * 0.5)


FAR = LinkSpeed(1e8, 2e8, round_trip=5e-3)


def far_ms(overheads: Overheads, step: Step, residency: Residency, link: LinkSpeed = FAR) -> float:
    """Milliseconds of a step on a device with such overheads behind such a link."""
    speed = machine(CPU, None, dataclasses.replace(GPU, overheads=overheads))
    speed = dataclasses.replace(speed, links={"GPU0": link})
    return predict(LOAD, residency, speed, step, "GPU0").ms_per_token * step.n_tokens


def test_a_token_crosses_the_network_once_for_each_cut_layer_and_once_more() -> None:
    free, round_trip = Overheads(1e-12, 1e-12), Overheads(5e-3, 1e-12)
    for residency, n_trips in ((Residency(0.5, 0.5), 5), (Residency(1.0, 0.0, is_cut=False), 1)):
        more = far_ms(round_trip, Step(), residency) - far_ms(free, Step(), residency)
        assert more == pytest.approx(5 * n_trips)


def test_a_batch_asks_thrice_where_the_cpu_has_a_part() -> None:
    near, overheads = dataclasses.replace(FAR, round_trip=0.0), Overheads(1e-12, 1e-12)
    for shares, n_more in (((0.5,) * 4, 4), ((1.0, 1.0, 0.0, 0.0), 2)):
        # The last layer is that of one token.
        residency = Residency(sum(shares) / 4, 1 - sum(shares) / 4, by_layer=shares)
        step = Step(100, n_out=100)
        more = far_ms(overheads, step, residency) - far_ms(overheads, step, residency, near)
        assert more == pytest.approx(2 * 5 * n_more)


def test_graphs_are_told_tensor_by_tensor() -> None:
    """As an RPC server is: those of five layers, and of four cuts with experts on both sides."""
    whole, half = Residency(1.0, 0.0, is_cut=False), Residency(0.5, 0.5, by_layer=(1.0, 1.0, 0.0, 0.0))
    quick, slow = Overheads(1e-12, 1e-12), Overheads(1e-12, 1e-12, view_seconds=1e-3)
    per_layer, per_cut = 5 * 20 + 4 * 17, 4 * 15 + 2 * 23 + 2 * 6
    for residency, n_tensors in ((whole, per_layer), (half, per_layer + per_cut)):
        more = far_ms(slow, Step(), residency) - far_ms(quick, Step(), residency)
        assert more == pytest.approx(n_tensors)


def test_logits_come_over_the_link() -> None:
    speed = dataclasses.replace(machine(CPU, None, GPU), links={"GPU0": FAR})
    few, many = (
        predict(dataclasses.replace(LOAD, n_vocab=n), Residency(1.0, 0.0, is_cut=False), speed, device="GPU0")
        for n in (0, 100_000)
    )
    assert many.ms_per_token - few.ms_per_token == pytest.approx(1000 * 400_000 / 2e8)


def test_a_model_without_experts() -> None:
    load = Workload(5, (*range(5),), (), 1000, 1000, 0, 0, {DENSE: 1e6}, {DENSE: 1e5}, {}, 0)
    assert predict(load, IN_RAM, machine(CPU)).ms_per_token == pytest.approx(1.1)
    assert predict(load, IN_RAM, machine(CPU), Step(n_tokens=10)).ms_per_token > 0


def test_more_memory_is_never_slower_and_nothing_beats_the_bound() -> None:
    rng = np.random.default_rng(5)
    for _ in range(300):
        cpu, gpu = (processor(10 ** rng.uniform(8, 12), KERNELS) for _ in range(2))
        cpu = dataclasses.replace(cpu, overheads=Overheads(10 ** rng.uniform(-6, -3), 10 ** rng.uniform(-7, -5)))
        speed = machine(cpu, 10 ** rng.uniform(7, 10), gpu)
        load = dataclasses.replace(LOAD, n_used=int(rng.integers(1, 9)), read_bytes=10 ** rng.uniform(5, 8))
        step = Step(int(rng.integers(1, 4)) ** 5, int(rng.integers(0, 5000)), look_ahead=rng.uniform())
        device = rng.choice(["GPU0", ""]) or None
        on_device = rng.uniform(0, 0.5) if device else 0.0
        times = []
        for host in sorted(rng.uniform(0, 1 - on_device, 4)):
            prediction = predict(load, Residency(on_device, host), speed, step, device)
            assert prediction.bound_ms <= prediction.ms_per_token * (1 + 1e-9)
            assert prediction.bound_ms == max(prediction.tier_ms.values())
            assert prediction.tier_ms[prediction.bound_name] == prediction.bound_ms
            times.append(prediction.ms_per_token)
        assert times == sorted(times, reverse=True)
        steps = [dataclasses.replace(step, look_ahead=share) for share in (0.0, 0.3, 1.0)]
        by_look_ahead = [predict(load, Residency(on_device, 0), speed, one, device).ms_per_token for one in steps]
        assert by_look_ahead == sorted(by_look_ahead, reverse=True)


def test_more_slots_on_a_faster_device_are_never_slower() -> None:
    speed = machine(CPU, None, processor(3e9, KERNELS))
    shares = np.linspace(0, 1, 21)
    times = [predict(LOAD, Residency(s, 1 - s), speed, device="GPU0").ms_per_token for s in shares]
    assert times == sorted(times, reverse=True)


# --- expected uses -----------------------------------------------------------------------------------------


def expected_hits(priors: NDArray[np.float64] | None, resident: NDArray[np.bool_], n_used: int) -> float:
    """Expected part of the selected experts that are resident."""
    n_layer, n_expert = resident.shape
    uses = expected_uses(priors, n_layer, n_expert, n_used)
    return float((uses * resident).sum() / (n_layer * n_used))


def test_alike_experts_hit_in_proportion() -> None:
    resident = np.array([[True, False, True, False], [True, True, True, False]])
    assert expected_hits(None, resident, 2) == pytest.approx(5 / 8)
    assert expected_hits(np.zeros((2, 4)), resident, 2) == pytest.approx(5 / 8)


def test_priors_weigh_the_experts() -> None:
    priors = np.array([[4.0, 3.0, 2.0, 1.0]])
    assert expected_uses(priors, 1, 4, 2)[0] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert expected_hits(priors, np.array([[True, False, False, True]]), 2) == pytest.approx(0.5)


def test_no_expert_is_used_twice_by_a_token() -> None:
    uses = expected_uses(np.array([[90.0, 6.0, 4.0], [1.0, 0.0, 0.0]]), 2, 3, 2)
    assert uses[0] == pytest.approx([1.0, 0.6, 0.4])
    assert uses[1] == pytest.approx([1.0, 0.5, 0.5])
    assert expected_hits(np.array([[90.0, 6.0, 4.0]]), np.array([[True, False, False]]), 2) == pytest.approx(0.5)


def test_hits_of_random_priors_grow_with_what_is_resident() -> None:
    rng = np.random.default_rng(3)
    for _ in range(25):
        n_expert = int(rng.integers(1, 20))
        n_used = int(rng.integers(1, n_expert + 1))
        priors = rng.exponential(size=(3, n_expert)) ** 4
        uses = expected_uses(priors, 3, n_expert, n_used)
        assert uses.sum(axis=1) == pytest.approx(n_used)
        assert uses.max() <= 1
        order = rng.permutation(3 * n_expert)
        mask = np.zeros(3 * n_expert, np.bool_)
        hits = [expected_hits(priors, mask.reshape(3, -1), n_used)]
        for index in order:
            mask[index] = True
            hits.append(expected_hits(priors, mask.reshape(3, -1), n_used))
        assert hits == sorted(hits)
        assert hits[0] == 0
        assert hits[-1] == pytest.approx(1)


# --- what a model asks -------------------------------------------------------------------------------------


def test_the_load_of_a_file(tmp_path: Path) -> None:
    shape = TinyShape(n_embd=256, n_ff=512, n_expert=3, n_expert_used=2)
    content = read_content(write_tiny_gguf(tmp_path / "f32.gguf", None, shape=shape))
    content = content.quantised(Type.Q6_K, lambda name: "ffn_down" in name)
    gguf = read_gguf(write_content(tmp_path / "m.gguf", content))
    spec = ModelSpec.from_gguf(gguf)
    sources = model_sources(gguf, spec)
    load = workload(spec, sources, expert_layers(sources, spec))
    assert (load.n_layer, load.n_routed, load.n_expert, load.n_used) == (2, 2, 3, 2)
    assert load.attention_layers == (0, 1)
    up, down = (gguf.tensors[f"blk.0.ffn_{name}_exps.weight"].n_bytes / 3 for name in ("up", "down"))
    expected = {MatrixKernel(Type.F32, 256, True): 2 * up, MatrixKernel(Type.Q6_K, 512, True): down}
    assert load.expert == expected
    assert load.read_bytes == 2 * up + down
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_inp")
    dense = sum(gguf.tensors[f"blk.{n}.{name}.weight"].n_bytes for n in range(2) for name in names)
    assert load.dense == {MatrixKernel(Type.F32, 256, False): dense}
    assert load.output == {MatrixKernel(Type.F32, 256, False): gguf.tensors["output.weight"].n_bytes}


def test_the_load_of_a_native_file_that_lacks_parts(tmp_path: Path) -> None:
    stock = read_content(write_tiny_gguf(tmp_path / "f32.gguf", None, shape=TinyShape(n_layer=3)))
    n_expert = stock.values("blk.0.ffn_gate_inp.weight").shape[0]
    ffn = plain_ffn(n_expert)
    content = set_array(native_content(tmp_path / "scratch", stock, (ffn, None, ffn)), "attention.present", [1, 1, 0])
    kept = {name: tensor for name, tensor in content.tensors.items() if not name.startswith("blk.2.attn_")}
    gguf = read_gguf(write_content(tmp_path / "m.gguf", dataclasses.replace(content, tensors=kept)))
    spec = ModelSpec.from_gguf(gguf)
    sources = model_sources(gguf, spec)
    load = workload(spec, sources, expert_layers(sources, spec))
    assert (load.n_layer, load.attention_layers, load.routed_layers) == (3, (0, 1), (0, 2))
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_inp")
    dense = sum(tensor.n_bytes for name, tensor in gguf.tensors.items() if name.split(".")[-2] in names)
    assert sum(load.dense.values()) == dense
