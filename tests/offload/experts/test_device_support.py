"""What a device is asked for in products with experts, and those that it does not compute, which the CPU does."""

import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import llama_cpp.llama_cpp as llama
import pytest
from gguf import GGMLQuantizationType as Type

from bench.baselines.llama_cpp import LlamaCpp, LlamaCppConfig
from slimoe.offload.engine import Engine
from slimoe.offload.errors import DeviceError
from slimoe.offload.ggml import device as ggml_device
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.device_backend import DeviceBackend
from slimoe.offload.ggml.devices import choose_devices
from slimoe.offload.ggml.struct import Tensor
from slimoe.offload.model.architectures import ARCHITECTURES
from slimoe.offload.model.experts import SlotClass
from slimoe.offload.plan.device_support import most_stacked
from slimoe.offload.plan.engine_plan import plan_engine
from slimoe.offload.plan.machine import this_machine
from tests.models.configs import reconfigured
from tests.models.conversation import TOKENS, conversation
from tests.models.tier_models import mixed_model, plain_model
from tests.models.tiered import device_engine, resident_engine
from tests.models.tiny_gguf import FAMILIES, FineShape, write_family
from tests.offload.devices import Devices, lent

SHAPE = FineShape(n_expert=16, n_expert_used=4, n_embd=128)
SHAPES = {"deepseek2-lite": FineShape(n_layer=26, n_ff=32, n_expert=6, n_expert_used=2)}
"""Sizes that a family must have."""
Product = tuple[int, int]
"""The number of inputs of an expert's matrix, and what the kernel is asked to make of them at most."""


def product_of(node: int) -> Product | None:
    """A product with experts, None for any other operation."""
    tensor = ggml.tensor_at(node)
    if ggml.ggml_op_desc(node) != b"MUL_MAT_ID":
        return None
    return ggml.tensor_at(tensor.src[0]).ne[0], tensor.op_params[3]


def products(graph: int) -> Iterator[Product]:
    nodes = (ggml.ggml_graph_node(graph, index) for index in range(ggml.ggml_graph_n_nodes(graph)))
    return (product for product in map(product_of, nodes) if product is not None)


@pytest.mark.parametrize("name", ["mistral4", "deepseek2"])
@pytest.mark.parametrize("on_device", [0.0, 0.5, 2.0])
def test_kernels_are_asked_for_the_inputs_that_llama_cpp_asks_them_for(
    tmp_path: Path, endpoints: tuple[str, ...], name: str, on_device: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_family(tmp_path / "m.gguf", name, Type.Q8_0, SHAPE)
    asked, found = set[Product](), set[Product]()

    @llama.ggml_backend_sched_eval_callback
    def watch(node: int, is_asking: bool, _: int | None) -> bool:
        if is_asking and (product := product_of(node)) is not None:
            asked.add(product)
        return False

    with closing(LlamaCpp(LlamaCppConfig(path, 256, 1, extra_buffers=False), watch)) as baseline:
        baseline.prefill(TOKENS[:4])

    for method in ("compute", "compute_async"):
        compute = getattr(DeviceBackend, method)

        def watched(backend: DeviceBackend, graph: int, compute: Callable[..., None] = compute) -> None:
            found.update(products(graph))
            compute(backend, graph)

        monkeypatch.setattr(DeviceBackend, method, watched)
    with closing(device_engine(lent(endpoints[0]).config(path), on_device)) as engine:
        engine.prefill(TOKENS[:4])
        engine.decode(TOKENS[4])
    assert found == asked
    assert {precision for _, precision in asked} == ({0, ggml.PREC_F32} if name == "mistral4" else {0})


def says_no(monkeypatch: pytest.MonkeyPatch, kind: Type | None) -> None:
    """Lets devices not compute products with experts of a type or, with None, those that keep their inputs as F32.

    The latter is what ggml's CUDA and Vulkan say.
    """

    def supports(device: int, node: int) -> bool:
        tensor = ggml.tensor_at(node)
        if (product := product_of(node)) is None:
            return True
        return product[1] != ggml.PREC_F32 if kind is None else ggml.tensor_at(tensor.src[0]).type != kind

    monkeypatch.setattr(ggml_device, "ggml_backend_dev_supports_op", supports)


@pytest.mark.parametrize("on_device", [0.3, 2.0])
def test_experts_whose_inputs_a_device_would_round_stay_on_the_host(
    tmp_path: Path, one_device: Devices, on_device: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_family(tmp_path / "m.gguf", "mistral4", Type.Q8_0, SHAPE)
    case = one_device.config(path)
    with closing(resident_engine(reconfigured(case, rpc=()))) as engine:
        expected = conversation(engine)
    if one_device.is_exact:
        says_no(monkeypatch, None)  # what GPUs say by themselves
    with closing(device_engine(case, on_device, 0.5)) as engine:
        (note,) = (note for note in engine.notes if "does not multiply with experts of Q8_0" in note)
        assert note.endswith("the CPU computes them.")
        one_device.check(conversation(engine), expected, case.model)
        counters = engine.counters()
    assert counters["device_hits"] == counters["bytes_uploaded"] == 0
    assert counters["hits"] > 0


def test_experts_of_a_type_that_a_device_does_not_compute_stay_on_the_host(
    tmp_path: Path, one_device: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = one_device.config(mixed_model(tmp_path))
    with closing(resident_engine(reconfigured(case, rpc=()))) as engine:
        expected = conversation(engine)
    says_no(monkeypatch, Type.Q6_K)
    with closing(device_engine(case, 2.0, 0.5)) as engine:
        (plan,) = engine.plan.devices
        assert [[kind.name for kind, _ in bank.slot_class] for bank in plan.banks] == [["Q4_K", "Q5_K", "Q4_K"]]
        (note,) = (note for note in engine.notes if "does not multiply with experts" in note)
        assert "experts of Q4_K, Q6_K as" in note
        one_device.check(conversation(engine), expected, case.model)
        assert engine.counters()["device_hits"] > 0


# --- what a device does not hold in one piece ---------------------------------------------------------------


@pytest.mark.parametrize("on_device", [0.4, 2.0])
def test_slots_lie_in_several_banks_where_one_stack_would_be_too_large(
    tmp_path: Path, one_device: Devices, on_device: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = one_device.config(plain_model(tmp_path))
    with closing(resident_engine(reconfigured(case, rpc=()))) as engine:
        expected = conversation(engine)
    n_bytes = 128 * 96 * 4  # of a matrix of an expert
    monkeypatch.setattr(ggml_device, "ggml_backend_buft_get_max_size", lambda buft: 8192 + 7 * n_bytes)
    with closing(device_engine(case, on_device, 0.5)) as engine:
        (plan,), (device,) = engine.plan.devices, engine.device_experts
        assert not plan.is_whole
        assert sorted(layer for bank in plan.banks for layer in bank.layers) == [0, 1, 2, 3]
        assert len(plan.banks) == (2 if on_device < 1 else 4)
        assert all(bank.n_slots <= 7 for bank in plan.banks)
        one_device.check(conversation(engine), expected, case.model)
        assert engine.counters()["device_hits"] > 0
        for layer, expert in device:
            bank = device.bank_of((layer, expert))
            assert bank is not None
            assert layer in bank.layers
            assert device.slot((layer, expert)) < bank.n_slots


def test_the_largest_stack_is_the_driver_s_answer(one_device: Devices) -> None:
    """An RPC server binds whatever it gives memory for; a graphics API has a limit for both."""
    (device,) = choose_devices(one_device.names[0], one_device.endpoints)
    matrix = Type.F32, (4096, 2048)
    kind = SlotClass.of(matrix, matrix, (Type.F32, (2048, 4096)))
    wanted = 1 << 14
    found = most_stacked(device, ARCHITECTURES["llama"], kind, wanted)
    if one_device.is_exact:
        assert found == wanted
    else:
        n_bytes = 4096 * 2048 * 4
        with closing(DeviceBackend(device)) as backend:
            assert n_bytes <= found * n_bytes < backend.max_buffer_bytes


def lacks(monkeypatch: pytest.MonkeyPatch, is_lacking: Callable[[str, Tensor], bool]) -> list[str]:
    """Lets devices not compute some operations, and returns the names of all that are asked for."""
    asked = list[str]()

    def supports(device: int, node: int) -> bool:
        asked.append(ggml.ggml_op_desc(node).decode())
        return not is_lacking(asked[-1], ggml.tensor_at(node))

    monkeypatch.setattr(ggml_device, "ggml_backend_dev_supports_op", supports)
    return asked


def is_product_of_q6(name: str, tensor: Tensor) -> bool:
    return name == "MUL_MAT" and ggml.tensor_at(tensor.src[0]).type == Type.Q6_K


def attends_in_f16(name: str, tensor: Tensor) -> bool:
    return name == "FLASH_ATTN_EXT" and ggml.tensor_at(tensor.src[1]).type == Type.F16


def rotates(name: str, tensor: Tensor) -> bool:
    return name == "ROPE"


def sorts(name: str, tensor: Tensor) -> bool:
    return name == "ARGSORT"


def looks_up_weights(name: str, tensor: Tensor) -> bool:
    return name == "GET_ROWS"


@pytest.mark.parametrize(
    ("is_lacking", "what"),
    [
        (is_product_of_q6, r"does not multiply with output.weight \(Q6_K, .*: it lacks the type, or binds no tensor"),
        (attends_in_f16, r"does not attend with heads of 64 over a KV cache of F16\. "),
        (rotates, r"does not compute ROPE of F32 \(64 x 2 x 32\)\. "),
        (sorts, r"does not compute ARGSORT of F32 \(4 x 32\)\. "),
        (looks_up_weights, r"does not compute GET_ROWS of F32 \(1 x 4 x 32\)\. "),
    ],
)
def test_a_device_that_lacks_an_operation_is_not_planned_with(
    tmp_path: Path,
    one_device: Devices,
    is_lacking: Callable[[str, Tensor], bool],
    what: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anything is loaded: named it is an error, otherwise it is left out, and why is told."""
    case = one_device.config(mixed_model(tmp_path), kv_type="f16")
    (device,) = choose_devices(case.devices.device, case.devices.rpc)
    lacks(monkeypatch, is_lacking)
    with pytest.raises(DeviceError, match=f"{what}.*Use --device none"):
        plan_engine(reconfigured(case, vram=("1GiB",)))
    machine = replace(this_machine(reconfigured(case, device="none", rpc=())), devices=(device,))
    plan = plan_engine(reconfigured(case, device="auto"), machine)
    assert not plan.devices
    (note,) = plan.notes
    assert re.match(f"Without {device.name}: .*{what.removesuffix(' ')}", note)


def test_a_kv_cache_of_another_type_may_be_what_a_device_attends_to(
    tmp_path: Path, one_device: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = one_device.config(mixed_model(tmp_path), kv_type="f32", vram=("1GiB",))
    lacks(monkeypatch, attends_in_f16)
    assert plan_engine(case).devices


@pytest.mark.parametrize("name", FAMILIES)
def test_all_that_a_device_is_given_was_asked_for_before(
    tmp_path: Path, endpoints: tuple[str, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operations of a type, whatever the family: opening the model finds none that the plan did not ask for."""
    path = write_family(tmp_path / "m.gguf", name, Type.Q8_0, SHAPES.get(name, SHAPE))
    case, asked = lent(endpoints[0]).config(path), set[tuple[str, int]]()

    def supports(device: int, node: int) -> bool:
        operation, first = ggml.ggml_op_desc(node).decode(), ggml.tensor_at(node).src[0]
        if operation not in ("VIEW", "RESHAPE", "PERMUTE"):  # of these nothing is computed
            asked.add((operation, ggml.tensor_at(first or node).type))
        return True

    monkeypatch.setattr(ggml_device, "ggml_backend_dev_supports_op", supports)
    plan = plan_engine(reconfigured(case, vram=("1GiB",)))
    assert plan.devices
    planned = set(asked)
    asked.clear()
    with closing(Engine.open(reconfigured(case, vram=("1GiB",)))):
        assert asked - planned == set()
    asked.clear()
    with closing(device_engine(case, 0.4)):
        assert {name for name, _ in asked - planned} <= {"CPY", "SET_ROWS", "GET_ROWS", "CONT"}
