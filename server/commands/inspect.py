"""`slimoe inspect`: what a model file or checkpoint holds."""

from pathlib import Path
from typing import Any

import click
import msgspec

from slimoe.converter.source.inventory import Inventory, take_inventory
from slimoe.offload.printable import printable
from slimoe.server.options.hub_cache import ModelPath

_MAX_CHARS = 1000
"""Of a value: a file may hold a text of any length where a number belongs."""


@click.command("inspect")
@click.argument("model", type=ModelPath())
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def command(model: Path, as_json: bool) -> None:
    """Show what MODEL holds: sizes, types, bytes by kind, tokenizer, origin.

    MODEL is a GGUF file of any architecture (for shards, the first one) or a Hugging Face checkpoint directory. Only
    headers are read.
    """
    inventory = take_inventory(model)
    if as_json:
        fields = {
            "path": str(inventory.path),
            "format": inventory.format,
            "architecture": inventory.architecture,
            "name": inventory.name,
            "sizes": inventory.sizes,
            "n_weights": inventory.n_weights,
            "n_bytes": inventory.n_bytes,
            "bits_per_weight": round(inventory.bits_per_weight, 4),
            "tensors": [msgspec.to_builtins(count) for count in inventory.counts],
            "experts": inventory.experts,
            "routing": inventory.routing,
            "tokenizer": inventory.tokenizer,
            "provenance": inventory.provenance,
            "note": inventory.note,
        }
        click.echo(msgspec.json.encode(fields))
        return
    for line in _lines(inventory):
        click.echo(printable(line))


def _lines(inventory: Inventory) -> list[str]:
    sizes = "  ".join(f"{name} {_shown(value)}" for name, value in inventory.sizes.items())
    bits = f"{inventory.bits_per_weight:.2f} bits each"
    lines = [
        f"{_shown(inventory.name)}: {inventory.format}, architecture {_shown(inventory.architecture)}",
        f"sizes       {sizes}",
        f"weights     {inventory.n_weights:,} in {inventory.n_bytes:,} bytes, {bits}",
        "",
        f"{'kind':<16}{'type':<8}{'tensors':>8}{'weights':>18}{'bytes':>18}{'bits':>7}",
    ]
    lines += [
        f"{c.kind:<16}{c.type:<8}{c.n_tensors:>8}{c.n_weights:>18,}{c.n_bytes:>18,}{c.bits_per_weight:>7.2f}"
        for c in inventory.counts
    ]
    tokenizer = "  ".join(f"{name} {_shown(value)}" for name, value in inventory.tokenizer.items())
    experts = "  ".join(f"{name} {_shown(value)}" for name, value in inventory.experts.items())
    # In text only what is there is of interest.
    routing = "  ".join(f"{name} {_shown(value)}" for name, value in inventory.routing.items() if value)
    origin = [line for name, value in inventory.provenance.items() for line in _origin(name, _shown(value))]
    lines += ["", *([f"experts     {experts}"] if experts else []), *([f"routing     {routing}"] if routing else [])]
    lines.append(f"tokenizer   {tokenizer or 'none'}")
    heads = ("origin      ", *(" " * 12 for _ in origin))
    lines += [f"{head}{line}" for head, line in zip(heads, origin or ["not recorded"], strict=False)]
    return [*lines, f"note        {inventory.note}"] if inventory.note else lines


def _origin(name: str, value: str) -> list[str]:
    """A line, and below it those of a text that has several, such as a recipe, or of the fields of a JSON object."""
    try:
        fields = msgspec.json.decode(value, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        fields = {}
    inner = [
        f"{key} {one if isinstance(one, str) else msgspec.json.encode(one).decode()}" for key, one in fields.items()
    ] or value.strip().split("\n")
    return [f"{name} {value}"] if inner == [value.strip()] else [name, *(f"  {line}" for line in inner if line)]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]}…"
