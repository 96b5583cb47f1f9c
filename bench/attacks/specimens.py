"""Sound files of all eight kinds that slimoe reads, tiny, to make mutants of."""

import io
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from bench.attacks.specimen_tokenizers import BYTE_LEVEL, LIKE_SENTENCEPIECE
from bench.models.random_checkpoint import write_random_checkpoint
from bench.models.shapes import Shape
from slimoe.converter.stats.imatrix_file import Imatrix, InputSquares, write_imatrix
from slimoe.offload.errors import SlimoeError
from slimoe.server import cli

KINDS = ("gguf", "native", "safetensors", "tokenizer", "config", "statistics", "imatrix", "recipe")
_SHAPE = Shape(2, 256, 256, 4, 2, 64, 4, 2, 384)
_TEXT = Path(__file__).parents[2] / "converter" / "texts" / "prose.txt"
_TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
_RECIPE = """\
target_bpw = 4.0
hints = true
free_layers = false

[types]
attention = "Q6_K"
candidates = ["Q3_K", "Q4_K"]

[experts]
keep = 3
score = "frequency"
overall = false
"""

_CHECKPOINT_FILES = (
    ("safetensors", "source", "model.safetensors"),
    ("safetensors", "sharded", "model.safetensors.index.json"),
    ("safetensors", "sharded", "model-00002-of-00002.safetensors"),
    ("tokenizer", "source", "tokenizer.model"),
    ("tokenizer", "by_json", "tokenizer.json"),
    ("tokenizer", "by_bytes", "tokenizer.json"),
    ("tokenizer", "source", "tokenizer_config.json"),
    ("tokenizer", "by_json", "tokenizer_config.json"),
    ("tokenizer", "source", "added_tokens.json"),
    ("tokenizer", "by_json", "special_tokens_map.json"),
    ("config", "source", "config.json"),
    ("config", "by_json", "config.json"),
    ("config", "source", "generation_config.json"),
)
"""The kind, checkpoint and name of every specimen that belongs to a checkpoint."""
_ONE_TOKEN = ("--prompt-ids", "1,5,6", "-n", "1", "--ctx", "64", "--threads", "1", "--weights", "copied")
_TEXT_TOKEN = ("-p", "the river", *_ONE_TOKEN[2:])


class SpecimenError(SlimoeError):
    """A sound file could not be made, so that nothing can be said of mutants."""


@dataclass(frozen=True, slots=True)
class Specimen:
    """A sound file `target` among those of `folder`, and the command lines that read it; OUT is a file to write.

    A command that begins with ! is tried only where the one before it has ended well.
    """

    kind: str
    folder: Path
    target: str
    commands: tuple[tuple[str, ...], ...]


def make_specimens(root: Path, kinds: Sequence[str] = KINDS) -> list[Specimen]:
    """Writes specimens of these kinds, and what they belong to, below `root`; raises SpecimenError."""
    source = root / "source"
    write_random_checkpoint(source, _SHAPE)
    _describe(source)
    sharded, by_json, by_bytes = (root / name for name in ("sharded", "by_json", "by_bytes"))
    for other in (sharded, by_json, by_bytes):
        shutil.copytree(source, other)
    _shard(sharded)
    for folder, tokenizer in ((by_json, LIKE_SENTENCEPIECE), (by_bytes, BYTE_LEVEL)):
        # What belongs to the sentencepiece model alone goes.
        (folder / "tokenizer.model").unlink()
        (folder / "added_tokens.json").unlink()
        for file, changes in (
            ("config", {"eos_token_id": 2}),
            ("special_tokens_map", {"additional_special_tokens": []}),
        ):
            path = folder / f"{file}.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=1))
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    commands = (
        ("inspect", "."),
        ("convert", ".", "OUT", "--type", "Q8_0", "--threads", "1"),
        ("!run", "OUT", *_TEXT_TOKEN),
    )
    made = [Specimen(kind, root / folder, name, commands) for kind, folder, name in _CHECKPOINT_FILES]
    made += _files(root, source, kinds)
    return [specimen for specimen in made if specimen.kind in kinds]


def _describe(source: Path) -> None:
    """Writes the files beside the weights, as a repository has them."""
    (source / "tokenizer.json").unlink()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT.read_text("utf-8").splitlines()[:400]),
        model_writer=model,
        vocab_size=_SHAPE.n_vocab - 8,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.99,
        minloglevel=2,
    )
    (source / "tokenizer.model").write_bytes(model.getvalue())
    special = {"content": "</s>", "lstrip": False, "normalized": False, "rstrip": False, "special": True}
    settings: dict[str, Any] = {"bos_token": "<s>", "eos_token": special, "unk_token": "<unk>", "add_bos_token": True}
    settings |= {"added_tokens_decoder": {"1": special | {"content": "<s>"}, "2": special}, "chat_template": _TEMPLATE}
    settings |= {"add_eos_token": False, "legacy": True, "model_max_length": 4096, "tokenizer_class": "LlamaTokenizer"}
    config = json.loads((source / "config.json").read_text())
    config |= {"bos_token_id": 1, "eos_token_id": [2, 376], "torch_dtype": "bfloat16", "tie_word_embeddings": False}
    config |= {"hidden_act": "silu", "sliding_window": None, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    documents = {
        "config.json": config,
        "tokenizer_config.json": settings,
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "do_sample": True, "temperature": 0.7},
        "added_tokens.json": {"<extra>": 376, "<more>": 377},
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": special, "additional_special_tokens": ["<extra>"]},
    }
    for name, document in documents.items():
        (source / name).write_text(json.dumps(document, indent=1))


def _shard(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, payload = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = list(header)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    where: dict[str, str] = {}
    for number, half in enumerate(halves, 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        begin = header[half[0]]["data_offsets"][0]
        moved = {
            name: header[name] | {"data_offsets": [offset - begin for offset in header[name]["data_offsets"]]}
            for name in half
        }
        packed = json.dumps(moved).encode()
        part = payload[begin : header[half[-1]]["data_offsets"][1]]
        (folder / file).write_bytes(len(packed).to_bytes(8, "little") + packed + part)
        where |= dict.fromkeys(half, file)
    index = {"metadata": {"total_size": len(payload)}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def _files(root: Path, source: Path, kinds: Sequence[str]) -> list[Specimen]:
    """Makes the specimens that slimoe's own commands write."""
    files = root / "files"
    files.mkdir()
    (files / "source").symlink_to(source)
    found = []
    reading = (
        ("inspect", "F"),
        ("plan", "F", "--no-measure", "--ctx", "64"),
        ("run", "F", *_ONE_TOKEN),
        ("run", "F", *_TEXT_TOKEN),
    )
    if "gguf" in kinds:
        _do("convert", str(source), str(files / "model.gguf"), "--type", "Q4_K")
        again = ("convert", "F", "OUT", "--type", "Q8_0", "--threads", "1")
        found.append(_file("gguf", files, "model.gguf", (*reading, again)))
    if "native" in kinds:
        _do("convert", str(source), str(files / "copies.gguf"), "--two-copies", "Q4_K,Q2_K")
        lossy = ("run", "F", *_ONE_TOKEN, "--lossy", "low")
        found.append(_file("native", files, "copies.gguf", (*reading, lossy)))
    if "imatrix" in kinds:
        found += _imatrices(files)
    if {"statistics", "recipe"} & set(kinds):
        sizes = ("--tokens", "2048", "--length", "128", "--types", "none", "--text", str(_TEXT))
        _do("calibrate", str(source), "-o", str(files / "stats"), *sizes)
        (files / "recipe.toml").write_text(_RECIPE)
        compression = ("--stats", "stats", "--target-bpw", "4", "--threads", "1")
        by_statistics = (
            ("plan", "source", *compression),
            ("convert", "source", "OUT", *compression, "--no-report"),
            ("convert", "source", "OUT", "--type", "Q4_K", "--dry-run", "--imatrix", "stats"),
            ("plan", "source", "--stats", "stats", "--keep-experts", "3", "--threads", "1"),
        )
        by_recipe = ("plan", "source", "--stats", "stats", "--threads", "1", "--recipe", "./recipe.toml")
        found.append(Specimen("statistics", files, "stats", by_statistics))
        found.append(Specimen("recipe", files, "recipe.toml", (by_recipe,)))
    return found


def _imatrices(files: Path) -> list[Specimen]:
    """Writes an importance matrix of all matrices in both of llama.cpp's formats."""
    rng = np.random.default_rng(0)
    entries = {}
    for layer in range(_SHAPE.n_layer):
        for role, n_matrices in (("attn_q", 1), ("attn_output", 1), ("ffn_gate_exps", 4), ("ffn_down_exps", 4)):
            sums = rng.uniform(0.1, 2, (n_matrices, 256)).astype(np.float32)
            entries[f"blk.{layer}.{role}.weight"] = InputSquares(sums, np.full(n_matrices, 5, np.float32))
    write_imatrix(Imatrix(entries, ("prose",), 4, 128), files / "imatrix.gguf")
    old = [len(entries).to_bytes(4, "little")]
    for name, entry in entries.items():
        packed = name.encode()
        old += [
            len(packed).to_bytes(4, "little"),
            packed,
            (2).to_bytes(4, "little"),
            entry.sums.size.to_bytes(4, "little"),
        ]
        old.append(entry.sums.astype("<f4").tobytes())
    (files / "imatrix.dat").write_bytes(b"".join(old))
    command = ("convert", "source", "OUT", "--type", "Q4_K", "--threads", "1", "--imatrix", "F")
    return [_file("imatrix", files, name, (command,)) for name in ("imatrix.gguf", "imatrix.dat")]


def _file(kind: str, folder: Path, name: str, commands: Sequence[Sequence[str]]) -> Specimen:
    named = tuple(tuple(name if word == "F" else word for word in command) for command in commands)
    return Specimen(kind, folder, name, named)


def _do(*arguments: str) -> None:
    status = cli.run(arguments)
    if status:
        raise SpecimenError(f"slimoe {' '.join(arguments)} ended with status {status}.")


def main() -> None:
    """Makes the kinds named on the command line below its first argument, and lists them in specimens.json there."""
    root = Path(sys.argv[1])
    try:
        made = make_specimens(root, sys.argv[2:])
    except SlimoeError as error:
        sys.exit(f"{error}")
    listed = [asdict(specimen) | {"folder": str(specimen.folder)} for specimen in made]
    (root / "specimens.json").write_text(json.dumps(listed))


if __name__ == "__main__":
    main()
