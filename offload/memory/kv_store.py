"""The KV caches of a model, which outlive its weights: opened anew within other limits, it still knows its tokens."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.cpu_backend import Backend
from slimoe.offload.ggml.device_backend import waiting_for_tensor
from slimoe.offload.memory.kv_cache import KVCache, KVSize
from slimoe.offload.model.spec import ModelSpec

HOST = "host"


class KVPlace(NamedTuple):
    """Where the keys and values of some layers lie: in the memory of a backend."""

    backend: Backend
    layers: tuple[int, ...]


class KVStore:
    """One cache for each place, by its name; all are of one size."""

    def __init__(self, spec: ModelSpec, size: KVSize) -> None:
        self.spec, self.size = spec, size
        self.caches: dict[str, KVCache] = {}
        self._layers: dict[str, tuple[int, ...]] = {}

    @property
    def form(self) -> str:
        """Everything by which the bytes of the same keys and values differ between caches: their type and rotation."""
        is_rotated = any(cache.hadamards for cache in self.caches.values())
        return f"{self.size.kind.name} rotated" if is_rotated else self.size.kind.name

    def arrange(self, places: Mapping[str, KVPlace]) -> None:
        """Lays the caches out in these places, and takes along what they hold; raises DoesNotFitError, as it was then.

        Old and new caches are there at the same time, so nothing else should be that is new.
        """
        kept = {name for name, place in places.items() if self._layers.get(name) == place.layers}
        made: dict[str, KVCache] = {}
        try:
            for name, place in places.items():
                if name not in kept:
                    made[name] = KVCache(self.spec, self.size, place.backend, place.layers)
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
        """Keys, and values if they are no view of these, of each layer with cells for all tokens, in their order."""
        return self._keys_and_values(have_window_cells=False)

    def window_tensors(self) -> Sequence[int]:
        """The same of layers with a window that have cells of their own."""
        return self._keys_and_values(have_window_cells=True)

    def _keys_and_values(self, *, have_window_cells: bool) -> Sequence[int]:
        keys, values = dict[int, int](), dict[int, int]()
        for cache in self.caches.values():
            keys |= cache.keys
            values |= cache.values
        has_own = {layer: self.size.n_window_cells > 0 and self.spec.window(layer) > 0 for layer in keys}
        layers = [layer for layer in sorted(keys) if has_own[layer] == have_window_cells]
        return [held[layer] for layer in layers for held in (keys, values) if layer in held]

    def state_tensors(self) -> Sequence[int]:
        """What each recurrent layer keeps of all states, in the order of layers."""
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
    with waiting_for_tensor(source):
        ggml_backend.ggml_backend_tensor_get(source, held.ctypes.data, 0, held.nbytes)
    with waiting_for_tensor(target):
        ggml_backend.ggml_backend_tensor_set(target, held.ctypes.data, 0, held.nbytes)
