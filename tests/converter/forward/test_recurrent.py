"""What recurrent layers compute in torch is what transformers' own recurrence does, and the engine."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

from bench.baselines.stepping import random_tokens
from slimoe.converter.forward.recurrent import CHUNK, delta_rule
from slimoe.converter.forward.stream import Sequences, final_logits, run
from slimoe.converter.source.gguf_source import gguf_source
from slimoe.offload.engine import Engine
from tests.models.configs import engine_config
from tests.models.tiny_gguf import FineShape, write_family


@pytest.mark.parametrize("n_tokens", [1, CHUNK - 1, CHUNK, 2 * CHUNK + 9])
def test_chunks_of_a_delta_rule_are_its_steps(n_tokens: int) -> None:
    """With decays from next to nothing to all of it, and keys that resemble each other."""
    n_head, n_state, draw = 3, 16, torch.Generator().manual_seed(n_tokens)
    queries, keys, values = (torch.randn(n_head, n_tokens, n_state, generator=draw) for _ in range(3))
    keys = torch.nn.functional.normalize(keys + 1, dim=-1)
    decay = -torch.exp(4 * torch.randn(n_head, n_tokens, generator=draw) - 2)
    beta = torch.rand(n_head, n_tokens, generator=draw)
    steps = (one.transpose(0, 1)[None] for one in (queries * n_state**0.5, keys, values, decay, beta))
    expected, _ = torch_recurrent_gated_delta_rule(*steps, initial_state=None, output_final_state=False)
    found = delta_rule(queries, keys, values, decay, beta)
    torch.testing.assert_close(found.transpose(0, 1)[None], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen3next", "qwen35moe", "lfm2moe", "granitehybrid", "nemotron_h_moe"])
def test_a_long_text_is_read_as_the_engine_reads_it(tmp_path: Path, name: str) -> None:
    path = write_family(tmp_path / "m.gguf", name, shape=FineShape(n_layer=4, n_embd_head=64, n_expert=16))
    tokens = random_tokens(2 * CHUNK + 9, 300)
    source = gguf_source(path)
    ours = final_logits(source, run(source, Sequences((tuple(tokens),)))).numpy()
    config = engine_config(path, n_ctx=256, n_threads=1, kv_type="f32", weights="copied")
    with closing(Engine.open(config)) as engine:
        np.testing.assert_allclose(ours, engine.read(tokens, len(tokens)), atol=2e-3)
