"""Commands that are to end well or in a sentence whatever the system does to them, and how that is evaluated."""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from bench.faults.forked_commands import Ended, ForkedCommands
from bench.faults.library import ALWAYS, Fault
from slimoe.converter.convert import ConvertOptions, convert
from slimoe.converter.forward.texts import held_out_texts
from slimoe.offload.errors import SlimoeError
from slimoe.offload.gguf.header import read_gguf
from slimoe.server.options.engine_options import DEMO

RIGHT, CLEAR, WRONG = "right", "clear", "wrong"
_STATUSES = range(1, 7)
_OLD = b"what was there before"
_WHOLE = "is whole, but"
_CLEAR_LINES = ("slimoe: ", "libgomp: Thread creation failed")
"""OpenMP ends the process by itself where threads that were given a moment before are refused."""
_TOO_SMALL = re.compile(r"Raise --ram to (\S+),")

_READS: tuple[tuple[str, str], ...] = (
    *(("read", kind) for kind in ("short", "EINTR", "EIO", "end")),
    *(("open", kind) for kind in ("EMFILE", "EACCES")),
    ("map", "ENOMEM"),
)
_WRITES: tuple[tuple[str, str], ...] = (
    *(("write", kind) for kind in ("short", "EINTR", "EIO", "ENOSPC", "EDQUOT")),
    *(("sync", kind) for kind in ("EIO", "EINVAL")),
    *(("open", kind) for kind in ("ENOSPC", "EROFS")),
    *(("rename", kind) for kind in ("EACCES", "EIO")),
    *(("mkdir", kind) for kind in ("EROFS", "ENOSPC")),
    *(("lock", kind) for kind in ("EIO", "ENOLCK")),
    ("truncate", "EFBIG"),
    ("allocate", "ENOSPC"),
)
_SYSTEM = (("thread", "EAGAIN"), ("memory", "ENOMEM"))


class BrokenBenchError(SlimoeError):
    """A command fails without any fault."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where a case's files are: `sources` hold what is read, `results` what is written, emptied before each case."""

    sources: Path
    results: Path

    @classmethod
    def make(cls, directory: Path) -> "Places":
        """Makes the folders and the files to read below a directory."""
        places = cls(directory / "sources", directory / "results")
        places.sources.mkdir()
        shutil.copy2(DEMO, places.model)
        convert(ConvertOptions(places.model, places.exact_model, "F32"))
        text = max((one.path for one in held_out_texts()), key=lambda path: path.stat().st_size)
        places.text.write_bytes(text.read_bytes()[:30_000])
        return places

    @property
    def model(self) -> Path:
        """The model that all commands read."""
        return self.sources / "model.gguf"

    @property
    def exact_model(self) -> Path:
        """The same model in F32, whose results do not depend on batches."""
        return self.sources / "exact.gguf"

    @property
    def text(self) -> Path:
        """A text of prose to calibrate on."""
        return self.sources / "text.txt"

    @property
    def statistics(self) -> Path:
        """The statistics of the model's calibration."""
        return self.sources / "model.stats"

    @property
    def target(self) -> Path:
        """The file that a command writes, if it writes one."""
        return self.results / "result"

    def clear(self, *, with_old: bool) -> None:
        """Empties the folder of results, but for an older file under the target's name if wanted."""
        shutil.rmtree(self.results, ignore_errors=True)
        self.results.mkdir()
        if with_old:
            self.target.write_bytes(_OLD)


@dataclass(frozen=True, slots=True)
class Scenario:
    """A command, what of its result is compared, and calls and kinds of faults that its files may meet."""

    name: str
    arguments: tuple[str, ...]
    content: Callable[[Ended, Places], object]
    reads: Sequence[tuple[str, str]] = _READS
    writes: Sequence[tuple[str, str]] = _WRITES
    resumes: bool = False

    def faults(self) -> list[Fault]:
        """A fault of each kind that the command may meet, at the first call, once."""
        return [
            *(Fault(call, kind, pattern="/sources/") for call, kind in self.reads),
            *(Fault(call, kind, pattern="/results") for call, kind in self.writes),
            *(Fault(call, kind) for call, kind in _SYSTEM),
        ]


def make_scenarios(places: Places, commands: ForkedCommands, *, calibrates: bool) -> list[Scenario]:
    """All scenarios, or those without a calibration, once the files that they need are made.

    Raises BrokenBenchError.
    """
    places.clear(with_old=False)
    model, target, statistics = str(places.model), str(places.target), str(places.statistics)
    few = ["--text", str(places.text), "--tokens", "2048", "--length", "64", "--types", "none", "--device", "cpu"]
    calibrate = ("calibrate", model, "-o", target, *few, "--no-sensitivity", "--force")
    plain = ("convert", model, target, "--type", "Q8_0", "--threads", "2", "--force")
    compress = (*plain, "--stats", statistics, "--keep-experts", "4", "--no-report")
    greedy = ("--prompt-ids", "1,300,400,500", "-n", "8", "--temp", "0", "--json", "--ctx", "256")
    run = ("run", str(places.exact_model), *greedy)
    if calibrates:
        _must(commands.run([statistics if word == target else word for word in calibrate]))
    least = _TOO_SMALL.search(commands.run([*run, "--ram", "1MiB"]).err)
    if least is None:
        raise BrokenBenchError("slimoe run --ram 1MiB does not say how much it needs.")
    scenarios = [
        Scenario("convert", plain, _file_bytes),
        Scenario("run", (*run, "--ram", least[1]), _tokens, writes=()),
        Scenario("inspect", ("inspect", model, "--json"), _printed, writes=()),
    ]
    if calibrates:
        scenarios.append(Scenario("compress", compress, _file_bytes))
        scenarios.append(Scenario("calibrate", calibrate, _measured, resumes=True))
    return scenarios


def _must(ended: Ended) -> Ended:
    if ended.status != 0:
        raise BrokenBenchError(f"A command ends with status {ended.status} without any fault: {ended.err[-500:]}")
    return ended


def expected(scenario: Scenario, places: Places, commands: ForkedCommands) -> object:
    """The content that the command makes without any fault; raises BrokenBenchError."""
    places.clear(with_old=False)
    return scenario.content(_must(commands.run(scenario.arguments)), places)


def evaluate(ended: Ended, scenario: Scenario, places: Places, right: object, *, with_old: bool) -> tuple[str, str]:
    """Whether a command under a fault ended RIGHT, CLEAR or WRONG, and why."""
    litter = sorted(path.name for path in places.results.iterdir() if path != places.target)
    if scenario.resumes:
        litter = [name for name in litter if name != "result.partial"]
    if ended.status is None:
        return WRONG, f"it hangs: {ended.err[-1500:]}"
    if "Traceback" in ended.err or "GGML_ASSERT" in ended.err:
        return WRONG, f"a traceback: {ended.err.strip().splitlines()[-1]}"
    if litter:
        return WRONG, f"it leaves {', '.join(litter)}"
    if ended.status == 0:
        return (RIGHT, "") if scenario.content(ended, places) == right else (WRONG, "the result is another")
    lines = [line for line in ended.err.splitlines() if line.startswith(_CLEAR_LINES)]
    if ended.status not in _STATUSES or len(lines) != 1 or lines[0] != ended.err.splitlines()[-1]:
        return WRONG, f"status {ended.status}, and no clear line: {ended.err.strip()[-200:]}"
    is_changed = places.target.read_bytes() != _OLD if with_old else places.target.exists()
    if scenario.writes and is_changed:
        if _WHOLE in lines[0] and scenario.content(ended, places) == right:
            return CLEAR, lines[0]
        return WRONG, f"a file is there all the same: {lines[0]}"
    return CLEAR, lines[0]


# --- what is compared ----------------------------------------------------------------------------------------


def _file_bytes(_ended: Ended, places: Places) -> object:
    read_gguf(places.target)
    return places.target.read_bytes()


def _measured(_ended: Ended, places: Places) -> object:
    """All arrays of a statistics file; the rest of it tells of seconds."""
    with safe_open(places.target, "numpy") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118 (no mapping)


def _tokens(ended: Ended, _places: Places) -> object:
    found = re.search(r'"tokens":(\[[\d,]*\])', ended.out)
    return found and found[1]


def _printed(ended: Ended, _places: Places) -> object:
    return ended.out


def drawn(fault: Fault, n_calls: int, place: float, *, always: bool) -> Fault:
    """The fault moved to another of `n_calls` calls, `place` (0 to 1) of the way from the first to the last."""
    first = 1 + min(n_calls - 1, int(place * n_calls))
    return Fault(fault.call, fault.kind, first, ALWAYS if always else 1, fault.pattern)
