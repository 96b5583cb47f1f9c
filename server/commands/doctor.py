"""`slimoe doctor`: which ggml computes here, what this machine has, and what would make it faster."""

import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec
from gguf import GGMLQuantizationType

from slimoe.offload.errors import LibraryError
from slimoe.offload.ggml.library import ENVIRONMENT, Refusal, candidates, ggml_version, no_library, wanted
from slimoe.offload.ggml.packages import NATIVE, Library
from slimoe.offload.machine.measurement_cache import MeasurementCache, processor_name
from slimoe.offload.printable import printable
from slimoe.offload.resources.memory import holdable_bytes, human
from slimoe.offload.resources.processors import default_threads, usable_processors
from slimoe.server.child_python import module_command
from slimoe.server.options.installed import version_of
from slimoe.server.terminal.measurements import measurement_lines

_SCRIPT = Path(__file__).parents[2] / "scripts" / "install"
_WITHOUT_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
"""What keeps out ggml's AMX code, which GCC breaks."""
_TYPE = "Q4_K"
_MEASURED_GAIN = 2.4
"""How much faster prompts were read by a build with AVX-512 than by the prebuilt one (bench/RESULTS.md)."""


@dataclass(frozen=True, slots=True)
class InstalledLibrary:
    """A package with ggml: `problem` is why it cannot be used, None where it can. The first that can be is in use."""

    package: str
    version: str
    folder: str
    problem: str | None


@dataclass(frozen=True, slots=True)
class Products:
    """Milliseconds for the product of an expert's matrix of 7168 x 2048 in Q4_K with one token, and with 128."""

    one_ms: float
    batch_ms: float


@dataclass(frozen=True, slots=True)
class FoundDevice:
    """A device besides the CPU, and its memory in bytes."""

    name: str
    description: str
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Findings:
    """All that was found about this machine and what is installed on it.

    `has` and `uses` are instructions of the processor and of the library in use, None where they are unknown;
    `products` are by package, none without --measure; `measured` is what earlier starts have remembered, by name.
    """

    slimoe: str
    python: str
    system: str
    processor: str
    n_processors: int
    n_threads: int
    memory_bytes: int
    libraries: tuple[InstalledLibrary, ...]
    ggml: str | None
    has: tuple[str, ...] | None
    uses: tuple[str, ...] | None
    devices: tuple[FoundDevice, ...]
    products: Mapping[str, Products]
    measured: Mapping[str, Any]
    advice: str


@click.command("doctor")
@click.option("--measure", is_flag=True, help="Measure how fast each installed ggml multiplies here, in seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def command(measure: bool, as_json: bool) -> int:
    """Say which ggml computes here, what this machine has, and what would make it faster.

    The exit status is 5 where no ggml can be used.
    """
    findings = _find(list(candidates()), measure)
    if as_json:
        click.echo(msgspec.json.encode(findings))
    else:
        for line in _lines(findings):
            click.echo(printable(line))
    return 0 if findings.ggml else LibraryError.exit_code


def _find(found: Sequence[Library | Refusal], measure: bool) -> Findings:
    usable = [each for each in found if isinstance(each, Library)]
    libraries = []
    for each in found:
        library, problem = (each, None) if isinstance(each, Library) else (each.library, each.why)
        libraries.append(InstalledLibrary(library.package.name, library.version, str(library.folder), problem))
    uses = has = None
    devices: tuple[FoundDevice, ...] = ()
    if usable:
        # Importing these opens the library.
        from slimoe.offload.ggml.cpu_features import library_features, processor_features
        from slimoe.offload.ggml.devices import available_devices

        uses, has = library_features(), processor_features()
        devices = tuple(FoundDevice(d.name, d.description, d.free_bytes, d.total_bytes) for d in available_devices())
    products = _products(usable) if measure else {}
    unused = [name for name in has or () if name not in (uses or ())]
    return Findings(
        version_of("slimoe"),
        platform.python_version(),
        platform.platform(),
        processor_name(),
        usable_processors(),
        default_threads(),
        holdable_bytes(),
        tuple(libraries),
        ggml_version() if usable else None,
        has,
        uses,
        devices,
        products,
        MeasurementCache().known() if usable else {},
        _advice(found, unused, products),
    )


def _products(usable: Sequence[Library]) -> Mapping[str, Products]:
    """How fast each library multiplies; those that cannot be measured are left out.

    A process has one library only, so that several are measured by processes of their own.
    """
    products = dict[str, Products]()
    if len(usable) == 1:
        from slimoe.offload.ggml.cpu_backend import CpuBackend
        from slimoe.offload.machine.probe import measured_speeds

        speeds = measured_speeds([GGMLQuantizationType[_TYPE]], CpuBackend(default_threads()))
        for speed in speeds.values():
            one, batch = (min(speed.expert.plain[at], speed.expert.repacked[at]) for at in (0, -1))
            products[usable[0].package.name] = Products(round(1e3 * one, 3), round(1e3 * batch, 3))
        return products
    for library in usable:
        command = (*module_command("slimoe.server.cli"), "doctor", "--measure", "--json")
        done = subprocess.run(
            command, env={**os.environ, ENVIRONMENT: library.package.name}, capture_output=True, check=False
        )
        if done.returncode == 0:
            products |= msgspec.json.decode(done.stdout, type=_Measured).products
    return products


class _Measured(msgspec.Struct):
    products: dict[str, Products]


def _advice(found: Sequence[Library | Refusal], unused: Sequence[str], products: Mapping[str, Products]) -> str:
    """What would make this machine faster, and the command for it."""
    usable = [each for each in found if isinstance(each, Library)]
    if not usable:
        return str(no_library([each for each in found if isinstance(each, Refusal)]))
    more = f"use {', '.join(unused)} as well" if unused else "fit this processor"
    flags = f'CFLAGS="{_WITHOUT_AMX}" CXXFLAGS="{_WITHOUT_AMX}" ' if platform.machine() in ("x86_64", "AMD64") else ""
    pip = f"CMAKE_ARGS=-DGGML_RPC=ON {flags}{sys.executable} -m {NATIVE.install} --no-cache-dir"
    command = f"{_SCRIPT} native" if _SCRIPT.exists() else pip
    build = f"That takes some minutes and a C++ compiler: {command}"
    if usable[0].package != NATIVE:
        gain = f" With AVX-512 prompts were read {_MEASURED_GAIN:g} times as fast, answers as before."
        return f"A ggml built on this machine would {more}.{gain if 'AVX512' in unused else ''} {build}"
    if unused:
        return f"This ggml was not built for this processor. A new one would {more}. {build}"
    native, others = products.get(NATIVE.name), [each for name, each in products.items() if name != NATIVE.name]
    if native is None or not others:
        return "ggml was built for this processor: nothing is left to do."
    one, batch = others[0].one_ms / native.one_ms, others[0].batch_ms / native.batch_ms
    return f"ggml was built for this processor: {batch:.2f} times as fast for prompts, {one:.2f} for answers."


def _lines(findings: Findings) -> list[str]:
    rows = [f"slimoe {findings.slimoe}, Python {findings.python}, {findings.system}"]
    used = next((library for library in findings.libraries if library.problem is None), None)
    for library in findings.libraries:
        state = f": ggml {findings.ggml}, in use" if library is used else " could be used"
        rows.append(f"library     {library.problem or f'{library.package} {library.version}{state}'}")
        rows += [f"            in {library.folder}"] if library is used else []
    if not findings.libraries:
        rows.append(f"library     none of {', '.join(package.name for package in wanted())} is installed")
    rows.append(
        f"processor   {findings.processor}, {findings.n_processors} processors, {findings.n_threads} threads by default"
    )
    rows += [f"  it has    {' '.join(findings.has)}"] if findings.has else []
    rows += [f"  ggml uses {' '.join(findings.uses)}"] if findings.uses else []
    rows.append(f"memory      {human(findings.memory_bytes)} can be held now")
    devices = [
        f"{d.name} ({d.description}), {human(d.free_bytes)} of {human(d.total_bytes)} free" for d in findings.devices
    ]
    rows += [f"device      {device}" for device in devices or ["none besides the CPU"]]
    rows += [
        f"products    {name}: {products.one_ms:g} ms with one token, {products.batch_ms:g} ms with 128"
        for name, products in findings.products.items()
    ]
    for name, value in findings.measured.items():
        rows += [f"measured    {name}", *(f"            {line}" for line in measurement_lines(name, value))]
    return [*rows, "", findings.advice]
