"""The command-line flags that say how to compress a model, as the tables of a recipe that they stand for."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click

from slimoe.offload.resources.duration import parse_minutes
from slimoe.server.options.flag_group import BareType, SizeType, flag_group

Tables = dict[str, Any]

hf_bits_flag = click.option(
    "--hf-bits",
    type=click.Choice(["16", "8", "4"]),
    help="With --hf: bits of the experts' weights; 8 and 4 as compressed-tensors packs them (default: 16).",
)

OLD_FLAGS = {"pair": "two-copies", "novices": "constants"}
OLD_SPELLINGS = {"token_normalize_func": lambda name: OLD_FLAGS.get(name, name)}
"""Settings of a command that understands the flags by the names that they had in the version before."""
_AMOUNT = re.compile(r"[0-9]{1,6}|[0-9]{1,3}(\.[0-9]+)?%")
_KEYS: Mapping[str, tuple[str, str]] = {
    "target_size": ("", "target_size"),
    "target_bpw": ("", "target_bpw"),
    "keep_experts": ("experts", "keep"),
    "score": ("experts", "score"),
    "overall": ("experts", "overall"),
    "merge": ("experts", "merge"),
    "width": ("experts", "width"),
    "order": ("experts", "order"),
    "main_experts": ("experts", "main"),
    "drop_layers": ("", "drop_ffn"),
    "drop_attention": ("", "drop_attention"),
    "drop_blocks": ("", "drop_blocks"),
    "feedback": ("fit", "feedback"),
    "refit": ("fit", "refit"),
    "heal": ("fit", "heal"),
    "search": ("", "search"),
    "specialise": ("", "specialise"),
}
"""Where the value of each flag stands in a recipe; absent flags are None."""
FLAGS: Mapping[str, str] = {
    **{key: f"--{name.replace('_', '-')}" for name, (_, key) in _KEYS.items()},
    **{
        "expert": "--type",
        "low": "--two-copies",
        "free_constants": "--constants",
        "replacement": "--constants",
        "format": "--stock",
    },
}
"""How messages call what flags set, by the recipe's key."""


@dataclass(frozen=True, slots=True)
class CompressOptions:
    """The flags' values: `tables` are a recipe's that flags set, None or false where the recipe decides."""

    stats: Path | None = None
    recipe: str | None = None
    stock: bool = False
    constants: bool = False
    tables: Tables = field(default_factory=dict)

    @property
    def is_asked(self) -> bool:
        """Whether any of the flags was given."""
        return self != CompressOptions()

    @property
    def typed(self) -> dict[str, str]:
        """The flags that were given, by the recipe's key that they set."""
        keys = {key for name, value in self.tables.items() for key in (value if isinstance(value, dict) else (name,))}
        keys |= {"free_constants", "replacement"} if self.constants else set()
        keys |= {"format"} if self.stock else set()
        merged = {} if "specialise" not in keys or "merge" in keys else {"merge": "--specialise"}
        return (
            {key: FLAGS[key] for key in keys}
            | merged
            | (dict.fromkeys(("expert", "low"), "--two-copies") if "low" in keys else {})
        )

    def merged(self, tables: Mapping[str, Any]) -> Tables:
        """A recipe's tables with what the flags say in its place."""
        result = {name: dict(value) if isinstance(value, Mapping) else value for name, value in tables.items()}
        for name, value in self.tables.items():
            old = result.get(name)
            result[name] = {**(old if isinstance(old, dict) else {}), **value} if isinstance(value, dict) else value
        budget = {"target_size", "target_bpw"} & self.tables.keys()
        for name in {"target_size", "target_bpw"} - budget if budget else ():
            # One budget takes the place of the other, unless flags give both.
            result.pop(name, None)
        experts = result.get("experts")
        if self.constants and isinstance(experts, dict) and "keep" in experts:
            experts["replacement"] = "constant"
        elif self.constants:
            result["free_constants"] = True
        if self.stock:
            # A recipe's permissions end at what the format holds; what flags ask for themselves stays, and is refused.
            result |= {"format": "stock", "free_layers": False} | ({} if self.constants else {"free_constants": False})
        return result


class TimeType(click.ParamType[str]):
    """A time such as 5m, or a number of minutes, as a recipe has it."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Gives the time as it was written."""
        if not parse_minutes(str(value)) or str(value).strip().startswith("-"):
            self.fail(f"{value!r} is no time. Write one like 5m, 90s or 1h, or a number of minutes.", param, ctx)
        return str(value)


class FeedbackType(BareType):
    """All matrices, or a time to spend on those that are worth most."""

    name = "time"
    bare = "all"

    def takes(self, text: str) -> bool:
        """Whether the text is a time."""
        return parse_minutes(text) is not None

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bool | str:
        """Gives true for all, or the time as it was written."""
        return value == self.bare or str(TimeType().convert(value, param, ctx))


class AmountType(click.ParamType[int | str]):
    """A number of things, or a percentage of them."""

    name = "amount"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """Gives the number, or the percentage as it was written."""
        text = str(value).replace(" ", "")
        if not _AMOUNT.fullmatch(text):
            self.fail(f"{value!r} is neither a number nor a percentage like 25%.", param, ctx)
        return text if text.endswith("%") else int(text)


def _only_one(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> str | None:
    """The value of a flag that may be given once; raises BadParameter where the last would silently be taken."""
    if len(texts) > 1:
        raise click.BadParameter("a file is made for one text. Put several into one file.")
    return texts[0] if texts else None


def _list_recipes(ctx: click.Context, param: click.Parameter, is_asked: bool) -> None:
    if not is_asked or ctx.resilient_parsing:
        return
    from slimoe.converter.recipe.toml_file import ready_recipes

    for name, about in ready_recipes().items():
        click.echo(f"{name:<22}{about}")
    ctx.exit()


compress_flags = flag_group(
    click.option(
        "--stats",
        metavar="STATS",
        type=click.Path(path_type=Path),
        help="Statistics that slimoe calibrate wrote for the model.",
    ),
    click.option(
        "--target-size", type=SizeType(), metavar="SIZE", help="Most bytes that the file may have, such as 12GiB."
    ),
    click.option(
        "--target-bpw",
        type=click.FloatRange(min=0, min_open=True),
        metavar="BITS",
        help="Most bits per weight that the file may have, in place of --target-size.",
    ),
    click.option(
        "--recipe",
        metavar="NAME|FILE",
        help="How to compress: the name of a built-in recipe, or a TOML file; other flags override it.",
    ),
    click.option(
        "--list-recipes",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_list_recipes,
        help="List the built-in recipes.",
    ),
    click.option("--stock", is_flag=True, help="Write only what an unmodified llama.cpp loads."),
    click.option(
        "--keep-experts", type=AmountType(), metavar="N|%", help="Experts to keep in each layer; the others are pruned."
    ),
    click.option(
        "--score",
        metavar="NAME",
        help="How experts are ranked for pruning: subset (default), loss, frequency, reap ...",
    ),
    click.option("--overall/--no-overall", default=None, help="Rank the experts of all layers together."),
    click.option("--constants", is_flag=True, help="Put constant experts, which are vectors, in place of pruned ones."),
    click.option(
        "--merge",
        metavar="NAME",
        help="Merge experts instead of pruning them: neurons (chosen of several experts), hc-smoe or m-smoe (means).",
    ),
    click.option(
        "--specialise",
        multiple=True,
        callback=_only_one,
        metavar="TEXT",
        help="Merge experts for a task, to half of them or --keep-experts, by what they do on its text.",
    ),
    click.option("--width", type=click.IntRange(min=1), metavar="N", help="Neurons to keep in each expert."),
    click.option(
        "--main-experts",
        type=click.IntRange(min=1),
        metavar="N",
        help="Selected experts of a token to compute; vectors stand for the others (Compressed Experts).",
    ),
    click.option("--order", metavar="NAME", help="Experts selected together lie together in the file: co-selection."),
    click.option("--drop-layers", type=AmountType(), metavar="N|%", help="Layers whose experts are left out."),
    click.option("--drop-attention", type=AmountType(), metavar="N|%", help="Layers whose attention is left out."),
    click.option("--drop-blocks", type=AmountType(), metavar="N|%", help="Layers that are left out as a whole."),
    click.option(
        "--search",
        type=TimeType(),
        metavar="MINUTES",
        help="Time to spend on improving the choice of types by measuring: minutes, or one like 90s.",
    ),
    click.option(
        "--feedback",
        type=FeedbackType(),
        metavar="[TIME]",
        help="Error feedback (GPTQ): later columns make up for rounding errors; with a time such as 2h only where most "
        "is gained in it.",
    ),
    click.option("--no-feedback", is_flag=True, help="No error feedback, whatever the recipe says."),
    click.option("--refit/--no-refit", default=None, help="Fit routers to the quantised experts."),
    click.option(
        "--heal",
        type=TimeType(),
        metavar="MINUTES",
        help="Train routers, norms and other small tensors of the written file against SRC for so long, such as 5m.",
    ),
)
"""The flags that say how to compress a model, as a decorator of a command."""


def compress_options(values: Mapping[str, Any]) -> CompressOptions:
    """The flags' values out of a command's."""
    tables: Tables = {}
    for name, (section, key) in _KEYS.items():
        if values[name] is not None:
            (tables.setdefault(section, {}) if section else tables)[key] = values[name]
    if values["no_feedback"]:
        if values["feedback"]:
            raise click.UsageError("--feedback and --no-feedback contradict each other. Leave one of them out.")
        tables.setdefault("fit", {})["feedback"] = False
    return CompressOptions(
        values["stats"],
        values["recipe"],
        values["stock"],
        values["constants"],
        tables,
    )


def with_type(options: CompressOptions, type_name: str) -> CompressOptions:
    """The options with one type for all experts, as --type names it; raises UsageError beside a size."""
    return _with_types(options, {"expert": type_name}, "--type")


def with_copies(options: CompressOptions, copies: str) -> CompressOptions:
    """The options with two types for every expert, as --two-copies names them; raises UsageError beside a size."""
    names = [name.strip() for name in copies.split(",")]
    if len(names) != 2:
        raise click.UsageError(
            f"--two-copies is {copies!r}, but takes two types: the better one first, such as Q4_K,Q2_K."
        )
    return _with_types(options, dict(zip(("expert", "low"), names, strict=True)), "--two-copies")


def _with_types(options: CompressOptions, types: Tables, flag: str) -> CompressOptions:
    if {"target_size", "target_bpw"} & options.tables.keys():
        raise click.UsageError(f"A target size chooses types by itself. Leave {flag} out.")
    return replace(options, tables={**options.tables, "types": {**options.tables.get("types", {}), **types}})
