"""`slimoe eval` next to transformers: the same questions, the same answers, one log-likelihood after the other.

A random Mixtral with a tokenizer trained on this program's texts is saved, converted to F32, and asked twice: by
transformers in this process, and by `slimoe eval`. The last line of stdout is one JSON document; `worst`
is the largest difference between two log-likelihoods. Needs slimoe[bench] and slimoe[eval].

    python -m bench.quality.eval_check --smoke
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import sentencepiece
import torch
import transformers

from slimoe.converter.convert import ConvertOptions, convert
from slimoe.converter.forward.texts import default_texts
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.text.tokenizer import Tokenizer
from slimoe.server.cli import run

_SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "vocab_size": 1500,
    "max_position_embeddings": 512,
    "sliding_window": None,
    "initializer_range": 0.1,
}
_CHOICES = ("choice", {"output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_choice": "choices"})
_ROLLING = ("rolling", {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"})


def save_checkpoint(folder: Path, text: Path, *, adds_bos: bool) -> Path:
    """A random Mixtral in F32, whose tokenizer adds BOS or not."""
    torch.manual_seed(1)
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**_SIZES)).save_pretrained(folder)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=_SIZES["vocab_size"],
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": adds_bos,
        "add_eos_token": False,
        "legacy": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_tasks(folder: Path, lines: list[str]) -> list[str]:
    """Tasks of both kinds, whose questions are `lines`."""
    data = folder / "questions.jsonl"
    rows = [
        {"text": line[: len(line) // 2].strip(), "choices": [line[len(line) // 2 :].strip(), other], "answer": n % 2}
        for n, (line, other) in enumerate(zip(lines, lines[1:] + lines[:1], strict=True))
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    paths = []
    for name, fields in (_CHOICES, _ROLLING):
        described: dict[str, Any] = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc" if name == "choice" else "bits_per_byte"}],
            **fields,
        }
        path = folder / f"{name}.yaml"
        path.write_text(json.dumps(described))  # YAML reads JSON
        paths.append(str(path))
    return paths


def expected(checkpoint: Path, gguf: Path, folder: Path, *, adds_bos: bool) -> dict[str, list[float]]:
    """What transformers makes of the questions: the log-likelihoods of every choice, and of every text."""
    tokenizer = Tokenizer.open(read_gguf(gguf))
    assert tokenizer.bos is not None
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)

    def likelihood(ids: list[int], n_known: int) -> float:
        with torch.no_grad():
            logits = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
        return float(sum(logits[n - 1, ids[n]] for n in range(n_known, len(ids))))

    found: dict[str, list[float]] = {"choice": [], "rolling": []}
    start = [tokenizer.bos] if adds_bos else []
    for line in (folder / "questions.jsonl").read_text().splitlines():
        row = json.loads(line)
        context = start + tokenizer.encode(row["text"])
        for choice in row["choices"]:
            whole = start + tokenizer.encode(f"{row['text']} {choice}")
            found["choice"].append(likelihood(whole, len(context)))
        found["rolling"].append(likelihood([tokenizer.bos, *tokenizer.encode(row["text"])], 1))
    tokenizer.close()
    return found


def likelihoods(results: dict[str, Any], task: str) -> list[float]:
    """The log-likelihood of every request of a task, in the questions' order."""
    rows = sorted(results["samples"][task], key=lambda row: row["doc_id"])
    found = [answer[0] for row in rows for answer in row["resps"]]
    return [float(one[0] if isinstance(one, list | tuple) else one) for one in found]


def compare(folder: Path, n_questions: int, *, adds_bos: bool) -> dict[str, Any]:
    """The largest differences between both programs, for one kind of tokenizer."""
    text = folder / "text.txt"
    mixture = "\n".join(file.path.read_text(encoding="utf-8") for file in default_texts())
    lines = [line.strip() for line in mixture.splitlines() if 40 < len(line.strip()) < 200]
    text.write_text("\n".join(lines))
    checkpoint = save_checkpoint(folder, text, adds_bos=adds_bos)
    path = convert(ConvertOptions(checkpoint, folder / "model.gguf", "F32", n_threads=1)).path
    paths = write_tasks(folder, lines[:n_questions])
    theirs = expected(checkpoint, path, folder, adds_bos=adds_bos)
    output = folder / "ours.json"
    words = ["--tasks", ",".join(paths), "--samples", "--kv-type", "f32", "--ctx", "512", "-o", str(output)]
    if run(["eval", str(path), *words]):
        sys.exit("slimoe eval failed")
    ours = json.loads(output.read_text())["results"]
    worst = {
        task: max(abs(a - b) for a, b in zip(likelihoods(ours, task), theirs[task], strict=True)) for task in theirs
    }
    pairs = zip(theirs["choice"][::2], theirs["choice"][1::2], strict=True)
    n_right = sum((second > first) == n % 2 for n, (first, second) in enumerate(pairs))
    accuracies = [ours["results"]["choice"]["acc,none"], n_right / n_questions]
    return {"adds_bos": adds_bos, "n_questions": n_questions, "worst": worst, "accuracies": accuracies}


@click.command()
@click.option("--questions", "n_questions", type=int, default=100, show_default=True)
@click.option("--smoke", "is_smoke", is_flag=True, help="Five questions.")
def main(n_questions: int, is_smoke: bool) -> None:
    """Compares, for a model that begins with BOS and for one that does not."""
    torch.set_num_threads(1)
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1"}
    found = []
    for adds_bos in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            found.append(compare(Path(folder), 5 if is_smoke else n_questions, adds_bos=adds_bos))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
