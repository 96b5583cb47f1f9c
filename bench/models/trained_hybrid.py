"""Trains a small hybrid, a mixture of experts with recurrent layers, with transformers: there is none to be had else.

What quantising costs shows on trained weights alone. The sizes are such that all rows are multiples of 256, which K
types need. Some hundred steps, minutes on a core, bring the loss well below that of the frequencies of tokens.

    python -m bench.models.trained_hybrid OUT --family qwen3_5_moe --tokenizer CHECKPOINT --text news.txt --steps 1000
"""

import json
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import transformers

from bench.models.random_checkpoint import write_random_checkpoint
from bench.models.shapes import SHAPES
from slimoe.converter.source.open_source import open_source
from slimoe.server.chat.text_encoder import TokenizerEncoder

_ALL = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_DELTA_NET = {
    "num_hidden_layers": 4,
    "full_attention_interval": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "head_dim": 64,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "router_aux_loss_coef": 0.01,
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_5_moe": (
        "Qwen3_5MoeTextConfig",
        "Qwen3_5MoeForCausalLM",
        _DELTA_NET
        | {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e5,
                "partial_rotary_factor": 0.25,
                "mrope_section": [3, 3, 2],
                "mrope_interleaved": True,
            }
        },
    ),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        "Lfm2MoeForCausalLM",
        {
            "num_hidden_layers": 4,
            "layer_types": ["conv", "conv", "full_attention", "conv"],
            "num_dense_layers": 1,
            "intermediate_size": 512,
            "moe_intermediate_size": 256,
            "num_experts": 16,
            "num_experts_per_tok": 2,
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        {
            "num_hidden_layers": 4,
            "layer_types": ["mamba", "mamba", "attention", "mamba"],
            "intermediate_size": 256,
            "shared_intermediate_size": 256,
            "num_local_experts": 16,
            "num_experts_per_tok": 2,
            "mamba_n_heads": 8,
            "mamba_d_head": 64,
            "mamba_d_state": 64,
            "mamba_n_groups": 1,
            "position_embedding_type": "nope",
            "attention_multiplier": 0.125,
            "router_aux_loss_coef": 0.01,
        },
    ),
}
"""By name: the classes of transformers, and what their configurations say."""
_LENGTH, _SEQUENCES, _WARM_UP = 256, 2, 40


def token_ids(tokenizer: Path, texts: Sequence[Path]) -> np.ndarray:
    """The tokens of texts, one behind the other."""
    source = open_source(tokenizer)
    with closing(TokenizerEncoder(source.path, source.metadata)) as encoder:
        return np.concatenate([encoder.text(text.read_text("utf-8"), at_start=True) for text in texts])


def train(family: str, tokens: np.ndarray, n_vocab: int, steps: int, seed: int = 0) -> tuple[torch.nn.Module, float]:
    """A model trained on random pieces of the tokens, and its mean loss in the last twentieth of the steps."""
    torch.manual_seed(seed)
    config_class, model_class, settings = FAMILIES[family]
    config = getattr(transformers, config_class)(vocab_size=n_vocab, **_ALL | settings)
    model = getattr(transformers, model_class)(config).train()
    with_aux = {"output_router_logits": True} if "router_aux_loss_coef" in settings else {}
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05)
    rng, losses, began = np.random.default_rng(seed), [], time.monotonic()
    for step in range(steps):
        rate = 2e-3 * min((step + 1) / _WARM_UP, 0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        starts = rng.integers(0, len(tokens) - _LENGTH, _SEQUENCES)
        ids = torch.from_numpy(np.stack([tokens[start : start + _LENGTH] for start in starts]))
        found = model(input_ids=ids, labels=ids, use_cache=False, **with_aux)
        found.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(found.loss.detach()) - 0.01 * float(found.aux_loss.detach() if with_aux else 0.0))
        if step % 20 == 19:
            spent = time.monotonic() - began
            click.echo(f"{step + 1} of {steps}: loss {np.mean(losses[-20:]):.3f}, {spent:.0f} s", err=True)
    return model, float(np.mean(losses[-max(1, steps // 20) :]))


@click.command()
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option("--family", type=click.Choice(list(FAMILIES)), default="qwen3_5_moe", show_default=True)
@click.option("--tokenizer", type=click.Path(path_type=Path), help="A checkpoint whose tokenizer it gets.")
@click.option("--text", "texts", type=click.Path(path_type=Path), multiple=True, help="To train on.")
@click.option("--steps", type=click.IntRange(1), default=1000, show_default=True, help="Of 512 tokens each.")
@click.option("--smoke", is_flag=True, help="Seconds only: shows that it works.")
def main(
    out: Path | None, family: str, tokenizer: Path | None, texts: tuple[Path, ...], steps: int, smoke: bool
) -> None:
    """Train a small hybrid and save it to OUT."""
    with tempfile.TemporaryDirectory(prefix="slimoe-hybrid-") as name:
        if smoke:
            out, tokenizer, steps, texts = Path(name, "out"), Path(name, "tokenizer"), 1, (Path(__file__),)
            write_random_checkpoint(tokenizer, SHAPES["smoke"])
        if out is None or tokenizer is None or not texts:
            raise click.UsageError("Name OUT, --tokenizer and at least one --text, or --smoke.")
        tokens, n_vocab = token_ids(tokenizer, texts), open_source(tokenizer).spec.n_vocab
        model, loss = train(family, tokens, n_vocab, steps)
        model.save_pretrained(out)
        for path in tokenizer.glob("tokenizer*"):
            shutil.copy(path, out)
    shares = np.bincount(tokens) / len(tokens)
    unigram = -float((shares * np.log(np.where(shares > 0, shares, 1))).sum())
    print(json.dumps({"family": family, "tokens": len(tokens), "steps": steps, "loss": loss, "unigram_loss": unigram}))


if __name__ == "__main__":
    main()
