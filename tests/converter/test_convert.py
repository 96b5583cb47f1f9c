import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file

from slimoe.converter.convert import ConvertOptions, convert, plan
from slimoe.converter.quant.mixes import FOR_IMPORTANCE, RECIPES
from slimoe.converter.source.tokenizer.check import HARD_TEXTS
from slimoe.offload.errors import ModelFileError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensor_list import check_tensors
from slimoe.offload.text.tokenizer import Tokenizer
from slimoe.server.cli import run
from tests.models.tiny_checkpoint import TinyConfig, llama_logits, logits, save_checkpoint, stack_experts

PROMPT = [1, 300, 301, 302, 17, 305, 306, 307, 400, 401]


def converted(source: Path, target: Path, kind: str = "F32") -> Path:
    return convert(ConvertOptions(source, target, kind, n_threads=2)).path


def assert_same_logits(path: Path, source: Path) -> None:
    expected = logits(source, PROMPT).numpy()
    np.testing.assert_allclose(llama_logits(path, PROMPT), expected, atol=2e-3 * expected.std())


@pytest.mark.parametrize("checkpoint", ["moe_checkpoint", "k_quant_checkpoint", "dense_checkpoint"])
def test_llama_cpp_computes_what_transformers_does(
    tmp_path: Path, checkpoint: str, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(checkpoint)
    assert_same_logits(converted(source, tmp_path / "m.gguf"), source)


def test_stacked_experts_make_the_same_file(tmp_path: Path, moe_checkpoint: Path) -> None:
    source = shutil.copytree(moe_checkpoint, tmp_path / "c" / moe_checkpoint.name)
    stack_experts(source)
    assert "model.layers.1.mlp.experts.gate_up_proj" in load_file(source / "model.safetensors")
    stacked, separate = converted(source, tmp_path / "a.gguf"), converted(moe_checkpoint, tmp_path / "b.gguf")
    hidden = read_gguf(stacked).metadata["slimoe.source.sha256"].encode()
    assert stacked.read_bytes().replace(hidden, b"") == separate.read_bytes().replace(
        read_gguf(separate).metadata["slimoe.source.sha256"].encode(), b""
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_of_half_precision(tmp_path: Path, sentencepiece_path: Path, dtype: torch.dtype) -> None:
    source = save_checkpoint(tmp_path / "c", sentencepiece_path, TinyConfig(), dtype)
    model = load_file(source / "model.safetensors")
    split_checkpoint(source, 3)
    path = converted(source, tmp_path / "m.gguf")
    stored = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    np.testing.assert_array_equal(stored["token_embd.weight"], model["model.embed_tokens.weight"].float().numpy())
    experts = [f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight" for e in range(6)]
    expected = torch.stack([model[name] for name in experts]).float().numpy()
    np.testing.assert_array_equal(stored["blk.1.ffn_down_exps.weight"], expected)


def split_checkpoint(source: Path, n_shards: int) -> None:
    from safetensors.torch import save_file

    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    owners = {name: f"model-{i % n_shards + 1:05d}-of-{n_shards:05d}.safetensors" for i, name in enumerate(names)}
    for shard in set(owners.values()):
        save_file({name: tensors[name] for name in names if owners[name] == shard}, source / shard)
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": owners}))


@pytest.fixture(scope="module")
def few_experts(tmp_path_factory: pytest.TempPathFactory, sentencepiece_path: Path) -> Path:
    """Its sizes fit every type, and it is small, since there are many of them."""
    sizes = TinyConfig(n_embd=256, n_ff=512, n_head=8, n_head_kv=4, n_expert=3, n_expert_used=2)
    return save_checkpoint(tmp_path_factory.mktemp("few") / "few-experts", sentencepiece_path, sizes)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory, few_experts: Path) -> dict[str, Any]:
    """The weights as float32, by name."""
    path = converted(few_experts, tmp_path_factory.mktemp("exact") / "f32.gguf")
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("kind", [name for name in RECIPES if name not in FOR_IMPORTANCE])
def test_every_type_is_close_to_the_weights(
    tmp_path: Path, few_experts: Path, exact: dict[str, Any], kind: str
) -> None:
    path = converted(few_experts, tmp_path / "m.gguf", kind)
    assert path.stat().st_size == plan(ConvertOptions(few_experts, tmp_path / "x", kind)).layout.n_bytes
    for tensor in gguf.GGUFReader(path).tensors:
        original = exact[tensor.name]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(original.shape)
        error = np.sqrt(np.mean((values - original) ** 2) / np.mean(original**2))
        assert error < {2: 0.4, 3: 0.2, 4: 0.12}.get(8 * tensor.n_bytes // tensor.n_elements, 0.05), tensor.name
    assert np.isfinite(llama_logits(path, PROMPT)).all()


def types_of(path: Path) -> dict[str, Type]:
    return {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors}


def test_the_roles_types_do_not_depend_on_the_number_of_experts(tmp_path: Path, k_quant_checkpoint: Path) -> None:
    types = types_of(converted(k_quant_checkpoint, tmp_path / "m.gguf", "Q4_K_M"))
    assert types["output.weight"] is Type.Q6_K
    assert types["token_embd.weight"] is types["blk.0.attn_q.weight"] is types["blk.1.ffn_up_exps.weight"] is Type.Q4_K
    assert types["blk.0.attn_k.weight"] is types["blk.0.attn_v.weight"] is Type.Q8_0
    assert types["blk.0.attn_output.weight"] is Type.Q5_K
    assert types["blk.2.ffn_down_exps.weight"] is Type.Q6_K
    assert {types[f"blk.{i}.ffn_gate_inp.weight"] for i in range(3)} == {Type.F32}
    assert {kind for name, kind in types.items() if "norm" in name} == {Type.F32}


def test_our_own_reader_accepts_the_file(tmp_path: Path, moe_checkpoint: Path) -> None:
    file = read_gguf(converted(moe_checkpoint, tmp_path / "m.gguf"))
    spec = ModelSpec.from_gguf(file)
    check_tensors(file, spec)
    assert (spec.n_expert, spec.n_expert_used, spec.n_ff, spec.n_vocab) == (6, 3, 96, 520)
    assert file.metadata["slimoe.recipe"] == "F32"
    assert len(file.metadata["slimoe.source.sha256"]) == 64


def test_tokens_and_template(tmp_path: Path, moe_checkpoint: Path) -> None:
    path = converted(moe_checkpoint, tmp_path / "m.gguf", "Q8_0")
    tokenizer = Tokenizer.open(read_gguf(path))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(moe_checkpoint / "tokenizer.model"))
    for text in HARD_TEXTS:
        assert tokenizer.encode(text) == processor.encode(text)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.add_bos, tokenizer.eog) == (1, 2, True, frozenset({2}))
    assert (tokenizer.n_vocab, tokenizer.token_text(519)) == (520, "[PAD519]")
    settings = json.loads((moe_checkpoint / "tokenizer_config.json").read_text())
    assert tokenizer.chat_template == settings["chat_template"]


def test_added_tokens_ends_of_generation_and_licence(tmp_path: Path, moe_checkpoint: Path) -> None:
    source = shutil.copytree(moe_checkpoint, tmp_path / "c")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {
        "1": {"content": "<s>", "special": True},
        "513": {"content": "<|im_end|>", "special": True},
        "514": {"content": "<tool>", "special": False},
    }
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 513]}))
    (source / "chat_template.jinja").write_text("{{ other }}")
    (source / "README.md").write_text("---\ntags: [x]\nlicense: apache-2.0\n---\n# A model\n")
    file = read_gguf(converted(source, tmp_path / "m.gguf"))
    tokenizer = Tokenizer.open(file)
    assert tokenizer.eog == {2, 513}
    assert tokenizer.special_tokens["<tool>"] == 514
    assert 514 in tokenizer.encode("a <tool> b")
    assert 513 not in tokenizer.encode("<|im_end|>")
    assert tokenizer.chat_template == "{{ other }}"
    assert file.metadata["general.license"] == "apache-2.0"


def test_tied_embeddings_have_the_outputs_type(tmp_path: Path, sentencepiece_path: Path) -> None:
    sizes = TinyConfig(n_layer=1, n_embd=256, n_ff=256, n_expert=0)
    source = save_checkpoint(tmp_path / "c", sentencepiece_path, sizes, tie_word_embeddings=True)
    assert_same_logits(converted(source, tmp_path / "m.gguf"), source)
    types = types_of(converted(source, tmp_path / "q.gguf", "Q4_K"))
    assert "output.weight" not in types
    assert types["token_embd.weight"] is Type.Q6_K


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.3},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=["linear", "yarn", "yarn-attention", "llama3"],
)
def test_rope_scaling(tmp_path: Path, sentencepiece_path: Path, scaling: dict[str, Any]) -> None:
    sizes = TinyConfig(n_layer=1, n_expert=0)
    parameters = {"rope_theta": 10000.0} | scaling
    source = save_checkpoint(tmp_path / "c", sentencepiece_path, sizes, rope_parameters=parameters)
    assert_same_logits(converted(source, tmp_path / "m.gguf"), source)


def test_biases(tmp_path: Path, sentencepiece_path: Path) -> None:
    sizes = TinyConfig(n_layer=1, n_expert=0)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = {"attention_bias": True, "mlp_bias": True, "rope_parameters": rope}
    source = save_checkpoint(tmp_path / "c", sentencepiece_path, sizes, **config)
    randomise_biases(source)
    assert_same_logits(converted(source, tmp_path / "m.gguf"), source)


def randomise_biases(source: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name, value in tensors.items():
        if name.endswith(".bias"):
            tensors[name] = torch.randn(value.shape, generator=generator)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def test_threads_and_runs_give_the_same_bytes(tmp_path: Path, few_experts: Path) -> None:
    files = [convert(ConvertOptions(few_experts, tmp_path / f"{n}.gguf", "Q4_K_M", n_threads=n)).path for n in (1, 3)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_progress_ends_with_the_whole_file(tmp_path: Path, moe_checkpoint: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = convert(ConvertOptions(moe_checkpoint, tmp_path / "m.gguf", "F16"), lambda *now: seen.append(now))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    done, total = seen[-1]
    assert total == report.n_bytes
    assert 0 <= total - done < 32 * (report.n_tensors + 1)


def test_interruption_leaves_nothing(tmp_path: Path, moe_checkpoint: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(ConvertOptions(moe_checkpoint, tmp_path / "m.gguf", "F32"), interrupt)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_in_the_terminal_leaves_nothing(tmp_path: Path, moe_checkpoint: Path) -> None:
    code = (
        "import signal, sys\nfrom pathlib import Path\n"
        "from slimoe.converter.convert import ConvertOptions, convert\n"
        # Background jobs of a shell start with the signal ignored, and the tests may be one.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def pause(done, total):\n    print('.', flush=True)\n    sys.stdin.readline()\n"
        "convert(ConvertOptions(Path(sys.argv[1]), Path(sys.argv[2]), 'F32'), pause)\n"
    )
    arguments = [sys.executable, "-c", code, str(moe_checkpoint), str(tmp_path / "m.gguf")]
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf.partial"]
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert list(tmp_path.iterdir()) == []


def test_the_context_ends_with_the_sliding_window(tmp_path: Path, dense_checkpoint: Path) -> None:
    source = shutil.copytree(dense_checkpoint, tmp_path / "c")
    config = json.loads((source / "config.json").read_text()) | {"sliding_window": 48}
    (source / "config.json").write_text(json.dumps(config))
    assert ModelSpec.from_gguf(read_gguf(converted(source, tmp_path / "m.gguf"))).n_ctx_train == 48


def odd_heads(path: Path, tokenizer: Path) -> Path:
    """Rows of 256 and 512, but for the attention's output: they are of 384."""
    sizes = TinyConfig(n_layer=2, n_embd=256, n_ff=512, n_head=8, n_head_kv=4, n_expert=3, n_expert_used=2)
    return save_checkpoint(path, tokenizer, sizes, head_dim=48)


@pytest.mark.parametrize(("kind", "expected"), [("Q4_K", Type.Q5_0), ("Q6_K", Type.Q8_0), ("IQ4_XS", Type.IQ4_NL)])
def test_a_matrix_whose_rows_do_not_fit_has_another_type(
    tmp_path: Path, sentencepiece_path: Path, capsys: pytest.CaptureFixture[str], kind: str, expected: Type
) -> None:
    source, target = odd_heads(tmp_path / "c", sentencepiece_path), tmp_path / "m.gguf"
    assert run(["convert", str(source), str(target), "--type", kind, "--json"]) == 0
    captured = capsys.readouterr()
    types = types_of(target)
    assert types["blk.0.attn_output.weight"] is types["blk.1.attn_output.weight"] is expected
    assert types["blk.0.attn_q.weight"] is types["blk.1.ffn_up_exps.weight"] is Type[kind]
    assert json.loads(captured.out)["unfit_types"] == {f"{kind} to {expected.name}": 2}
    told = f"2 of 23 tensors, such as blk.0.attn_output.weight, have rows of 384, which {kind} does not divide"
    assert f"{told}: {expected.name} in its place" in captured.err
    exact = logits(source, PROMPT).numpy()
    assert np.corrcoef(llama_logits(target, PROMPT).ravel(), exact.ravel())[0, 1] > 0.7


def test_doubles_are_the_same_weights(tmp_path: Path, moe_checkpoint: Path) -> None:
    from safetensors.torch import save_file

    source = shutil.copytree(moe_checkpoint, tmp_path / "c" / moe_checkpoint.name)
    tensors = {name: value.double() for name, value in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    ours, single = converted(source, tmp_path / "a.gguf"), converted(moe_checkpoint, tmp_path / "b.gguf")
    for one, other in zip(gguf.GGUFReader(ours).tensors, gguf.GGUFReader(single).tensors, strict=True):
        assert one.name == other.name
        np.testing.assert_array_equal(one.data, other.data)


def test_whole_shards_need_no_index(tmp_path: Path, moe_checkpoint: Path) -> None:
    source = shutil.copytree(moe_checkpoint, tmp_path / "c")
    split_checkpoint(source, 3)
    (source / "model.safetensors.index.json").unlink()
    assert_same_logits(converted(source, tmp_path / "m.gguf"), moe_checkpoint)
    (source / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"shard model-00002-of-00003\.safetensors is missing"):
        converted(source, tmp_path / "n.gguf")
