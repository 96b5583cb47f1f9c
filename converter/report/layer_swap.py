"""The cost of each block's changes alone. Apart: the only measurement that runs all later blocks again for each one."""

from pathlib import Path

import torch

from slimoe.converter.forward.head import read_head
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
    """The mean KL divergence in nats per token of the reference with each of its blocks swapped for the model's.

    A block that the model does not have is left out of the reference. All later blocks of the reference run again for
    each swap, which takes half as many whole passes as there are blocks, so a few thousand tokens must be enough.
    Progress counts passes of blocks. Raises UsageError for a model of other sizes or whose blocks cannot be mapped to
    the reference's, and ModelFileError.
    """
    check_alike(model, reference)
    layer_map, n_layer = layer_map or likely_layer_map(model, reference), reference.spec.n_layer
    if layer_map is None:
        problem = f"{model.path} has {len(model.layers)} blocks, but {reference.path} has {n_layer}"
        raise UsageError(f"{problem}, and the file does not say which ones it has. Give a layer map.")
    sequences = windows.sequences
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
