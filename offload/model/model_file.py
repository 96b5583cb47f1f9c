"""A GGUF file that the engine takes: one place decides it, for files that are opened and for those to be written."""

from dataclasses import dataclass
from pathlib import Path

from slimoe.offload.errors import ModelFileError
from slimoe.offload.gguf.header import GGUFFile, parse_gguf
from slimoe.offload.gguf.keys import TOKENS
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensor_list import check_tensors, with_listed_shapes
from slimoe.offload.model.tensors import ModelSources
from slimoe.offload.model.weight_reader import model_sources


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A file's header, the model's sizes in it, and where its weights lie."""

    gguf: GGUFFile
    spec: ModelSpec
    sources: ModelSources

    @classmethod
    def of(cls, gguf: GGUFFile) -> "ModelFile":
        """Raises ModelFileError or UnsupportedModelError for whatever the engine would not run."""
        spec = ModelSpec.from_gguf(gguf)
        gguf = with_listed_shapes(gguf, spec)
        check_tensors(gguf, spec)
        tokens = gguf.metadata.get(TOKENS)
        if isinstance(tokens, list) and len(tokens) != spec.n_vocab:
            problem = f"the tokenizer has {len(tokens)} tokens, the model {spec.n_vocab}."
            hint = "Convert the model again, with the tokenizer that belongs to it."
            raise ModelFileError(gguf.path, problem, hint)
        return cls(gguf, spec, model_sources(gguf, spec))


def check_header(path: Path, header: bytes, n_bytes: int) -> None:
    """Whether a file of `n_bytes` that begins with `header` would be opened; raises as `ModelFile.of` does.

    `path` is what errors name: the source of what is to be written.
    """
    ModelFile.of(parse_gguf(path, header, n_bytes))
