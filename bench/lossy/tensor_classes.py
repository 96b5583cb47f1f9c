"""What each kind of tensor loses alone: one in a type, all others in float32, by KL divergence on texts.

Kinds are the middles of names in GGUF files, such as ssm_out, over all layers. Weights are fitted to the statistics'
importance, as `slimoe convert --stats` does. Beside what was measured stands what the statistics foretell, by which
types are chosen for a size. `bits_more` is the answer to how many bits a kind's weights should have beyond the mean of
all for the same bytes: half the logarithm to base 2 of its loss per byte over that of all kinds, as each further bit
quarters a loss. Progress goes to stderr, the last line of stdout is one JSON document.

    python -m bench.lossy.tensor_classes --checkpoint ~/qwen --stats STATS --text news=news.txt --type Q4_K
"""

import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from bench.limits import machine
from bench.quality.lab import Lab
from bench.quality.lab_flags import LabFlags, lab_flags
from bench.quality.smoke_model import smoke_model
from slimoe.converter.quant.gain import gain_of, has_scales
from slimoe.converter.quant.mixes import fits, layer_and_role
from slimoe.converter.quant.quantize import dequantize_rows, quantize_rows
from slimoe.converter.report.quality import summarise
from slimoe.converter.source.held_source import FittedSource, HeldSource
from slimoe.converter.source.model_source import MatrixKey
from slimoe.converter.stats.type_costs import matrix_weights, priced_matrices, statistics_costs
from slimoe.offload.errors import SlimoeError

TYPES = ("Q4_K", "Q5_K", "Q6_K", "Q8_0")


def kinds_of(lab: Lab) -> dict[str, list[MatrixKey]]:
    """The matrices that have a type, by their kind."""
    kinds: dict[str, list[MatrixKey]] = {}
    for key in priced_matrices(lab.source):
        kinds.setdefault(layer_and_role(key.name)[1], []).append(key)
    return kinds


def requantised(lab: Lab, source: HeldSource, key: MatrixKey, kind: Type) -> np.ndarray:
    """The values of a matrix as blocks of the type have them, without their gain."""
    values, weights = source.read(key), matrix_weights(lab.source, lab.statistics, key)
    columns = np.atleast_2d(weights.columns)
    parts = np.split(values.reshape(-1, values.shape[-1]), len(columns))
    found = []
    for part, column in zip(parts, columns, strict=True):
        blocks = dequantize_rows(quantize_rows(part, kind, column), kind, part.shape[1])
        gain = gain_of(part, blocks, np.broadcast_to(column, part.shape)) if has_scales(kind) else 1.0
        found.append(blocks / np.float32(gain))
    return np.concatenate(found)


def measure(lab: Lab, types: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A row for each kind: its weights, and for each type that fits its rows the divergence, also as foretold."""
    held, rows = HeldSource(lab.source), dict[str, dict[str, Any]]()
    costs = statistics_costs(lab.source, lab.statistics, types, lab.n_threads, lambda _what, _done, _total: None)
    for name, keys in kinds_of(lab).items():
        n_weights = sum(math.prod(lab.source.shapes[key]) for key in keys)
        rows[name] = {"weights": n_weights, "kl": {}, "foretold": {}}
        for kind in types:
            if all(fits(Type[kind], lab.source.shapes[key][-1]) for key in keys):
                rows[name]["kl"][kind] = _divergence(lab, held, keys, Type[kind])
                rows[name]["foretold"][kind] = sum(costs.of(key, Type[kind]) for key in keys)
        told = "  ".join(f"{kind} {kl:.6f}" for kind, kl in rows[name]["kl"].items())
        click.echo(f"{name:<20} {n_weights:>12,} weights  {told}", err=True)
    return rows


def _divergence(lab: Lab, held: HeldSource, keys: Sequence[MatrixKey], kind: Type) -> float:
    changed = FittedSource(held)
    with ThreadPoolExecutor(lab.n_threads) as pool:
        for key, values in zip(keys, pool.map(lambda one: requantised(lab, held, one, kind), keys), strict=True):
            changed.replace(key, values)
    return summarise(lab.reference.compare(changed)).total.divergence.mean


def with_bits(rows: Mapping[str, Mapping[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    """The rows with what was measured over what was foretold of a type, and the bits that a kind is worth beyond the
    mean.
    """
    known = {name: row for name, row in rows.items() if row["kl"].get(kind, 0.0) > 0}
    mean = sum(row["kl"][kind] for row in known.values()) / sum(row["weights"] for row in known.values())
    more = {name: 0.5 * math.log2(row["kl"][kind] / row["weights"] / mean) for name, row in known.items()}
    ratios = {name: row["kl"][kind] / row["foretold"][kind] for name, row in known.items() if row["foretold"][kind]}
    return {
        name: dict(row) | {"bits_more": more.get(name), "kl_over_foretold": ratios.get(name)}
        for name, row in rows.items()
    }


def _table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    order = sorted(rows.items(), key=lambda item: -(item[1]["bits_more"] or -99.0))
    lines = [
        f"{name:<20} {100 * row['weights'] / sum(one['weights'] for one in rows.values()):>5.1f} %"
        f"  {row['bits_more'] or 0.0:>+5.2f} bits  {row['kl_over_foretold'] or 0.0:>6.2f} of what was foretold"
        for name, row in order
    ]
    return "\n".join(lines)


@click.command()
@lab_flags(4)
@click.option("--type", "types", multiple=True, default=TYPES, show_default=True, help="The first one tells the bits.")
def main(types: tuple[str, ...]) -> None:
    """Measure what each kind of tensor loses alone."""
    flags = LabFlags.told()
    for name in types:
        if name not in Type.__members__ or GGML_QUANT_SIZES[Type[name]][0] == 1:
            raise click.UsageError(f"--type {name} is no type that weights are quantised to.")
    try:
        with tempfile.TemporaryDirectory(prefix="slimoe-classes-") as name:
            if flags.is_smoke:
                path, types = Path(name) / "checkpoint", ("Q4_K", "Q8_0")
                lab = Lab(path, *smoke_model(path), Path(name), 1)
            else:
                lab = flags.lab(Path(name))
            rows = with_bits(measure(lab, types), types[0])
            lab.reference.close()
    except SlimoeError as error:
        click.echo(str(error), err=True)
        sys.exit(error.exit_code)
    click.echo(_table(rows), err=True)
    print(json.dumps({"type": types[0], "kinds": rows, "machine": machine.describe()}))


if __name__ == "__main__":
    main()
