"""The packages that install ggml and llama.cpp as C libraries, and where their files lie."""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

NAMES = {"linux": "lib{}.so.0", "darwin": "lib{}.0.dylib", "win32": "{}.dll"}
"""The names by which the libraries of one package know each other, by `sys.platform`. Packages install further copies
of each: opening one of those maps a second ggml, with devices of its own."""
PARTS = ("ggml-base", "ggml-cpu", "ggml", "llama")
"""The libraries that are always needed; ggml-rpc is needed for the devices of other machines alone."""


@dataclass(frozen=True, slots=True)
class Package:
    """A package with ggml and libllama: its name, the module it is found by, and the folder of its files in that.

    `single` is the first part of the file's name where one file has all functions. `wanted` is the version that
    pyproject.toml names, empty where it names none.
    """

    name: str
    module: str
    folder: str = ""
    single: str = ""
    wanted: str = ""

    def find(self) -> "Library | None":
        """Its library on this machine; None where it is not installed."""
        spec = importlib.util.find_spec(self.module)
        if spec is None or spec.origin is None:
            return None
        return Library(self, Path(spec.origin).parent / self.folder)

    @property
    def install(self) -> str:
        """The command that installs it, without a compiler's settings."""
        return f"pip install {self.name}" + (f"=={self.wanted}" if self.wanted else "")


@dataclass(frozen=True, slots=True)
class Library:
    """The files that a package installed in a folder."""

    package: Package
    folder: Path

    def path(self, part: str) -> Path:
        """The file with the functions of one library, such as `ggml-base`, whether it is there or not."""
        if not self.package.single:
            return self.folder / NAMES.get(sys.platform, NAMES["linux"]).format(part)
        ending = ".pyd" if sys.platform == "win32" else ".abi3.so"
        return self.folder / (self.package.single + ending)

    @property
    def files(self) -> list[Path]:
        """The files that differ between two builds of it."""
        if self.package.single:
            return [self.path("ggml")]
        return sorted(path for path in self.folder.glob("*ggml*") if path.is_file())

    @property
    def version(self) -> str:
        """The package's version, by its metadata beside the module; `?` where there is none."""
        modules = self.folder.parent if not self.package.folder else self.folder.parent.parent
        found = sorted(modules.glob(f"{self.package.name.replace('-', '_')}-*.dist-info"))
        return found[0].name.removesuffix(".dist-info").partition("-")[2] if found else "?"

    def __str__(self) -> str:
        """The package and its version."""
        return f"{self.package.name} {self.version}"


NATIVE = Package("llama-cpp-python", "llama_cpp", folder="lib", wanted="0.3.36")
"""The package that pip builds from source for the processor it runs on."""
PREBUILT = Package("xllamacpp", "xllamacpp", single="xllamacpp", wanted="2026.10.11549")
"""The package that slimoe depends on: compiled, for many systems, without RPC."""
PACKAGES = (NATIVE, PREBUILT, Package("llama-cpp-py-sync", "llama_cpp_py_sync"))
"""Where a library is looked for, in this order: what was built for the machine comes first."""
