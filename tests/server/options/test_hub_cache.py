"""Names on the hub lead to files in the cache that huggingface_hub itself finds there, and nothing is downloaded."""

import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE

from slimoe.offload.errors import SlimoeError, UsageError
from slimoe.server.cli import run
from slimoe.server.options.hub_cache import HubName, hub_cache

COMMIT, OLDER = "a" * 40, "b" * 40
FILES = (
    "model-Q4_K.gguf",
    "model-Q4_K_M.gguf",
    "model-IQ4_XS.gguf",
    "Q8_0/model-Q8_0-00001-of-00002.gguf",
    "Q8_0/model-Q8_0-00002-of-00002.gguf",
    "mmproj-model-f16.gguf",
)


def put(cache: Path, repo: str, names: tuple[str, ...], commit: str = COMMIT, ref: str | None = "main") -> Path:
    """A repository in the cache, in the layout of huggingface_hub: blobs, and snapshots of links to them."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    for name in names:
        blob, link = folder / "blobs" / f"{abs(hash((commit, name)))}", folder / "snapshots" / commit / name
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob.write_text(name)
        link.symlink_to(os.path.relpath(blob, link.parent))
    if ref is not None:
        (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return folder / "snapshots" / commit


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    put(tmp_path, "org/many-GGUF", FILES)
    put(tmp_path, "org/one", ("only.gguf", "README.md"))
    put(tmp_path, "org/one", ("old.gguf",), OLDER, "refs/pr/1".removeprefix("refs/"))
    put(tmp_path, "org/checkpoint", ("config.json", "model.safetensors"))
    put(tmp_path, "org/both", ("config.json", "model.safetensors", "model.gguf"))
    put(tmp_path, "org/texts", ("README.md",))
    put(tmp_path, "gpt2", ("gpt2.gguf",))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "repo", "file"),
    [
        ("hf:org/one", "org/one", "only.gguf"),
        ("hf:gpt2", "gpt2", "gpt2.gguf"),
        ("hf:org/many-GGUF:Q4_K", "org/many-GGUF", "model-Q4_K.gguf"),
        ("hf:org/many-GGUF:q4_k_m", "org/many-GGUF", "model-Q4_K_M.gguf"),
        ("hf:org/many-GGUF:IQ4_XS@main", "org/many-GGUF", "model-IQ4_XS.gguf"),
        ("hf:org/many-GGUF:model-Q4_K.gguf", "org/many-GGUF", "model-Q4_K.gguf"),
        ("hf:org/many-GGUF:model-Q4_K", "org/many-GGUF", "model-Q4_K.gguf"),
        ("hf:org/many-GGUF:Q8_0", "org/many-GGUF", "Q8_0/model-Q8_0-00001-of-00002.gguf"),
        ("hf:org/both", "org/both", "model.gguf"),
    ],
)
def test_files_are_those_of_the_library(cache: Path, name: str, repo: str, file: str) -> None:
    assert str(HubName.parse(name).path(cache)) == try_to_load_from_cache(repo, file, cache_dir=cache)


@pytest.mark.parametrize("revision", ["pr/1", OLDER, OLDER[:8]])
def test_revisions(cache: Path, revision: str) -> None:
    found = HubName.parse(f"hf:org/one@{revision}").path(cache)
    assert str(found) == try_to_load_from_cache("org/one", "old.gguf", cache_dir=cache, revision=OLDER)


def test_checkpoints_are_directories(cache: Path) -> None:
    expected = snapshot_download("org/checkpoint", cache_dir=cache, local_files_only=True)
    assert str(HubName.parse("hf:org/checkpoint").path(cache)) == expected
    both = HubName.parse("hf:org/both")
    assert both.path(cache, prefers_checkpoint=True) == both.path(cache).parent


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hf:org/absent", "hf download org/absent"),
        ("hf:org/absent@v2", "hf download org/absent --revision v2"),
        ("hf:org/one@v9", f"@{OLDER}"),
        ("hf:org/texts", "no GGUF file and no checkpoint"),
        ("hf:org/many-GGUF:Q5_K", "hf:org/many-GGUF:model-Q4_K.gguf"),
        ("hf:org/many-GGUF:Q4", "hf:org/many-GGUF:model-Q4_K.gguf"),
    ],
)
def test_what_is_not_there_says_how_to_get_it(cache: Path, name: str, words: str) -> None:
    with pytest.raises(SlimoeError) as failure:
        HubName.parse(name).path(cache)
    assert failure.value.exit_code == 3
    assert words in str(failure.value)
    assert str(cache) in str(failure.value)


def test_several_are_listed(cache: Path) -> None:
    with pytest.raises(UsageError) as failure:
        HubName.parse("hf:org/many-GGUF").path(cache)
    listed = [line.strip() for line in str(failure.value).splitlines()[1:]]
    assert listed == [
        f"hf:org/many-GGUF:{name}" for name in sorted(FILES) if "mmproj" not in name and "2-of" not in name
    ]
    for name in listed:
        assert HubName.parse(name).path(cache).exists()


def test_a_download_that_broke_off(cache: Path) -> None:
    shutil.rmtree(cache / "models--org--one" / "blobs")
    with pytest.raises(SlimoeError, match="leads to no file") as failure:
        HubName.parse("hf:org/one").path(cache)
    assert "hf download org/one only.gguf" in str(failure.value)


@pytest.mark.parametrize(
    "name",
    ["hf:", "hf:/", "hf:../../etc", "hf:a/b/c", "hf:a/..", "hf:org/one@../x", "hf:org/one:", "hf:org/o ne", "hf:-x/y"],
)
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(UsageError, match="hf:ORG/NAME"):
        HubName.parse(name)


def test_the_cache_is_where_the_library_looks() -> None:
    assert hub_cache() == Path(HF_HUB_CACHE)
    assert hub_cache({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}) == Path("/a")
    assert hub_cache({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}) == Path("/b/hub")
    assert hub_cache({"XDG_CACHE_HOME": "/c"}) == Path("/c/huggingface/hub")
    assert hub_cache({}) == Path("~/.cache/huggingface/hub").expanduser()


def test_commands_take_them(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    link = put(tmp_path, "org/tiny", ("tiny.gguf",)) / "tiny.gguf"
    link.unlink()
    link.symlink_to(tiny_model)
    put(tmp_path, "org/checkpoint", ("config.json", "model.safetensors"))
    flags = ["--ctx", "64", "--threads", "1", "--prompt-ids", "5", "-n", "1"]
    assert run(["run", "hf:org/tiny", *flags]) == 0
    assert run(["inspect", "hf:org/tiny"]) == 0
    assert run(["plan", "hf:org/tiny", "--ctx", "64", "--no-measure"]) == 0
    capfd.readouterr()
    assert run(["run", "hf:org/checkpoint", *flags]) == 3
    assert "slimoe convert" in capfd.readouterr().err
    assert run(["serve", "hf:org/absent", "--port", "0"]) == 3
    assert "hf download org/absent" in capfd.readouterr().err
