"""What a GGUF file holds, read and written by gguf's own reader and writer, to be changed in between."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from slimoe.offload.ggml import ops as ggml

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A metadata value with its GGUF types; `item` is that of an array's elements."""

    value: Any
    kind: gguf.GGUFValueType
    item: gguf.GGUFValueType | None = None


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's data as gguf-py keeps it: values in numpy's order, or uint8 blocks of a quantised type."""

    data: Array
    type: Type


@dataclass(frozen=True, slots=True)
class GGUFContent:
    """Keys and tensors by name, in file order."""

    keys: dict[str, StoredKey]
    tensors: dict[str, StoredTensor]

    def with_keys(self, keys: Mapping[str, int | float | str | bool | None]) -> "GGUFContent":
        """The same with some keys set; None deletes."""
        kept = {name: key for name, key in self.keys.items() if keys.get(name, key) is not None}
        return replace(self, keys=kept | {name: stored(value) for name, value in keys.items() if value is not None})

    def with_values(self, values: Mapping[str, Array | None]) -> "GGUFContent":
        """The same with some tensors set to F32 values; None deletes."""
        kept = {name: tensor for name, tensor in self.tensors.items() if values.get(name, tensor) is not None}
        added = {name: StoredTensor(value, Type.F32) for name, value in values.items() if value is not None}
        return replace(self, tensors=kept | added)

    def quantised(self, kind: Type, wanted: Callable[[str], bool] = lambda name: True) -> "GGUFContent":
        """The same with all matrices but the router, of names that are wanted, in another type."""
        tensors = {
            name: quantise(tensor.data, kind)
            if tensor.data.ndim > 1 and "ffn_gate_inp" not in name and wanted(name)
            else tensor
            for name, tensor in self.tensors.items()
        }
        return replace(self, tensors=tensors)

    def values(self, name: str) -> Array:
        """The F32 values of a tensor."""
        assert self.tensors[name].type is Type.F32
        return self.tensors[name].data


def stored(value: int | float | str | bool) -> StoredKey:
    """A key of the type that converters give such a value."""
    kinds = {
        bool: gguf.GGUFValueType.BOOL,
        int: gguf.GGUFValueType.UINT32,
        float: gguf.GGUFValueType.FLOAT32,
        str: gguf.GGUFValueType.STRING,
    }
    return StoredKey(value, kinds[type(value)])


def quantise(values: Array, kind: Type) -> StoredTensor:
    """Values in another type, by ggml's own quantiser, every weight being equally important."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    source = np.ascontiguousarray(values, np.float32)
    n_rows, n_columns = source.size // source.shape[-1], source.shape[-1]
    target = np.empty((*source.shape[:-1], n_columns // block * block_bytes), np.uint8)
    importance = np.ones(n_columns, np.float32)
    ggml.ggml_quantize_chunk(kind, source.ctypes.data, target.ctypes.data, 0, n_rows, n_columns, importance.ctypes.data)
    return StoredTensor(target, kind)


def read_content(path: Path) -> GGUFContent:
    """Everything in a file."""
    reader = gguf.GGUFReader(path)
    keys = {
        field.name: StoredKey(field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
        for field in reader.fields.values()
        if not field.name.startswith("GGUF.")
    }
    return GGUFContent(keys, {t.name: StoredTensor(np.array(t.data), t.tensor_type) for t in reader.tensors})


def with_prediction_block(content: GGUFContent, n_layer: int) -> GGUFContent:
    """The content with a block that predicts a further token behind `n_layer` layers, and with an array of heads."""
    own, last, block = content.keys["general.architecture"].value, f"blk.{n_layer - 1}.", f"blk.{n_layer}."
    values = {
        "enorm.weight": np.ones(256, np.float32),
        "hnorm.weight": np.ones(256, np.float32),
        "eh_proj.weight": np.ones((256, 512), np.float32),
    }
    tensors = {name.replace(last, block): one for name, one in content.tensors.items() if name.startswith(last)}
    tensors |= {f"{block}nextn.{name}": StoredTensor(one, Type.F32) for name, one in values.items()}
    added = content.with_keys({f"{own}.block_count": n_layer + 1, f"{own}.nextn_predict_layers": 1})
    n_head = content.keys[f"{own}.attention.head_count"].value
    heads = StoredKey([n_head] * (n_layer + 1), gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32)
    keys = added.keys | {f"{own}.attention.head_count": heads}
    return replace(added, keys=keys, tensors=content.tensors | tensors)


def file_tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    """A file's tensors by name, as gguf's own reader shows them."""
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def write_content(path: Path, content: GGUFContent, *, endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE) -> Path:
    """Writes it to `path`."""
    architecture = content.keys.get("general.architecture")
    writer = gguf.GGUFWriter(path, architecture.value if architecture else "llama", endianess=endianess)
    for name, key in content.keys.items():
        if name != "general.architecture":
            writer.add_key_value(name, key.value, key.kind, key.item)
    for name, tensor in content.tensors.items():
        writer.add_tensor(name, tensor.data, raw_dtype=tensor.type)
    finish(writer)
    return path


def finish(writer: gguf.GGUFWriter) -> None:
    """Writes all that was added to the writer, and closes the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_shards(directory: Path, content: GGUFContent, n_shards: int) -> Path:
    """Writes it as several files, and returns the first one's path."""
    names = list(content.tensors)
    paths = [directory / f"m-{no + 1:05d}-of-{n_shards:05d}.gguf" for no in range(n_shards)]
    for no, path in enumerate(paths):
        keys = {
            "split.no": StoredKey(no, gguf.GGUFValueType.UINT16),
            "split.count": StoredKey(n_shards, gguf.GGUFValueType.UINT16),
            "split.tensors.count": StoredKey(len(names), gguf.GGUFValueType.INT32),
        }
        tensors = {name: content.tensors[name] for name in names[no::n_shards]}
        write_content(path, GGUFContent(content.keys | keys if no == 0 else keys, tensors))
    return paths[0]
