"""What a device is asked for in products with experts, and those that it does not compute, which the CPU does."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import llama_cpp.llama_cpp as llama
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from bench.baselines.llama_cpp import LlamaCpp, LlamaCppConfig
from slimoe.offload.ggml import device as ggml_device
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.device_backend import DeviceBackend
from slimoe.offload.ggml.devices import available_devices
from slimoe.offload.plan.engine_config import EngineConfig
from tests.models.configs import engine_config, reconfigured
from tests.models.conversation import TOKENS, conversation
from tests.models.tier_models import mixed_model
from tests.models.tiered import device_engine, resident_engine
from tests.models.tiny_gguf import FineShape, write_family

SHAPE = FineShape(n_expert=16, n_expert_used=4, n_embd=128)
Product = tuple[int, int]
"""The number of inputs of an expert's matrix, and what the kernel is asked to make of them at most."""


def config(path: Path, endpoint: str) -> EngineConfig:
    lent = available_devices([endpoint])[-1]
    return engine_config(path, n_ctx=256, n_batch=32, n_threads=1, device=lent.name, rpc=(endpoint,))


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
    with closing(device_engine(config(path, endpoints[0]), on_device)) as engine:
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
    tmp_path: Path, endpoints: tuple[str, ...], on_device: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_family(tmp_path / "m.gguf", "mistral4", Type.Q8_0, SHAPE)
    case = config(path, endpoints[0])
    with closing(resident_engine(reconfigured(case, rpc=()))) as engine:
        expected = conversation(engine)
    says_no(monkeypatch, None)
    with closing(device_engine(case, on_device, 0.5)) as engine:
        (note,) = (note for note in engine.notes if "does not multiply with experts of Q8_0" in note)
        assert note.endswith("the CPU computes them.")
        np.testing.assert_array_equal(conversation(engine), expected)
        counters = engine.counters()
    assert counters["device_hits"] == counters["bytes_uploaded"] == 0
    assert counters["hits"] > 0


def test_experts_of_a_type_that_a_device_does_not_compute_stay_on_the_host(
    tmp_path: Path, endpoints: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = config(mixed_model(tmp_path), endpoints[0])
    with closing(resident_engine(reconfigured(case, rpc=()))) as engine:
        expected = conversation(engine)
    says_no(monkeypatch, Type.Q6_K)
    with closing(device_engine(case, 2.0, 0.5)) as engine:
        (plan,) = engine.plan.devices
        assert [[kind.name for kind, _ in slot_class] for slot_class, _ in plan.n_slots] == [["Q4_K", "Q5_K", "Q4_K"]]
        (note,) = (note for note in engine.notes if "does not multiply with experts" in note)
        assert "experts of Q4_K, Q6_K as" in note
        np.testing.assert_array_equal(conversation(engine), expected)
        assert engine.counters()["device_hits"] > 0
