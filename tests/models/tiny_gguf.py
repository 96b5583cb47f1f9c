"""A small random Mixtral-shaped GGUF with a real sentencepiece vocabulary, written by gguf's own writer."""

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf.vocab import SentencePieceVocab

MIXTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True, slots=True)
class TinyShape:
    """Sizes that no real model has, so that nothing can be tuned to them."""

    n_layer: int = 2
    n_embd: int = 64
    n_ff: int = 96
    n_head: int = 4
    n_head_kv: int = 2
    n_expert: int = 6
    n_expert_used: int = 3
    n_ctx: int = 512


def write_tiny_gguf(
    path: Path, tokenizer: Path | None, template: str | None = MIXTRAL_TEMPLATE, shape: TinyShape = TinyShape()
) -> Path:
    """Writes the model to `path`; `tokenizer` is a sentencepiece model, without one only token ids go in."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(shape.n_ctx)
    writer.add_block_count(shape.n_layer)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(shape.n_expert)
    writer.add_expert_used_count(shape.n_expert_used)
    n_vocab = 300 if tokenizer is None else add_vocabulary(writer, tokenizer, template)
    writer.add_vocab_size(n_vocab)
    rng = np.random.default_rng(1)
    for name, dims in _tensors(shape, n_vocab).items():
        values = rng.standard_normal(dims, dtype=np.float32)
        writer.add_tensor(name, values / 8 + 1 if name.endswith("norm.weight") else values * dims[-1] ** -0.5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer: Path, template: str | None, added: tuple[str, ...] = ()) -> int:
    """Adds the tokenizer's keys, with further control tokens, and returns the number of tokens."""
    pieces = [*SentencePieceVocab(tokenizer.parent).all_tokens()]
    pieces += [(name.encode(), 0.0, gguf.TokenType.CONTROL) for name in added]
    tokens, scores, types = zip(*pieces, strict=True)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    if template is not None:
        writer.add_chat_template(template)
    return len(tokens)


def _tensors(shape: TinyShape, n_vocab: int) -> dict[str, tuple[int, ...]]:
    """Shapes in numpy's order, the contiguous axis last."""
    d, n_kv = shape.n_embd, shape.n_embd // shape.n_head * shape.n_head_kv
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (n_vocab, d)}
    for n in range(shape.n_layer):
        layer = {
            "attn_norm": (d,),
            "attn_q": (d, d),
            "attn_k": (n_kv, d),
            "attn_v": (n_kv, d),
            "attn_output": (d, d),
            "ffn_norm": (d,),
            "ffn_gate_inp": (shape.n_expert, d),
            "ffn_gate_exps": (shape.n_expert, shape.n_ff, d),
            "ffn_up_exps": (shape.n_expert, shape.n_ff, d),
            "ffn_down_exps": (shape.n_expert, d, shape.n_ff),
        }
        tensors |= {f"blk.{n}.{name}.weight": dims for name, dims in layer.items()}
    return tensors | {"output_norm.weight": (d,), "output.weight": (n_vocab, d)}
