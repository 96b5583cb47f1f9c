"""The streams before every layer and behind the last, kept for what looks at a pass backwards or layer by layer."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from torch import Tensor

from slimoe.converter.forward.stream import HiddenStates, Observer, Sequences, Stream
from slimoe.converter.source.model_source import ModelSource

Progress = Callable[[int, int], None]
"""Called with the steps done and all steps."""


class LayerStates:
    """`before[layer]` [n_rows, n_embd], with the streams behind the last layer at the end; closing deletes files."""

    def __init__(self, source: ModelSource, n_rows: int, directory: Path | None = None) -> None:
        n_states = source.spec.n_layer + 1
        self._states = [HiddenStates(n_rows, source.spec.n_embd, directory) for _ in range(n_states)]

    @property
    def before(self) -> list[Tensor]:
        """All of them."""
        return [states.rows for states in self._states]

    def close(self) -> None:
        """Deletes what lies on disk."""
        for states in self._states:
            states.close()

    def __enter__(self) -> "LayerStates":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def state_bytes(source: ModelSource, n_rows: int) -> int:
    """Bytes that LayerStates take for so many tokens."""
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
    """Runs the sequences through the model; raises ModelFileError."""
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
