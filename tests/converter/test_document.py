"""Documents of strangers become values of the wanted types, or errors that say where and why."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import UNSET, UnsetType

from slimoe.converter.document import BadDocumentError, decode_json, decode_toml, read_json
from slimoe.offload.errors import ModelFileError


class Sizes(msgspec.Struct):
    n_layer: int
    eps: float | UnsetType | None = UNSET
    names: dict[str, int] = {}


def test_values_have_the_types_of_their_fields() -> None:
    data = b'{"n_layer": 3, "eps": 1, "names": {"a": 1}, "other": [[{}], 1e999, 99999999999999999999999]}'
    sizes = decode_json(data, Sizes)
    assert sizes == Sizes(3, 1.0, {"a": 1})
    assert isinstance(sizes.eps, float)
    assert decode_json(b'{"n_layer": 3, "eps": null}', Sizes).eps is None
    assert decode_json(b'{"n_layer": 3}', Sizes).eps is UNSET
    assert decode_toml(b"n_layer = 3\nnames.a = 1", Sizes) == Sizes(3, UNSET, {"a": 1})


def test_infinity_is_read_as_transformers_5_spells_it() -> None:
    """Python's json module writes the word, which is none of JSON."""
    text = '{"Infinity": [0.0, Infinity], "-Infinity": -Infinity, "a": "\\\\\\" Infinity"}'
    found = decode_json(text.encode(), dict[str, Any])
    assert found["Infinity"] == [0.0, {"__float__": "Infinity"}]
    assert (found["-Infinity"], found["a"]) == ({"__float__": "-Infinity"}, json.loads(text)["a"])
    assert decode_json(b'{"n_layer": 3, "other": [0.0, Infinity]}', Sizes) == Sizes(3)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b'{"n_layer": "3"}', "n_layer: expected int, got str"),
        (b'{"n_layer": true}', "n_layer: expected int, got bool"),
        (b'{"n_layer": 3.5}', "n_layer: expected int, got float"),
        (b'{"n_layer": 3, "eps": []}', "eps: expected float | null, got array"),
        (b'{"n_layer": 3, "eps": 1e999}', "eps: number out of range"),
        (b'{"n_layer": 3, "eps": NaN}', "not readable as JSON"),
        (b'{"n_layer": 3, "eps": Infinity}', "eps: expected float | null, got object"),
        (b'{"n_layer": 3, "other": Infinity', "not readable as JSON"),
        (b'"' + b'\\"' * 500_000, "not readable as JSON"),
        (b'{"n_layer": 3, "names": {"a": {}}}', "expected int, got object"),
        (b"[]", "the whole of it: expected object, got array"),
        (b'{"eps": 1}', "missing required field n_layer"),
        (b'{"n_layer": 3', "not readable as JSON"),
        (b"", "not readable as JSON"),
        (b'\xef\xbb\xbf{"n_layer": 3}', "not readable as JSON"),
        (b'{"n_layer": 3, "names": {"\xff": 1}}', "not readable as JSON"),
        (b'{"n_layer": 3, "other": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"n_layer": 3, "names": ' + b'{"a":' * 100_000, "expected int, got object"),
        (b'{"n_layer": ' + b"9" * 5000 + b"}", "out of range"),
        (b" " * 200, "larger than 150 bytes"),
    ],
)
def test_json_that_is_not_as_expected_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(BadDocumentError) as caught:
        decode_json(data, Sizes, 150 if data.isspace() else 1 << 20)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"n_layer = '3'", "n_layer: expected int, got str"),
        (b"n_layer = \xff", "not readable as TOML"),
        (b"n_layer = 3\nn_layer = 4", "not readable as TOML"),
        (b"n_layer = " + b"[" * 10_000, "nested too deeply"),
        (b"n_layer = 3\n" + b"a." * 40_000 + b"b = 1", "larger than 16,384 bytes"),
    ],
)
def test_toml_that_is_not_as_expected_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(BadDocumentError) as caught:
        decode_toml(data, Sizes)
    assert problem in str(caught.value)


def test_a_deep_value_of_any_type_is_refused() -> None:
    with pytest.raises(BadDocumentError, match="nested too deeply"):
        decode_json(b"[" * 100_000, list[Any])


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(ModelFileError, match=r"config\.json: the file cannot be read"):
        read_json(path, Sizes)
    path.write_text('{"n_layer": {}}')
    with pytest.raises(ModelFileError, match=r"config\.json: n_layer: expected int, got object\. Download"):
        read_json(path, Sizes)
    path.write_text('{"n_layer": 2}')
    assert read_json(path, Sizes) == Sizes(2)
    with pytest.raises(ModelFileError, match="larger than 10 bytes"):
        read_json(path, Sizes, 10)
