"""The control groups around this process, of both versions, wherever they are mounted."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from slimoe.offload.resources.system_files import SYSTEM, SystemFiles


@dataclass(frozen=True, slots=True)
class ControlGroup:
    """The directory of a control group, and the version that says which files are in it."""

    path: Path
    version: Literal[1, 2]


def control_groups(controller: str, system: SystemFiles = SYSTEM) -> Iterator[ControlGroup]:
    """This process's group for a controller such as cpu or memory, and those around it, innermost first.

    A limit of any of them holds, so the tightest one decides. A group of version 2 is listed whether or not it has
    the controller: without it the controller's files are missing. Nothing is listed where there are no groups.
    """
    try:
        memberships = [line.split(":", 2) for line in (system.proc / "self" / "cgroup").read_text().splitlines()]
        mounts = (system.proc / "self" / "mountinfo").read_text().splitlines()
    except OSError:
        return
    for mount in mounts:
        place, _, kind_and_options = mount.partition(" - ")
        root, top = place.split()[3:5]
        kind, _, options = kind_and_options.split(" ", 2)
        version: Literal[1, 2] = 2 if kind == "cgroup2" else 1
        if kind not in ("cgroup", "cgroup2") or (version == 1 and controller not in options.split(",")):
            continue
        for _, controllers, path in memberships:
            if (controllers == "") if version == 2 else (controller in controllers.split(",")):
                yield from (ControlGroup(group, version) for group in _upwards(Path(top), root, path))


def _upwards(top: Path, root: str, path: str) -> list[Path]:
    """The directories from a group up to its mount, which shows the hierarchy from `root` on."""
    inside = PurePosixPath(path)
    if inside.is_relative_to(root):
        inside = inside.relative_to(root)
    if ".." in inside.parts:  # outside of what this namespace may see
        return [top]
    own = top / str(inside).lstrip("/")
    return [group for group in (own, *own.parents) if group.is_relative_to(top)]
