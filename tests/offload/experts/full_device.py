"""A device that gives no more memory."""

import pytest

from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml.device_backend import DeviceBackend

_allocate = DeviceBackend.allocate


def none_allocated(backend: DeviceBackend, n_bytes: int) -> int:
    """What `DeviceBackend.allocate` does when ggml gives it nothing: raises DeviceFullError."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ggml_backend, "ggml_backend_buft_alloc_buffer", lambda buft, n_bytes: None)
        return _allocate(backend, n_bytes)
