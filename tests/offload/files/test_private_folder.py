"""Folders that only their owner reads."""

from pathlib import Path

import pytest

from slimoe.offload.errors import UsageError
from slimoe.offload.files.private_folder import make_private


def test_it_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    for _ in range(2):
        make_private(tmp_path / "a" / "b", "--some")
        assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700


def test_one_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir(mode=0o750)
    make_private(tmp_path / "shared", "--some")
    assert (tmp_path / "shared").stat().st_mode & 0o777 == 0o750


def test_what_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        with pytest.raises(UsageError, match=rf"^--some: {path} cannot be a folder"):
            make_private(path, "--some")
    assert (tmp_path / "file").read_text() == "x"


def test_one_that_everybody_writes_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(UsageError, match="everybody may write"):
        make_private(tmp_path, "--some")
