"""A part of a model on one device, the CPU among them."""

from collections.abc import Sequence
from dataclasses import dataclass

from slimoe.offload.experts.device_experts import DeviceExperts
from slimoe.offload.ggml.cpu_backend import Backend
from slimoe.offload.graph.exchange import Exchange
from slimoe.offload.graph.weights import ModelWeights
from slimoe.offload.memory.kv_cache import KVCache


@dataclass(frozen=True, slots=True, eq=False)
class DevicePart:
    """Consecutive layers on one device, with their weights and KV cache; the first part may only look tokens up.

    `exchange` holds what its segments and the MoE steps pass each other, `experts` those in the device's slots if it
    has any.
    """

    backend: Backend
    exchange: Exchange
    layers: Sequence[int]
    cache: KVCache | None
    weights: ModelWeights
    experts: DeviceExperts | None = None
