"""Names of records: the same for the same beginning of the same model, another one for everything else."""

import dataclasses
import random

import numpy as np
import pytest

from slimoe.offload.memory.prompt_record import (
    RECORD_BYTES,
    RecordForm,
    RecordName,
    TextKeys,
    block_tokens,
    content_of,
    digest,
)

FORM = RecordForm("model", "None", "F16", 16, ((2, 256), (2, 256)), ())
draw = random.Random(4)
TEXT = np.array([draw.randrange(500) for _ in range(100)], np.int32)


def names(tokens: "np.typing.NDArray[np.int32]", form: RecordForm = FORM) -> list[RecordName]:
    keys = TextKeys(form, tokens)
    return [keys.name(n) for n in range(1, len(tokens) + 1)]


def test_texts_have_the_names_of_what_they_begin_with() -> None:
    other = TEXT.copy()
    other[37] += 1
    assert names(TEXT)[:37] == names(other)[:37]
    assert set(names(TEXT)[37:]).isdisjoint(names(other))
    assert names(TEXT[:50]) == names(TEXT)[:50]
    assert len(set(names(TEXT))) == 100


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "other"},
        {"settings": "skip:0.1"},
        {"kind": "Q8_0"},
        {"n_block": 32},
        {"rows": ((2, 256), (2, 128))},
        {"states": (4,)},
    ],
    ids=str,
)
def test_another_model_has_other_names(changed: dict[str, object]) -> None:
    form = dataclasses.replace(FORM, **changed)  # type: ignore[arg-type]
    assert {name.root for name in names(TEXT, form)}.isdisjoint(name.root for name in names(TEXT))
    assert {name.key for name in names(TEXT, form)}.isdisjoint(name.key for name in names(TEXT))


def test_a_name_is_read_back() -> None:
    keys = TextKeys(FORM, TEXT)
    for name in (keys.name(7), keys.name(64), keys.name(100, "state12")):
        assert RecordName.parse(str(name)) == name
        assert keys.is_of(name)
        assert not TextKeys(FORM, TEXT[::-1]).is_of(name)
    assert not TextKeys(FORM, TEXT[:99]).is_of(keys.name(100))


@pytest.mark.parametrize("end", ["", ".kv.part", ".kv ", ".state", ".state12345", ".KV", ".kv/x"])
def test_other_names_are_nobodys(end: str) -> None:
    assert RecordName.parse(str(TextKeys(FORM, TEXT).name(7)).removesuffix(".kv") + end) is None


def test_states_are_cut_into_records_of_bearable_size() -> None:
    sizes = (5 << 20, 2 << 20, 2 << 20, RECORD_BYTES + 1, 1, 3 << 20)
    form = dataclasses.replace(FORM, states=sizes)
    keys = TextKeys(form, TEXT)
    parts = [form.part(keys.name(9, f"state{part}")) for part in range(form.n_parts)]
    assert [index for part in parts for index in part] == list(range(len(sizes)))
    held = [form.n_bytes(keys.name(9, f"state{part}")) for part in range(form.n_parts)]
    assert sum(held) == sum(sizes)
    assert all(n_bytes <= RECORD_BYTES or len(part) == 1 for n_bytes, part in zip(held, parts, strict=True))
    assert len(parts) == 4
    assert FORM.n_parts == 0


def test_blocks_of_bearable_size() -> None:
    for token_bytes in (1, 1000, 96 << 10, 128 << 10, 1 << 19, 1 << 30):
        n_tokens = block_tokens(token_bytes)
        assert n_tokens & (n_tokens - 1) == 0
        assert n_tokens == 16 or n_tokens * token_bytes <= RECORD_BYTES
        assert n_tokens == 32 or 2 * n_tokens * token_bytes > RECORD_BYTES
    assert FORM.n_tokens(TextKeys(FORM, TEXT).name(64)) == 16
    assert FORM.n_bytes(TextKeys(FORM, TEXT).name(67)) == 3 * 1024


def test_content_is_what_was_written_or_none() -> None:
    name = TextKeys(FORM, TEXT).name(67)
    head = TextKeys(FORM, TEXT).head(name)
    content = np.arange(3 * 1024, dtype=np.uint32).view(np.uint8)[: 3 * 1024]
    data = head + content.tobytes() + digest(head, content)
    read = content_of(data, head, content.nbytes)
    assert read is not None
    np.testing.assert_array_equal(read, content)
    for place in range(0, len(data), 7):
        assert content_of(data[:place], head, content.nbytes) is None
        assert content_of(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :], head, content.nbytes) is None
    assert content_of(data + b"x", head, content.nbytes) is None
    other = TextKeys(FORM, TEXT[1:])
    assert content_of(data, other.head(other.name(67)), content.nbytes) is None
