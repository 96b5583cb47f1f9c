"""The hidden states between all layers, for what goes through a pass backwards or compares it layer by layer."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from torch import Tensor

from slimoe.converter.forward.stream import HiddenStates, Observer, Sequences, Stream
from slimoe.converter.source.model_source import ModelSource

Progress = Callable[[int, int], None]
"""Called with the number of steps that are done, and that of all steps."""


class LayerStates:
    """The hidden states [n_rows, n_embd] before each layer and, last, those behind the last layer.

    They lie in memory, or in files of `directory` that closing deletes.
    """

    def __init__(self, source: ModelSource, n_rows: int, directory: Path | None = None) -> None:
        n_states = source.spec.n_layer + 1
        self._states = [HiddenStates(n_rows, source.spec.n_embd, directory) for _ in range(n_states)]

    @property
    def before(self) -> list[Tensor]:
        """The hidden states before each layer, and those behind the last one."""
        return [states.rows for states in self._states]

    def close(self) -> None:
        """Deletes them."""
        for states in self._states:
            states.close()

    def __enter__(self) -> "LayerStates":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def state_bytes(source: ModelSource, n_rows: int) -> int:
    """The bytes that LayerStates take for `n_rows` tokens."""
    return 4 * (source.spec.n_layer + 1) * n_rows * source.spec.n_embd


def fill_states(
    source: ModelSource,
    sequences: Sequences,
    states: LayerStates,
    *,
    device: str = "cpu",
    directory: Path | None = None,
    on_layer: Callable[[], None] = lambda: None,
) -> None:
    """Runs the sequences through the model, and keeps their hidden states in `states`; raises ModelFileError."""
    stream = Stream(source, sequences, device, directory)
    try:
        stream.embed()
        states.before[0].copy_(stream.h)
        for layer in range(source.spec.n_layer):
            stream.pass_layer(layer, Observer())
            states.before[layer + 1].copy_(stream.h)
            on_layer()
    finally:
        stream.close()
