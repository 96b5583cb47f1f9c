"""Writes an OLMoE checkpoint whose key and value heads are as many as its query heads, and which computes the same.

llama.cpp loads no other OLMoE. Query heads that share a head of keys get a copy of it each, which changes no value: the
norm of keys spans all heads, and the mean of their squares stays what it was.

    python -m bench.models.equal_heads ~/models/olmoe /tmp/olmoe
"""

import json
import shutil
from pathlib import Path

import click
import torch
from safetensors.torch import load_file, save_file

_HEADS = ("k_proj.weight", "v_proj.weight", "k_norm.weight")


def write_equal_heads(source: Path, target: Path) -> None:
    """Copies a checkpoint of one safetensors file to the directory `target`, its heads of keys and values repeated."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((source / "config.json").read_text("utf-8"))
    n_head, n_head_kv = config["num_attention_heads"], config["num_key_value_heads"]
    tensors = {
        name: repeated(values, n_head_kv, n_head // n_head_kv) if name.endswith(_HEADS) else values
        for name, values in load_file(source / "model.safetensors").items()
    }
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").chmod(0o644)
    (target / "config.json").write_text(json.dumps(config | {"num_key_value_heads": n_head}, indent=2), "utf-8")


def repeated(values: torch.Tensor, n_heads: int, n_times: int) -> torch.Tensor:
    """Each of the heads, which follow each other in the first dimension, `n_times`."""
    heads = values.unflatten(0, (n_heads, -1))
    return heads.repeat_interleave(n_times, 0).flatten(0, 1).contiguous()


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("target", type=click.Path(path_type=Path))
def main(source: Path, target: Path) -> None:
    """Write SOURCE with equal heads to TARGET."""
    write_equal_heads(source, target)


if __name__ == "__main__":
    main()
