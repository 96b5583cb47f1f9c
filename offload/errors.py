"""Every error a person can cause or meet, as one small tree.

Each message is one sentence that says what is wrong and one that says what to do. Broken invariants
of our own are `assert`s and never appear here. `exit_code` is what the `slimoe` command returns.
"""

from pathlib import Path

_LONGEST_PROBLEM = 700
"""Characters: a file may hold names and values of any length, and a message quotes them."""


class SlimoeError(Exception):
    """Base of all errors that are shown to a person without a traceback."""

    exit_code = 1


class UsageError(SlimoeError):
    """The command line or a parameter is wrong."""

    exit_code = 2


class ModelFileError(SlimoeError):
    """A model file or checkpoint directory is missing, truncated, corrupt or incomplete.

    `path` is the file at fault, `problem` what is wrong with it, `hint` what to do.
    """

    exit_code = 3

    def __init__(self, path: str | Path, problem: str, hint: str = "") -> None:
        self.path = Path(path)
        self.problem = problem if len(problem) <= _LONGEST_PROBLEM else problem[:_LONGEST_PROBLEM] + "..."
        self.hint = hint
        super().__init__(f"{path}: {self.problem}" + (f" {hint}" if hint else ""))


class UnsupportedModelError(ModelFileError):
    """The file is sound, but holds something this program does not implement."""


class DoesNotFitError(SlimoeError):
    """Memory or disk does not hold what was asked for; both byte counts are fields.

    `device` is the name of the device whose memory it is, empty for the host's and for the disk. `hint` is what to do.
    """

    exit_code = 4

    def __init__(
        self, problem: str, *, required_bytes: int, available_bytes: int, device: str = "", hint: str = ""
    ) -> None:
        self.problem, self.hint = problem, hint
        self.required_bytes = required_bytes
        self.available_bytes = available_bytes
        self.device = device
        super().__init__(f"{problem} {hint}".rstrip())


class DeviceFullError(DoesNotFitError):
    """A device did not give the memory that was planned for it."""


class BadLogitsError(SlimoeError):
    """The model's weights give no numbers."""

    exit_code = 3

    def __init__(self) -> None:
        super().__init__("The model computes no finite numbers: its file is damaged. Download or convert it again.")


class LibraryError(SlimoeError):
    """No package with ggml is installed, or none whose library this program can use."""

    exit_code = 5


class DeviceError(SlimoeError):
    """A device, or the server that lends it, does not answer or is not one that can be used."""

    exit_code = 6


class LostModelError(SlimoeError):
    """A model that was open could not be opened again: the engine is of no use any more."""


class ContextOverflowError(SlimoeError):
    """The prompt does not fit into the context window; all counts are tokens.

    A text that is too long whatever its tokens are was not counted: it has `n_prompt` of them `at_least`.
    """

    def __init__(self, n_prompt: int, n_ctx: int, *, at_least: bool = False) -> None:
        self.n_prompt = n_prompt
        self.n_ctx = n_ctx
        self.at_least = at_least
        least = "at least " if at_least else ""
        super().__init__(
            f"The prompt is {least}{n_prompt} tokens long, but the context window holds {n_ctx}, answer included. "
            "Shorten the prompt, or raise --ctx as far as the model goes."
        )
