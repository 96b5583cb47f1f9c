"""The command-line flags that say which model to open and how, shared by every command that opens one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from slimoe.offload.plan.engine_config import WEIGHT_MODES, EngineConfig, changed, setting_names
from slimoe.offload.requests.drafting import DRAFT_MODES
from slimoe.server.options.flag_group import flag_group, with_bare_values
from slimoe.server.options.help_sections import write_options
from slimoe.server.options.hub_cache import ModelPath
from slimoe.server.options.idle_flags import refuse_idle
from slimoe.server.telling import tell

DEMO = Path(__file__).parents[1] / "demo" / "demo.gguf"
KV_TYPES = ("f16", "q8_0", "q4_0", "f32")
POLICIES = ("lfu-decay", "lru", "lfu", "static")


class OptionsCommand(click.Command):
    """A command whose function takes all values as one mapping, which it turns into typed groups at once."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Reads the arguments."""
        return super().parse_args(ctx, with_bare_values(self, args))

    def invoke(self, ctx: click.Context) -> Any:
        """Calls the function with the mapping."""
        assert self.callback is not None
        return ctx.invoke(self.callback, dict(ctx.params))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the flags by subject."""
        write_options(self, ctx, formatter)


class CommaSeparated(click.ParamType[tuple[str, ...]]):
    """Words with commas between."""

    name = "words"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Splits at commas; fails where no word stands beside one."""
        if isinstance(value, tuple):
            return value
        words = tuple(word.strip() for word in value.split(","))
        if not all(words):
            self.fail(f"{value!r} has nothing before or after a comma.", param, ctx)
        return words


class PolicyName(click.Choice[str]):
    """The name of a cache policy; `heat`, the previous version's name of `lfu-decay`, is still understood."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Gives the current name of the policy."""
        return super().convert("lfu-decay" if value == "heat" else value, param, ctx)


def joined(ctx: click.Context, param: click.Parameter, lists: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    """The words of a repeatable flag with commas, in one list; a callback."""
    return tuple(word for words in lists for word in words)


engine_flags = flag_group(
    click.argument("model", required=False, type=ModelPath()),
    click.option(
        "--ctx",
        "n_ctx",
        type=click.IntRange(min=1),
        help="Context window in tokens (default: the model's, at most 4096).",
    ),
    click.option(
        "--batch",
        "n_batch",
        type=click.IntRange(min=1),
        help="Most prompt tokens computed at once (default: 512, or what memory leaves room for).",
    ),
    click.option(
        "--parallel",
        "n_parallel",
        type=click.IntRange(min=1),
        help="Requests answered at once, each with a context window of its own (default: 1).",
    ),
    click.option(
        "--threads",
        "n_threads",
        type=click.IntRange(min=1),
        help="Threads to compute with (default: as many as the machine, or its control group, has cores).",
    ),
    click.option("--kv-type", type=click.Choice(KV_TYPES), help="Type of the KV cache (default: f16)."),
    click.option(
        "--weights",
        type=click.Choice(WEIGHT_MODES),
        help="How weights lie in memory: mapped from the file and shared, copied to huge pages, repacked for this "
        "CPU's decoding, or both (default: auto, the fastest measured that fits).",
    ),
    click.option(
        "--ram",
        metavar="SIZE",
        help="Memory that the whole program may take, such as 16GiB, 50% or auto (default: auto, what is free).",
    ),
    click.option(
        "--vram",
        type=CommaSeparated(),
        multiple=True,
        callback=joined,
        metavar="SIZE",
        help="Memory to take on each device, such as 8GiB, with commas between several (default: auto).",
    ),
    click.option(
        "--device",
        callback=lambda ctx, param, name: name.lower() if name and name.lower() in ("auto", "none") else name,
        metavar="NAME",
        help="Devices to compute on besides the CPU: auto takes every GPU there is, none takes none (default: auto).",
    ),
    click.option(
        "--rpc",
        type=CommaSeparated(),
        multiple=True,
        callback=joined,
        metavar="HOST:PORT",
        help="Use another machine's device, where ggml's rpc-server runs. Repeatable.",
    ),
    click.option(
        "--policy",
        type=PolicyName(POLICIES),
        help="Cache policy: which experts stay in fast memory (default: lfu-decay, a decayed LFU).",
    ),
    click.option(
        "--max-kl",
        type=click.FloatRange(min=0),
        metavar="X",
        help="KL divergence allowed for speed, in nats per token (default: none, answers are exact).",
    ),
    click.option(
        "--lossy",
        metavar="NAME[:VALUE]",
        help="Trade exactness for speed: low, gate[:T1[,T2]], skip:R, adap:T, constant:R, rule:MU or elastic[:SHARE] "
        "(default: none, answers are exact).",
    ),
    click.option(
        "--trace",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Record the selected experts to this file, in place of an older recording.",
    ),
    click.option(
        "--direct-io/--no-direct-io",
        default=None,
        help="Read experts from disk past the system's page cache (default: where the file system can).",
    ),
)
"""The flags that name a model and say how to open it, as a decorator of a command."""


draft_flag = click.option(
    "--draft",
    type=click.Choice(DRAFT_MODES),
    help="Guess the next tokens and verify several in one step: ngram guesses from the text so far wherever they are "
    "likely, auto where that saves time, mtp with the model's own MTP block, if the file has one (default: none).",
)
"""The flag of commands that write answers."""


def engine_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that flags give, by their names in `EngineConfig`."""
    return {name: values[name] for name in setting_names() if values.get(name) not in (None, ())}


def engine_config(values: Mapping[str, Any], reserve_bytes: int) -> EngineConfig:
    """How to open the model that the flags name; says on standard error when that is the demo.

    `reserve_bytes` are what the command's other processes take at most. Raises UsageError for a flag that does nothing
    without another.
    """
    if values.get("prompt_cache") is None:
        refuse_idle(["prompt_cache_size"], "bounds the folder of --prompt-cache. Add --prompt-cache, or leave it out.")
    if values["model"] is None:
        tell("No model named: using the built-in demo model, which is tiny and knows little.")
    return changed(EngineConfig(DEMO), {**engine_settings(values), "reserve_bytes": reserve_bytes})
