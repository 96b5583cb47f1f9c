"""A machine's control groups as files: where they are mounted, which of them this process is in, and their limits."""

from pathlib import Path

from slimoe.offload.resources.system_files import SystemFiles


class ControlGroupFiles:
    """The kernel's files of a machine whose control groups these are; none are mounted at first."""

    def __init__(self, directory: Path) -> None:
        self.system = SystemFiles(directory / "proc", directory / "cpu")
        self._top, self._proc = directory / "cgroup", directory / "proc" / "self"
        self.write(self._proc, {"cgroup": "", "mountinfo": "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"})

    def mount(self, controllers: str, *, own: str = "/", root: str = "/", at: str | None = None) -> None:
        """Mounts a hierarchy of version 1, or without controllers that of version 2, with this process in `own`."""
        point = self._top / (controllers if at is None else at)
        system = f"cgroup cgroup rw,{controllers}" if controllers else "cgroup2 cgroup2 rw,nsdelegate"
        with (self._proc / "mountinfo").open("a") as mounts:
            mounts.write(f"31 22 0:28 {root} {point} rw,nosuid shared:4 - {system}\n")
        with (self._proc / "cgroup").open("a") as memberships:
            memberships.write(f"{4 if controllers else 0}:{controllers}:{own}\n")

    def limit(self, group: str, **files: str | int) -> None:
        """Writes files of a group; two underscores in a name stand for a dot."""
        named = {name.replace("__", "."): f"{text}\n" for name, text in files.items()}
        self.write(self._top / group.strip("/"), named)

    @staticmethod
    def write(directory: Path, files: dict[str, str]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (directory / name).write_text(text)
