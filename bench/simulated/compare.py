"""Ways of using a device for experts, on simulated machines: static placement, caches that upload, ours, an oracle.

A grid of links, hosts, devices and models; the engine decides by its own classes with the seconds that it would have
measured there, other engines' caches are played as their sources have them, and all take their time from the same
machine (`bench.simulated.machine`). Tokens of answers one by one; prompts are not played. Draws OUT/simulated-grid.svg;
the last line of stdout is one JSON document.
"""

import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import click

from bench.simulated.grid import (
    DEVICES,
    HOSTS,
    LINKS,
    MODELS,
    TINY,
    Cell,
    Part,
    Scale,
    as_large_as_mixtral,
    cells,
    parts,
)
from bench.simulated.report import as_json, picture, table
from bench.simulated.routing import recorded
from slimoe.offload.cache.router_trace import read_trace
from slimoe.offload.errors import SlimoeError

_SMOKE = Scale(n_warm=160, n_counted=160)


def _of_recorded(traces: Sequence[Path], priors: Path) -> list[Part]:
    scale = Scale()
    try:
        routing = recorded([read_trace(path) for path in traces], read_trace(priors))
    except SlimoeError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    if len(routing.selected) <= scale.n_warm:
        raise click.UsageError(f"Record more than {scale.n_warm} tokens: the first ones only warm caches up.")
    return parts((as_large_as_mixtral(priors.stem, routing),), list(DEVICES), list(HOSTS), list(LINKS), scale)


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Where to write the picture.")
@click.option(
    "--model", "names", multiple=True, type=click.Choice([model.name for model in MODELS]), help="Only these."
)
@click.option("--trace", "traces", multiple=True, type=click.Path(path_type=Path), help="A text's recorded routing.")
@click.option("--priors", type=click.Path(path_type=Path), help="A trace of other text, as calibration for --trace.")
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Of the made-up routing.")
@click.option("--tokens", type=click.IntRange(1), default=Scale().n_counted, show_default=True, help="That count.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Processes.")
@click.option("--smoke", is_flag=True, help="Seconds only, a tiny model.")
def main(
    out: Path | None,
    names: tuple[str, ...],
    traces: tuple[Path, ...],
    priors: Path | None,
    seed: int,
    tokens: int,
    jobs: int,
    smoke: bool,
) -> None:
    """Compare ways of using a device on simulated machines."""
    if bool(traces) != (priors is not None):
        raise click.UsageError("Name both --trace and --priors.")
    if priors is not None:
        grid = _of_recorded(traces, priors)
    elif smoke:
        grid = parts((TINY,), list(DEVICES)[:1], list(HOSTS), list(LINKS), _SMOKE)
    else:
        models = [model for model in MODELS if not names or model.name in names]
        grid = parts(models, list(DEVICES), list(HOSTS), list(LINKS), Scale(n_counted=tokens, seed=seed))
    done, begin = list[Cell](), time.monotonic()
    with ExitStack() as opened:
        several = opened.enter_context(ProcessPoolExecutor(jobs)) if jobs > 1 else None
        for part, found in zip(grid, (several.map if several else map)(cells, grid), strict=True):
            done += found
            place = f"{part.model.name}, {part.habits}, {part.device}"
            print(f"{time.monotonic() - begin:6.0f} s  {place}", file=sys.stderr, flush=True)
    print(table(done), file=sys.stderr)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "simulated-grid.svg").write_bytes(picture(done))
    print(json.dumps(as_json(done)))


if __name__ == "__main__":
    main()
