"""What tests of drafted tokens have in common: answers with what they took, and files with blocks that draft (MTP)."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from gguf import GGMLQuantizationType as Type

from slimoe.offload.engine import Engine
from slimoe.offload.text.generation import Failed, Finished, GenerationRequest, TokenStep
from tests.models.gguf_content import GGUFContent, StoredTensor, with_prediction_block


class Answer(NamedTuple):
    """What was said, with scores, and what it took."""

    tokens: list[int]
    text: str
    logprobs: list[float]
    finished: Finished
    n_steps: int


def answers(engine: Engine, *requests: GenerationRequest) -> list[Answer]:
    """Of requests that are submitted at once, and the steps that all took together."""
    ids = [engine.submit(request) for request in requests]
    steps: dict[int, list[TokenStep]] = {id: [] for id in ids}
    ends: dict[int, Finished] = {}
    n_steps = 0
    while not engine.is_idle:
        n_steps += 1
        for id, event in engine.step():
            assert not isinstance(event, Failed), event.error
            if isinstance(event, TokenStep):
                steps[id].append(event)
            if isinstance(event, Finished):
                ends[id] = event
    return [
        Answer(
            [one.token for one in steps[id]],
            "".join(one.text for one in steps[id]) + ends[id].text,
            [one.logprob.logprob for one in steps[id] if one.logprob],
            ends[id],
            n_steps,
        )
        for id in ids
    ]


def with_mtp_block(content: GGUFContent, n_layer: int, *, has_own_ends: bool = False) -> GGUFContent:
    """The content with a random block; `has_own_ends` gives it a token table, an output and a norm of its own.

    Its layer is a copy of the last one that has attention and experts.
    """
    model = max(n for n in range(n_layer) if _has_all(content, n))
    block, draw = f"blk.{n_layer}.", np.random.default_rng(8)
    added = with_prediction_block(content, n_layer)
    kept = {name: one for name, one in added.tensors.items() if not name.startswith(block) or "nextn" in name}
    copied = {
        name.replace(f"blk.{model}.", block): StoredTensor(one.data.copy(), one.type)
        for name, one in content.tensors.items()
        if name.startswith(f"blk.{model}.")
    }
    n_embd = content.tensors["token_embd.weight"].data.shape[1]
    n_vocab = content.tensors["token_embd.weight"].data.shape[0]
    values = {
        "enorm": 1 + draw.standard_normal(n_embd) / 8,
        "hnorm": 1 + draw.standard_normal(n_embd) / 8,
        "eh_proj": draw.standard_normal((n_embd, 2 * n_embd)) * n_embd**-0.5,
    }
    if has_own_ends:
        values |= {
            "embed_tokens": draw.standard_normal((n_vocab, n_embd)),
            "shared_head_head": draw.standard_normal((n_vocab, n_embd)) * n_embd**-0.5,
            "shared_head_norm": 1 + draw.standard_normal(n_embd) / 8,
        }
    own = {
        f"{block}nextn.{name}.weight": StoredTensor(one.astype(np.float32), Type.F32) for name, one in values.items()
    }
    architecture = content.keys["general.architecture"].value
    name, keys = f"{architecture}.attention.recurrent_layers", dict(added.keys)
    if name in keys:
        keys[name] = replace(keys[name], value=[*keys[name].value, False])
    return GGUFContent(keys, kept | copied | own)


def _has_all(content: GGUFContent, layer: int) -> bool:
    names = content.tensors.keys()
    has_attention = any(f"blk.{layer}.{role}.weight" in names for role in ("attn_q", "attn_q_a"))
    return has_attention and f"blk.{layer}.ffn_gate_exps.weight" in names


def with_second_block(content: GGUFContent, n_layer: int) -> GGUFContent:
    """The content with a second block that predicts tokens, a copy of the first one of a model of `n_layer` layers."""
    name, first = content.keys["general.architecture"].value, f"blk.{n_layer}."
    counts = {f"{name}.block_count": n_layer + 2, f"{name}.nextn_predict_layers": 2}
    keys = content.with_keys(counts).keys
    for key in (f"{name}.attention.head_count", f"{name}.attention.recurrent_layers"):
        if key in keys:
            keys = keys | {key: replace(keys[key], value=[*keys[key].value, keys[key].value[-1]])}
    copies = {
        one.replace(first, f"blk.{n_layer + 1}."): StoredTensor(tensor.data.copy(), tensor.type)
        for one, tensor in content.tensors.items()
        if one.startswith(first)
    }
    return GGUFContent(dict(keys), content.tensors | copies)


def with_right_block(content: GGUFContent, n_layer: int, period: int = 7) -> GGUFContent:
    """The content with a block whose predictions are the model's own, but for tokens whose number `period` divides.

    Neither the layers nor the block add anything to the residual stream, and the output has one row for each token: the
    model says after each token the one that its row leads to, and so does the block, which sees nothing but the token.
    """
    content = with_mtp_block(content, n_layer)
    tensors = dict(content.tensors)
    for name, tensor in content.tensors.items():
        if name.endswith(
            ("attn_output.weight", "ssm_out.weight", "ffn_down.weight", "_down_exps.weight", "_down_shexp.weight")
        ):
            tensors[name] = StoredTensor(np.zeros_like(tensor.data), tensor.type)
    rows = content.tensors["token_embd.weight"].data
    n_vocab, n_embd = rows.shape
    draw = np.random.default_rng(4)
    rows = draw.standard_normal((n_vocab, n_embd)).astype(np.float32)
    # After token n comes the one that stands behind it in a random order: its output is the row of n.
    order = draw.permutation(n_vocab)
    output = np.empty_like(rows)
    output[order] = rows[np.roll(order, 1)]
    wrong = rows.copy()
    wrong[::period] = rows[np.arange(0, n_vocab, period) - 1]
    joint = np.concatenate([np.eye(n_embd), np.zeros((n_embd, n_embd))], axis=1).astype(np.float32)
    block, ones = f"blk.{n_layer}.nextn.", np.ones(n_embd, np.float32)
    values = {
        "token_embd.weight": rows,
        "output.weight": output,
        "output_norm.weight": ones,
        f"{block}eh_proj.weight": joint,
        f"{block}enorm.weight": ones,
        f"{block}hnorm.weight": ones,
        f"{block}embed_tokens.weight": wrong,
    }
    return GGUFContent(content.keys, tensors | {name: StoredTensor(one, Type.F32) for name, one in values.items()})
