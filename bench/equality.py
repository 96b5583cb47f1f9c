"""Does the engine compute what others compute? Logits next to transformers' and, for every type, to llama.cpp's.

The checkpoint is converted to F32 and compared with transformers: the largest difference of a logit, and greedy
tokens. Then it is converted to each type, and the distributions of our engine and of llama.cpp, on the same file, are
compared over a text: tokens read in batches with weights as they are, and one by one with weights repacked. The table
goes to stderr, the last line of stdout is one JSON document. Divergences are in nats. All files are deleted.

    python -m bench.equality --checkpoint ~/models/Mixtral-8x7B --text article.txt
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

from bench.baselines.llama_cpp import LlamaCpp, LlamaCppConfig
from bench.baselines.stepping import kl_divergence, random_tokens
from bench.limits.flags import threads_flag
from bench.models.random_checkpoint import write_random_checkpoint
from bench.models.shapes import SHAPES
from slimoe.converter.convert import ConvertOptions, convert
from slimoe.converter.quant.mixes import FOR_IMPORTANCE, RECIPES
from slimoe.offload.engine import Engine
from slimoe.offload.errors import SlimoeError, UsageError
from slimoe.offload.plan.engine_config import ContextConfig, EngineConfig, MemoryConfig
from slimoe.offload.resources.processors import default_threads

PROMPTS = ("The river", "In the beginning", "def read(path):", "function add(a, b) {", "[INST] Define a noun. [/INST]")
SMOKE_TYPES = ("F32", "Q8_0", "Q4_K_M")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is compared: `text` is a file or None for random tokens, of which there are `n_tokens`."""

    checkpoint: Path
    directory: Path
    prompts: tuple[str, ...]
    text: Path | None
    types: tuple[str, ...]
    n_tokens: int
    n_greedy: int
    n_threads: int

    def converted(self, kind: str) -> Path:
        """The checkpoint as a file of that type, written over the one before."""
        target = self.directory / "model.gguf"
        return convert(ConvertOptions(self.checkpoint, target, kind, self.n_threads, force=True)).path


def score(engine: Engine, tokens: Sequence[int]) -> np.ndarray:
    """Reads tokens in batches; logits (len(tokens), n_vocab) of all of them."""
    step = engine.plan.n_batch
    batches = [tokens[begin : begin + step] for begin in range(0, len(tokens), step)]
    return np.concatenate([engine.read(batch, len(batch)).copy() for batch in batches])


def score_singly(engine: Engine, tokens: Sequence[int]) -> np.ndarray:
    """Reads tokens one by one; logits (len(tokens), n_vocab)."""
    return np.stack([engine.decode(token).copy() for token in tokens])


def greedy(engine: Engine, prompt: Sequence[int], n_tokens: int) -> list[int]:
    """The `n_tokens` that greedy decoding finds after a prompt, whether or not one of them ends a text."""
    engine.truncate(0)
    tokens = [int(engine.prefill(prompt).argmax())]
    while len(tokens) < n_tokens:
        tokens.append(int(engine.decode(tokens[-1]).argmax()))
    return tokens


def text_tokens(plan: Plan, engine: Engine) -> list[int]:
    """The tokens to compare on: of the text, or random ones where there is none."""
    if plan.text is None or engine.tokenizer is None:
        return random_tokens(plan.n_tokens, engine.spec.n_vocab)
    return engine.tokenizer.encode(plan.text.read_text("utf-8"), add_bos=True)[: plan.n_tokens]


def compare_with_transformers(plan: Plan) -> dict[str, Any]:
    """Compares the F32 file with an F32 cache to transformers in float32: logits, and greedy tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(plan.checkpoint, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    n_ctx = max(plan.n_tokens, 64 + plan.n_greedy)
    config = EngineConfig(
        plan.converted("F32"), n_threads=plan.n_threads, context=ContextConfig(n_ctx=n_ctx, kv_type="f32")
    )
    with closing(Engine.open(config)) as engine, torch.no_grad():
        tokens = text_tokens(plan, engine)
        expected = model(torch.tensor([tokens])).logits[0].numpy()
        difference = float(abs(score(engine, tokens) - expected).max())
        equal = []
        for prompt in prompt_tokens(plan, engine):
            length = {"max_new_tokens": plan.n_greedy, "min_new_tokens": plan.n_greedy}
            theirs = model.generate(torch.tensor([prompt]), do_sample=False, **length)[0, len(prompt) :].tolist()
            ours = greedy(engine, prompt, plan.n_greedy)
            pairs = list(zip(ours, theirs, strict=True))
            equal.append(next((n for n, (our, their) in enumerate(pairs) if our != their), len(pairs)))
    return {"max_logit_difference": difference, "greedy_tokens_equal": min(equal), "greedy_tokens": plan.n_greedy}


def prompt_tokens(plan: Plan, engine: Engine) -> list[list[int]]:
    """The prompts' tokens; random ones where the tokenizer cannot spell them."""
    if plan.text is None or engine.tokenizer is None:
        return [random_tokens(8, engine.spec.n_vocab, seed) for seed in range(2)]
    return [engine.tokenizer.encode(prompt, add_bos=True) for prompt in plan.prompts]


def compare_with_llamacpp(plan: Plan, kind: str) -> dict[str, float]:
    """The KL divergences of our distributions from llama.cpp's on the same file, over the tokens."""
    path = plan.converted(kind)
    n_ctx = -(-plan.n_tokens // 256) * 256
    config = EngineConfig(
        path, n_threads=plan.n_threads, context=ContextConfig(n_ctx=n_ctx), memory=MemoryConfig(weights="both")
    )
    with closing(Engine.open(config)) as engine:
        tokens = text_tokens(plan, engine)
        batched = score(engine, tokens)
        engine.truncate(0)
        single = score_singly(engine, tokens)
        repacked = engine.plan.weight_forms.repacked
    reference = baseline_scores(plan, path, tokens, repack=False)
    figures = divergence("", batched, reference["batched"])
    figures |= divergence("single_", single, baseline_scores(plan, path, tokens, repack=True)["single"])
    figures |= divergence("llamacpp_itself_", reference["single"], reference["batched"])
    return figures | {"repacked_bytes": repacked}


def baseline_scores(plan: Plan, path: Path, tokens: Sequence[int], *, repack: bool) -> dict[str, np.ndarray]:
    """llama.cpp's logits, read in batches and read one by one."""
    n_ctx = -(-plan.n_tokens // 256) * 256
    with closing(LlamaCpp(LlamaCppConfig(path, n_ctx, plan.n_threads, extra_buffers=repack))) as baseline:
        batched = baseline.score(tokens)
        baseline.truncate(0)
        return {"batched": batched, "single": np.concatenate([baseline.score([token]) for token in tokens])}


def divergence(name: str, logits: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """The mean and the largest KL divergence over the rows; one that rounding made negative counts as 0."""
    each = [max(0.0, kl_divergence(ours, theirs)) for ours, theirs in zip(logits, reference, strict=True)]
    return {f"{name}mean": float(np.mean(each)), f"{name}max": max(each)}


def table(by_type: dict[str, dict[str, float]]) -> Table:
    """The divergences, for a person."""
    columns = ("mean", "max", "single_mean", "single_max", "llamacpp_itself_mean", "llamacpp_itself_max")
    drawn = Table("type", *columns, title="KL of ours from llama.cpp's")
    for kind, figures in by_type.items():
        drawn.add_row(kind, *(f"{figures[column]:.1e}" for column in columns))
    return drawn


def measure(plan: Plan, console: Console) -> dict[str, Any]:
    """Carries out all comparisons; returns their figures as one document."""
    document = compare_with_transformers(plan)
    console.print(
        f"transformers, F32: logits differ by at most {document['max_logit_difference']:.1e}; "
        f"{document['greedy_tokens_equal']} of {plan.n_greedy} greedy tokens are equal"
    )
    by_type = {}
    for kind in plan.types:
        console.print(f"{kind} ...")
        by_type[kind] = compare_with_llamacpp(plan, kind)
    console.print(table(by_type))
    return document | {"kl_by_type": by_type, "tokens": plan.n_tokens}


def smallest_plan(directory: Path) -> Plan:
    """A comparison of a random checkpoint in a few seconds."""
    checkpoint = directory / "checkpoint"
    write_random_checkpoint(checkpoint, SHAPES["smoke"])
    return Plan(checkpoint, directory, (), None, SMOKE_TYPES, n_tokens=16, n_greedy=8, n_threads=1)


@click.command()
@click.option("--checkpoint", type=click.Path(path_type=Path), help="A Hugging Face Mixtral, Mistral or Llama.")
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="[default: random tokens]")
@click.option("--prompt", "prompts", multiple=True, help="Begins greedy tokens; may be given several times.")
@threads_flag
@click.option("--smoke", is_flag=True, help="Seconds only, on a tiny random checkpoint.")
def main(
    checkpoint: Path | None, text: Path | None, prompts: tuple[str, ...], threads: int | None, smoke: bool
) -> None:
    """Compare the engine with transformers and llama.cpp."""
    n_threads = threads or default_threads()
    torch.set_num_threads(n_threads)
    try:
        with tempfile.TemporaryDirectory(prefix="slimoe-equality-") as name:
            directory = Path(name)
            if smoke:
                plan = smallest_plan(directory)
            elif checkpoint is not None:
                types = tuple(name for name in RECIPES if name not in FOR_IMPORTANCE)
                plan = Plan(checkpoint, directory, prompts or PROMPTS, text, types, 512, 256, n_threads)
            else:
                raise UsageError("Name a --checkpoint, or use --smoke.")
            document = measure(plan, Console(stderr=True))
    except SlimoeError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
