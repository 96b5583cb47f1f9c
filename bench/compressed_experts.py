"""What compressed experts (arXiv 2503.00634) win back of what selecting fewer experts loses.

Vectors are fitted to some texts, without training, and evaluated on others: windows of 512 tokens, the second half of
each scored against the checkpoint in float32. For each number of main experts there are three models: the checkpoint,
whose tokens select all, plain routing to the main experts alone, and these with the vectors; `closed` is the share of
the divergence that the vectors take away. The last line of stdout is one JSON document.

    python -m bench.compressed_experts --checkpoint ~/olmoe --fit mixed.txt --text news=news.txt
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console

from bench.limits import machine
from bench.limits.flags import threads_flag
from bench.models.random_checkpoint import write_random_checkpoint
from bench.models.shapes import SHAPES
from bench.quality.lab import Row, read_windows
from slimoe.converter.budget.compressed_experts import CompressedSource, fit_compressed_experts
from slimoe.converter.forward.expert import AuxVectors
from slimoe.converter.forward.texts import TextFile, read_texts
from slimoe.converter.forward.windows import Windows, cut_windows
from slimoe.converter.report.evaluation import Reference
from slimoe.converter.report.quality import Quality, summarise
from slimoe.converter.source.model_source import ModelSource, active_weights
from slimoe.converter.source.open_source import open_source
from slimoe.offload.errors import SlimoeError, UsageError
from slimoe.offload.resources.processors import default_threads
from slimoe.server.chat.text_encoder import TokenizerEncoder

Tokens = tuple[tuple[int, ...], ...]


def rows(source: ModelSource, tokens: Tokens, windows: Windows, mains: tuple[int, ...] = ()) -> Iterator[Row]:
    """A row for each number of main experts, by default from one less than a token selects down to 1."""
    reference = Reference(source, windows)
    try:
        for n_main in mains or range(source.spec.n_expert_used - 1, 0, -1):
            plain = summarise(reference.compare(CompressedSource(source, n_main)))
            fitted = fit_compressed_experts(source, tokens, n_main)
            compressed = CompressedSource(source, n_main, fitted.vectors)
            ours = summarise(reference.compare(compressed))
            parts = {
                name: _kl(summarise(reference.compare(CompressedSource(source, n_main, _alone(fitted.vectors, name)))))
                for name in ("gain", "shift")
            }
            yield {
                "n_main": n_main,
                "active": active_weights(compressed),
                "kl_plain": _kl(plain),
                "kl": _kl(ours),
                "kl_error": ours.total.divergence.error,
                "closed": 1 - _kl(ours) / _kl(plain),
                "kl_of_one": parts,
                "same_top": [plain.total.same_top, ours.total.same_top],
                "held_out": [one.after / max(one.before, 1e-30) for one in fitted.layers.values()],
                "domains": {name: one.divergence.mean for name, one in ours.domains.items()},
                "domains_plain": {name: one.divergence.mean for name, one in plain.domains.items()},
            }
    finally:
        reference.close()


def _kl(quality: Quality) -> float:
    return float(quality.total.divergence.mean)


def _alone(vectors: dict[int, AuxVectors], name: str) -> dict[int, AuxVectors]:
    """The gains without the shifts that were fitted with them, or the other way round."""
    none = {block: torch.zeros_like(one.gain) for block, one in vectors.items()}
    if name == "gain":
        return {block: AuxVectors(one.gain, none[block]) for block, one in vectors.items()}
    return {block: AuxVectors(none[block], one.shift) for block, one in vectors.items()}


def smoke(directory: Path) -> tuple[ModelSource, Tokens, Windows]:
    """A random checkpoint, and random tokens to fit to and to evaluate on."""
    write_random_checkpoint(directory / "checkpoint", SHAPES["smoke"])
    source, rng = open_source(directory / "checkpoint"), np.random.default_rng(1)
    tokens = tuple(tuple(rng.integers(0, source.spec.n_vocab, 32).tolist()) for _ in range(8))
    return source, tokens[:4], cut_windows({"random": sum(tokens[4:], ())}, length=32)


@click.command()
@click.option("--checkpoint", type=click.Path(path_type=Path), help="The model, whose tokens select several experts.")
@click.option("--fit", "fits", multiple=True, metavar="[NAME=]FILE", help="Texts to fit the vectors to.")
@click.option("--text", "texts", multiple=True, metavar="[NAME=]FILE", help="To evaluate on: not what was fitted to.")
@click.option("--tokens", type=click.IntRange(2048), default=32768, show_default=True, help="Tokens to fit to.")
@click.option("--windows", type=click.IntRange(1), default=8, show_default=True, help="Of 512 tokens, of each text.")
@click.option("--main", "mains", type=click.IntRange(1), multiple=True, help="Main experts; all numbers by default.")
@threads_flag
@click.option("--smoke", "is_smoke", is_flag=True, help="Seconds only: shows that the bench works, measures nothing.")
def main(
    checkpoint: Path | None,
    fits: tuple[str, ...],
    texts: tuple[str, ...],
    tokens: int,
    windows: int,
    mains: tuple[int, ...],
    threads: int | None,
    is_smoke: bool,
) -> None:
    """Measure what compressed experts win back."""
    console, found = Console(stderr=True), list[Row]()
    torch.set_num_threads(threads or default_threads())
    try:
        with tempfile.TemporaryDirectory(prefix="slimoe-compressed-") as name:
            if is_smoke:
                source, fit, cut = smoke(Path(name))
            elif checkpoint is None or not fits or not texts:
                raise UsageError("Name --checkpoint, at least one --fit and one --text, or --smoke.")
            else:
                source = open_source(checkpoint)
                with closing(TokenizerEncoder(source.path, source.metadata)) as encoder:
                    fit = read_texts([TextFile.parse(one) for one in fits], encoder, tokens, 512).tokens
                cut = cut_windows(read_windows(source, texts, windows))
            if max(mains, default=1) >= source.spec.n_expert_used:
                raise UsageError(f"--main is {max(mains)}, but a token selects {source.spec.n_expert_used} experts.")
            for row in rows(source, fit, cut, mains):
                found.append(row)
                console.print(
                    f"{row['n_main']} main experts: {row['active']:,} active weights, KL {row['kl_plain']:.5f} plain, "
                    f"{row['kl']:.5f} with vectors, {row['closed']:.0%} closed",
                    markup=False,
                )
            about = {"n_active_before": active_weights(source), "texts": list(texts), "n_windows": windows}
    except SlimoeError as error:
        console.print(str(error), markup=False)
        sys.exit(error.exit_code)
    print(json.dumps({"rows": found, **about, "machine": machine.describe()}))


if __name__ == "__main__":
    main()
