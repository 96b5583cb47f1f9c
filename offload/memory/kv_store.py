"""The KV caches of a model, which outlive its weights: opened anew within other limits, it still knows its tokens."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from gguf import GGMLQuantizationType

from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.cpu_backend import Backend
from slimoe.offload.memory.kv_cache import KVCache
from slimoe.offload.model.spec import ModelSpec

HOST = "host"


class KVPlace(NamedTuple):
    """Where the keys and values of some layers lie: in the memory of a backend."""

    backend: Backend
    layers: tuple[int, ...]


class KVStore:
    """One cache for each place, by its name; all have `n_cells` cells of one type, and `n_states` recurrent states."""

    def __init__(self, spec: ModelSpec, n_cells: int, kind: GGMLQuantizationType, n_states: int = 0) -> None:
        self.spec, self.n_cells, self.kind, self.n_states = spec, n_cells, kind, n_states
        self.caches: dict[str, KVCache] = {}
        self._layers: dict[str, tuple[int, ...]] = {}

    @property
    def form(self) -> str:
        """Everything by which the bytes of the same keys and values differ between caches: their type and rotation."""
        is_rotated = any(cache.hadamards for cache in self.caches.values())
        return f"{self.kind.name} rotated" if is_rotated else self.kind.name

    def arrange(self, places: Mapping[str, KVPlace]) -> None:
        """Lays the caches out in these places, and takes along what they hold; raises DoesNotFitError, as it was then.

        Old and new caches are there at the same time, so nothing else should be that is new.
        """
        kept = {name for name, place in places.items() if self._layers.get(name) == place.layers}
        made: dict[str, KVCache] = {}
        try:
            for name, place in places.items():
                if name not in kept:
                    made[name] = KVCache(self.spec, self.n_cells, self.kind, place.backend, place.layers, self.n_states)
        except BaseException:
            for cache in made.values():
                cache.close()
            raise
        for cache in made.values():
            for old in self.caches.values():
                for mine, theirs in zip(cache.kinds, old.kinds, strict=True):
                    for layer in mine.keys() & theirs.keys():
                        _copy(theirs[layer], mine[layer])
        for name in [name for name in self.caches if name not in kept]:
            self.caches.pop(name).close()
        self.caches |= made
        self._layers = {name: place.layers for name, place in places.items()}

    def tensors(self) -> Sequence[int]:
        """Keys, and values if they are no view of these, of each layer that has attention, in the order of layers."""
        keys, values = dict[int, int](), dict[int, int]()
        for cache in self.caches.values():
            keys |= cache.keys
            values |= cache.values
        return [held[layer] for layer in sorted(keys) for held in (keys, values) if layer in held]

    def state_tensors(self) -> Sequence[int]:
        """What each recurrent layer keeps of `n_states` sequences, in the order of layers."""
        kinds = [cache.kinds[2:] for cache in self.caches.values()]
        layers = sorted({layer for convs, _ in kinds for layer in convs})
        return [kind[layer] for layer in layers for of in kinds for kind in of if layer in kind]

    def close(self) -> None:
        """Frees the memory."""
        for cache in self.caches.values():
            cache.close()
        self.caches.clear()


def _copy(source: int, target: int) -> None:
    """Copies a tensor, from whatever memory to whatever other."""
    held = np.empty(int(ggml.ggml_nbytes(source)), np.uint8)
    ggml_backend.ggml_backend_tensor_get(source, held.ctypes.data, 0, held.nbytes)
    ggml_backend.ggml_backend_tensor_set(target, held.ctypes.data, 0, held.nbytes)
