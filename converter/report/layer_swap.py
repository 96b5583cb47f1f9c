"""What the changes of each block alone cost. Apart: the only measurement that runs later blocks again for each one."""

from pathlib import Path

import torch

from slimoe.converter.forward.block import read_head
from slimoe.converter.forward.layer_states import LayerStates, Progress, fill_states
from slimoe.converter.forward.stream import Observer, Stream
from slimoe.converter.forward.windows import Windows
from slimoe.converter.report.alignment import LayerMap, likely_layer_map
from slimoe.converter.report.evaluation import check_alike, divergences
from slimoe.converter.source.model_source import ModelSource
from slimoe.offload.errors import UsageError


def divergence_by_block(
    model: ModelSource,
    reference: ModelSource,
    windows: Windows,
    *,
    layer_map: LayerMap | None = None,
    device: str = "cpu",
    directory: Path | None = None,
    on_progress: Progress = lambda _done, _total: None,
) -> tuple[float, ...]:
    """Mean KL divergence in nats per token by block of the reference; a block that is gone is left out there.

    All later blocks of the reference run once more for each: the cost is half its number of blocks in whole passes, so
    a few thousand tokens are enough. Progress counts passes of blocks. Raises UsageError for a model whose blocks come
    from nobody knows where or that has other sizes, and ModelFileError.
    """
    check_alike(model, reference)
    layer_map = layer_map or likely_layer_map(model, reference)
    if layer_map is None:
        raise UsageError(f"{model.path} has fewer blocks than {reference.path}. Say which ones they are.")
    n_layer, sequences = reference.spec.n_layer, windows.sequences
    with LayerStates(reference, sequences.n_rows, directory) as states:
        fill_states(reference, sequences, states, device=device, directory=directory)
        own, other = Stream(reference, sequences, device, directory), Stream(model, sequences, device, directory)
        head, rows, found = read_head(reference, device), torch.from_numpy(windows.rows), []
        done, n_passes = 0, n_layer * (n_layer + 1) // 2
        expected = states.before[-1][rows]
        try:
            for block in range(n_layer):
                other.h.copy_(states.before[block])
                if block in layer_map.blocks:
                    other.pass_layer(layer_map.blocks.index(block), Observer())
                own.h.copy_(other.h)
                for later in range(block + 1, n_layer):
                    own.pass_layer(later, Observer())
                found.append(float(divergences(head, expected, head, own.h[rows]).mean()))
                done += n_layer - block
                on_progress(done, n_passes)
        finally:
            own.close()
            other.close()
    return tuple(found)
