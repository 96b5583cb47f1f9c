"""Small random checkpoints, built and saved by transformers, with a sentencepiece tokenizer and a chat template."""

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import numpy as np
import sentencepiece
import tokenizers
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from slimoe.converter.source.tokenizer.check import HARD_TEXTS
from tests.models.tiny_gguf import MIXTRAL_TEMPLATE

_WORDS = """
the quick brown fox jumps over a lazy dog </s </span> </script> <s <un <sub> [INST] tell me [/INST] def return import
self value key list tuple 1234 567 hello world naïve café über 日本語 文章 привет while for if else (x) {y} a[i]
"""


@dataclass(frozen=True, slots=True)
class TinyConfig:
    """Sizes that no real model has; K-quants need `n_embd` and `n_ff` to be multiples of 256."""

    n_layer: int = 2
    n_embd: int = 64
    n_ff: int = 96
    n_head: int = 4
    n_head_kv: int = 2
    n_vocab: int = 520
    n_expert: int = 6
    n_expert_used: int = 3


K_QUANT_SIZES = TinyConfig(n_layer=3, n_embd=256, n_ff=512, n_head=8, n_head_kv=4)


def save_checkpoint(
    path: Path, tokenizer: Path, sizes: TinyConfig, dtype: torch.dtype = torch.float32, **config: object
) -> Path:
    """Saves a Mixtral, or a Mistral when there are no experts; `config` is passed to the configuration."""
    torch.manual_seed(1234)
    values = {
        "hidden_size": sizes.n_embd,
        "intermediate_size": sizes.n_ff,
        "num_hidden_layers": sizes.n_layer,
        "num_attention_heads": sizes.n_head,
        "num_key_value_heads": sizes.n_head_kv,
        "vocab_size": sizes.n_vocab,
        "max_position_embeddings": 128,
        "sliding_window": None,
        "initializer_range": 0.2,
    }
    model: transformers.PreTrainedModel
    if sizes.n_expert:
        values |= {"num_local_experts": sizes.n_expert, "num_experts_per_tok": sizes.n_expert_used}
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**values | config))
    elif "rope_parameters" in config:
        values.pop("sliding_window")
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values | config))
    else:
        model = transformers.MistralForCausalLM(transformers.MistralConfig(**values | config))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.to(dtype).save_pretrained(path)
    add_tokenizer(path, tokenizer)
    return path


def add_tokenizer(path: Path, tokenizer: Path) -> None:
    """The tokenizer's files as a Mixtral repository has them."""
    shutil.copy(tokenizer, path / "tokenizer.model")
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>", "add_bos_token": True}
    settings |= {"add_eos_token": False, "chat_template": MIXTRAL_TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


def logits(path: Path, tokens: list[int]) -> torch.Tensor:
    """transformers' logits [n_tokens, n_vocab] in float32."""
    # By its name, since AutoModelForCausalLM does not know all classes.
    name, *_ = json.loads((path / "config.json").read_text())["architectures"]
    model = getattr(transformers, name).from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        result: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return result


def llama_logits(path: Path, tokens: list[int]) -> NDArray[np.float32]:
    """libllama's logits [n_tokens, n_vocab] of a GGUF file, with keys and values in F32."""
    model = llama_cpp.Llama(str(path), logits_all=True, verbose=False, n_threads=1, n_ctx=64, type_k=0, type_v=0)
    model.eval(tokens)
    scores = np.array(model.scores[: len(tokens)])
    model.close()
    return scores


def stack_experts(path: Path) -> None:
    """Rewrites a checkpoint to the layout that newer transformers keep in memory: all experts in two tensors."""
    tensors = load_file(path / "model.safetensors")
    stacked = {name: value for name, value in tensors.items() if ".experts." not in name}
    layers = sorted({name.split(".experts.")[0] for name in tensors if ".experts." in name})
    for layer in layers:
        names = ("w1", "w3", "w2") if "block_sparse_moe" in layer else ("gate_proj", "up_proj", "down_proj")
        gate, up, down = ([tensors[n] for n in _in_order(tensors, layer, w)] for w in names)
        gates_ups = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
        stacked[f"{layer}.experts.gate_up_proj"] = torch.stack(gates_ups)
        stacked[f"{layer}.experts.down_proj"] = torch.stack(down)
    renamed = {name.replace("block_sparse_moe", "mlp"): value.contiguous() for name, value in stacked.items()}
    save_file(renamed, path / "model.safetensors")


def _in_order(tensors: dict[str, torch.Tensor], layer: str, w: str) -> list[str]:
    names = [name for name in tensors if name.startswith(f"{layer}.experts.") and name.endswith(f".{w}.weight")]
    return sorted(names, key=lambda name: int(name.split(".experts.")[1].split(".")[0]))


QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
FINE = ("qwen3moe", "olmoe")
"""Architectures of many small experts, whose checkpoints `save_fine` makes."""


def save_fine(path: Path, name: str, sizes: TinyConfig, **config: object) -> Path:
    """Saves a Qwen3-MoE, whose heads are larger than n_embd / n_head, or an OLMoE, with a tokenizer of its kind."""
    torch.manual_seed(1234)
    values: dict[str, object] = {
        "hidden_size": sizes.n_embd,
        "num_hidden_layers": sizes.n_layer,
        "num_attention_heads": sizes.n_head,
        "vocab_size": sizes.n_vocab,
        "max_position_embeddings": 512,
        "initializer_range": 2 * sizes.n_embd**-0.5,
        "num_experts": sizes.n_expert,
        "num_experts_per_tok": sizes.n_expert_used,
    }
    if name == "qwen3moe":
        values |= {"num_key_value_heads": sizes.n_head_kv, "head_dim": 2 * sizes.n_embd // sizes.n_head}
        values |= {"moe_intermediate_size": sizes.n_ff, "intermediate_size": 3 * sizes.n_ff, "norm_topk_prob": True}
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**values | config))
    else:
        values |= {"intermediate_size": sizes.n_ff, "eos_token_id": 257, "pad_token_id": 256}
        model = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**values | config))
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(path)
    byte_level(name).save(str(path / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>" if name == "qwen3moe" else "<|endoftext|>", "chat_template": CHATML}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def byte_level(name: str) -> tokenizers.Tokenizer:
    """A byte-level tokenizer with steps and added tokens as Qwen's, or as OLMo's."""
    reference = tokenizers.Tokenizer(models.BPE())
    reference.normalizer = normalizers.NFC()
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name == "olmoe")
    split = pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), "isolated")
    reference.pre_tokenizer = bytes_ if name == "olmoe" else pre_tokenizers.Sequence([split, bytes_])
    reference.post_processor = processors.ByteLevel(trim_offsets=False)
    reference.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    reference.train_from_iterator(HARD_TEXTS * 3, trainer)
    if name == "olmoe":
        reference.add_tokens([tokenizers.AddedToken(" " * n, normalized=True) for n in (8, 4, 2)])
        reference.add_special_tokens(["<|endoftext|>", "<|padding|>", "<|im_start|>", "<|im_end|>"])
    else:
        reference.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        reference.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    return reference


def _training_lines() -> list[str]:
    """Text in which the spellings of special tokens are frequent, so that merges could build them."""
    lines = []
    vocabulary = _WORDS.split()
    for n in range(400):
        words = [vocabulary[(n * 7 + k * (n % 5 + 1)) % len(vocabulary)] for k in range(12)]
        lines.append(" ".join(words) + "</s" * (n % 3) + " " * (n % 4) + "<un <s")
    return lines


def train_sentencepiece(path: Path, *, byte_fallback: bool = True, user_symbols: tuple[str, ...] = ()) -> Path:
    """Trains a BPE tokenizer of the kind that Llama and Mixtral carry."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_training_lines()),
        model_writer=model,
        vocab_size=512 if byte_fallback else 256,
        model_type="bpe",
        byte_fallback=byte_fallback,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        split_by_unicode_script=False,
        character_coverage=0.9995,
        user_defined_symbols=list(user_symbols),
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path
