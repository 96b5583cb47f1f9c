"""The copies of experts in any memory now, and the time to read another. Apart: lossy modes know nothing else."""

from collections.abc import Sequence

from slimoe.offload.cache.device_pool import DeviceSlots
from slimoe.offload.cache.disk_reader import DiskReader
from slimoe.offload.cache.host_pool import HostPool
from slimoe.offload.cache.residency import Key
from slimoe.offload.lossy.rules import SECONDS_PER_BYTE
from slimoe.offload.model.experts import ExpertLayer


class ResidentExperts:
    """The host expert cache's and the devices' copies, as `decision.Memory` asks for them."""

    def __init__(
        self,
        layers: Sequence[ExpertLayer | None],
        host_pool: HostPool,
        reader: DiskReader,
        on_devices: DeviceSlots,
    ) -> None:
        self._layers, self._host_pool, self._reader, self._on_devices = layers, host_pool, reader, on_devices

    def holds(self, key: Key, copy_index: int) -> bool:
        """Whether a copy is here, complete; devices have best copies only."""
        if copy_index == 0 and self._on_devices.numbers[key] >= 0:
            return True
        layer = self._layers[key[0]]
        assert layer is not None
        return self._host_pool.holds(key, layer.experts[key[1]][copy_index])

    def read_seconds(self, n_bytes: int) -> float:
        """At the mean speed so far, which the reads at the start give already."""
        n_read = self._reader.n_read
        return n_bytes * (self._reader.busy_seconds / n_read if n_read else SECONDS_PER_BYTE)
