"""Models by their name on the Hugging Face hub, such as `hf:org/name:Q4_K_M`, found in the local cache.

Nothing is downloaded and no library is asked: the cache is folders, as huggingface_hub lays them out.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from slimoe.offload.errors import ModelFileError, UsageError
from slimoe.offload.gguf.header import SHARD_NAME

PREFIX = "hf:"
_NAME = re.compile(r"(?P<repo>\w[\w.-]*(?:/\w[\w.-]*)?)(?::(?P<part>[^@\0]+))?(?:@(?P<revision>\w[\w./-]*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{7,40}")


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository, the `part` of it that is meant (a file or a type of weights), and a revision."""

    repo: str
    part: str | None
    revision: str | None

    @classmethod
    def parse(cls, text: str) -> "HubName":
        """Reads a name with its prefix; raises UsageError for what is none."""
        found = _NAME.fullmatch(text.removeprefix(PREFIX))
        if found is None or ".." in (found["repo"] + (found["revision"] or "")).replace("/", "."):
            raise UsageError(
                f"{text!r} is no name of a model on the hub. Write hf:ORG/NAME, and behind it :FILE or :TYPE and "
                "@REVISION if need be, such as hf:org/name-GGUF:Q4_K_M."
            )
        return cls(found["repo"], found["part"], found["revision"])

    @property
    def _download(self) -> str:
        revision = "" if self.revision is None else f" --revision {self.revision}"
        return f"Download it: hf download {self.repo}{revision}"

    def path(self, cache: Path, *, prefers_checkpoint: bool = False) -> Path:
        """The GGUF file, or the checkpoint's directory where there is none; raises SlimoeError where neither is."""
        snapshot = self._snapshot(cache)
        files = {path.relative_to(snapshot).as_posix(): path for path in sorted(snapshot.rglob("*.gguf"))}
        is_checkpoint = (snapshot / "config.json").exists() or any(snapshot.glob("*.safetensors"))
        if self.part is None and is_checkpoint and (prefers_checkpoint or not files):
            return snapshot
        fitting = [name for name in files if _is_model(name) and self._means(name)]
        exact = [name for name in fitting if self.part in (name, name.rpartition("/")[2])]
        fitting = exact or fitting
        if len(fitting) == 1:
            return self._whole(files[fitting[0]])
        choices = "".join(f"\n  hf:{self.repo}:{name}" for name in fitting or filter(_is_model, files))
        if fitting:
            raise UsageError(f"{self} has {len(fitting)} models in the cache. Name one:{choices}")
        have = f" These are there:{choices}" if choices else ""
        missing = "no GGUF file and no checkpoint" if self.part is None else f"nothing that {self.part!r} names"
        raise ModelFileError(str(self), f"there is {missing} in {snapshot}.", f"{self._download}.{have}")

    def __str__(self) -> str:
        part = "" if self.part is None else f":{self.part}"
        return f"{PREFIX}{self.repo}{part}" + ("" if self.revision is None else f"@{self.revision}")

    def _snapshot(self, cache: Path) -> Path:
        folder = cache / f"models--{self.repo.replace('/', '--')}"
        if not folder.is_dir():
            raise ModelFileError(str(self), f"it is not in the cache {cache}.", f"{self._download}.")
        revision = self.revision or "main"
        reference = folder / "refs" / revision
        commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
        snapshots = folder / "snapshots"
        found = sorted(path for path in snapshots.glob("*") if path.is_dir())
        fitting = [path for path in found if path.name == commit] or [
            path for path in found if _COMMIT.fullmatch(commit) and path.name.startswith(commit)
        ]
        if len(fitting) == 1:
            return fitting[0]
        have = "".join(f"\n  {PREFIX}{self.repo}@{path.name}" for path in found)
        hint = f"{self._download}, or name one that is there:{have}" if have else f"{self._download}."
        raise ModelFileError(str(self), f"revision {revision} is not in {folder}.", hint)

    def _means(self, name: str) -> bool:
        """Whether the part is this file, its name without the ending, or the type of weights that the name tells."""
        if self.part is None:
            return True
        part, last = self.part, name.rpartition("/")[2]
        if part in (name, last, name.removesuffix(".gguf"), last.removesuffix(".gguf")):
            return True
        shard = SHARD_NAME.match(last)
        if shard is not None and part == shard["stem"]:
            return True
        return re.search(rf"(?<![A-Za-z0-9_]){re.escape(part)}(?![A-Za-z0-9_])", name, re.IGNORECASE) is not None

    def _whole(self, path: Path) -> Path:
        """The file, unless its download has broken off, which leaves a link that leads nowhere."""
        if not path.exists():
            raise ModelFileError(path, "the link leads to no file.", f"{self._download} {path.name}.")
        return path


def _is_model(name: str) -> bool:
    """Whether a file is a model, or the first shard of one; what belongs to images is none."""
    last = name.rpartition("/")[2]
    shard = SHARD_NAME.match(last)
    return not last.startswith("mmproj") and (shard is None or int(shard["no"]) == 1)


def hub_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """Where the hub's cache is, by the variables that huggingface_hub reads."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environment.get(name):
            return Path(os.path.expandvars(environment[name])).expanduser()
    home = environment.get("HF_HOME") or f"{environment.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    return Path(os.path.expandvars(home)).expanduser() / "hub"


class ModelPath(click.Path):
    """The path of a model; a name with `hf:` before it is looked up in the cache."""

    def __init__(self, *, prefers_checkpoint: bool = False) -> None:
        super().__init__(path_type=Path)
        self._prefers_checkpoint = prefers_checkpoint

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Gives the path; raises SlimoeError for a model that is not in the cache."""
        if isinstance(value, str) and value.startswith(PREFIX):
            return HubName.parse(value).path(hub_cache(), prefers_checkpoint=self._prefers_checkpoint)
        return super().convert(value, param, ctx)
