"""How sensitive the model's prediction is to each value in each layer, by a backward pass that reads block after block.

The measure is the diagonal of Fisher's information, whose half is the second-order growth of the KL divergence: the
squared gradient of the log-likelihood of a label that is drawn from the model's own prediction. Labels of different
tokens are independent and their gradients have mean 0, so one backward pass of their sum serves all tokens: the
products of different tokens' gradients cancel in the mean. GEMQ (arXiv 2605.23078) weighs experts' errors with it.
"""

from dataclasses import dataclass
from pathlib import Path

from slimoe.converter.forward.layer_states import LayerStates, Progress, fill_states
from slimoe.converter.forward.stream import Sequences
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.stats.backward_pass import Backward
from slimoe.converter.stats.resume import PartialBackward
from slimoe.converter.stats.statistics import Removals, Sensitivity, Single


@dataclass(frozen=True, slots=True)
class ModelSensitivity:
    """The sensitivities of all layers, measured on `n_tokens` tokens with `n_draws` draws of labels.

    The mean squared error of a matrix's output times its sensitivity, summed and halved, is the KL divergence in nats
    per token; for an expert's matrices the mean runs over the tokens that selected it. Products of errors are left out,
    those of one matrix in several tokens among them, and the selection of other experts. Matrices that a layer does not
    have are empty, a dense feed-forward part is one expert that all tokens selected, and the arrays of experts narrower
    than the layer's widest end in zeros. `removals` are the costs of leaving out parts of the layers. `output`
    [n_vocab] is by the logits, and exact: the mean of p (1 - p). `token` [n_embd] is by the rows of the token table.
    """

    layers: tuple[Sensitivity, ...]
    removals: tuple[Removals, ...]
    output: Single
    token: Single
    n_tokens: int
    n_draws: int


def measure_sensitivity(
    source: ModelSource,
    sequences: Sequences,
    *,
    seed: int = 0,
    n_draws: int = 1,
    device: str = "cpu",
    directory: Path | None = None,
    partial: PartialBackward | None = None,
    on_progress: Progress = lambda _done, _total: None,
) -> ModelSensitivity:
    """Runs the sequences forward, keeping the residual streams before all layers, and then backward `n_draws` times.

    The streams lie in files of `directory`, or in memory without one (see `layer_states.state_bytes`). With `partial`,
    a single draw that was interrupted continues after the last whole layer. Raises ModelFileError, and BadLogitsError
    if the model computes NaN or infinity.
    """
    assert partial is None or n_draws == 1
    done, total = 0, (1 + n_draws) * source.spec.n_layer

    def step() -> None:
        nonlocal done
        done += 1
        on_progress(done, total)

    with LayerStates(source, sequences.n_rows, directory) as states:
        fill_states(source, sequences, states, device=device, directory=directory, on_layer=step)
        backward = Backward(source, sequences, states, device, directory, partial)
        try:
            for draw in range(n_draws):
                backward.run(seed + draw, step)
        finally:
            backward.close()
    count = n_draws * sequences.n_rows
    return ModelSensitivity(
        backward.layers(count), backward.removals(count), *backward.ends(count), sequences.n_rows, n_draws
    )
