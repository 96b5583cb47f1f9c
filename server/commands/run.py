"""`slimoe run`: one completion, or a chat in the terminal."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import click
import msgspec

from slimoe.offload.engine import Engine
from slimoe.offload.errors import UsageError
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.text.generation import GenerationRequest
from slimoe.server.api.wire import tiers_info
from slimoe.server.chat.prompts import Prompts
from slimoe.server.jobs.local_engine import open_engine
from slimoe.server.messages import ChatPrompt, PromptSource, TextPrompt, TokenPrompt, Turn
from slimoe.server.options.engine_options import OptionsCommand, draft_flag, engine_config, engine_flags
from slimoe.server.options.form_options import form_flags, form_of
from slimoe.server.options.idle_flags import refuse_idle
from slimoe.server.options.prompt_cache_flags import prompt_cache_flags
from slimoe.server.options.sampling_options import sampling_flags, sampling_params
from slimoe.server.options.serving_memory import running_bytes
from slimoe.server.options.template_option import template_flag
from slimoe.server.terminal.interrupts import ending_at_interrupt
from slimoe.server.terminal.repl import Repl
from slimoe.server.terminal.terminal import generate, show_figures
from slimoe.server.terminal.typed_lines import history_path


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The command's own flags."""

    prompt: str | None
    prompt_ids: tuple[int, ...] | None
    system: str | None
    chat: bool
    max_tokens: int | None
    stop: tuple[str, ...]
    ignore_eos: bool
    history: bool
    as_json: bool


class TokenIds(click.ParamType[tuple[int, ...]]):
    """Token ids with commas between."""

    name = "ids"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Gives the ids as numbers."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in value.replace(",", " ").split())
        except ValueError:
            self.fail(f"{value!r} are no token ids. Write numbers with commas between, such as 1,22,333.", param, ctx)


@click.command("run", cls=OptionsCommand)
@engine_flags
@prompt_cache_flags
@draft_flag
@click.option("-p", "--prompt", help="Text to continue; - reads it from standard input.")
@click.option("--prompt-ids", type=TokenIds(), help="Token ids to continue, such as 1,22,333.")
@template_flag
@click.option("--chat", is_flag=True, help="Treat the prompt as a chat message, with the model's template.")
@click.option("--system", help="System message for a chat.")
@click.option("-n", "--max-tokens", type=click.IntRange(min=-1), help="Most tokens to write; -1 for as many as fit.")
@click.option("--stop", multiple=True, help="Text that ends the answer. Repeatable.")
@click.option("--ignore-eos", is_flag=True, help="Continue where the model would stop.")
@click.option("--history/--no-history", default=True, show_default=True, help="Remember what is typed into a chat.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when done.")
@sampling_flags
@form_flags
def command(values: Mapping[str, Any]) -> None:
    """Continue a prompt with MODEL, a GGUF file, or chat with it when no prompt is given.

    Without MODEL the built-in demo is used. The text goes to standard output, figures to standard error.
    """
    carry_out(values)


def carry_out(values: Mapping[str, Any], open_engine: Callable[[EngineConfig], Engine] = open_engine) -> None:
    """Does what the command's `values` say, with the engine that `open_engine` opens; raises SlimoeError."""
    options = msgspec.convert(dict(values), RunOptions)
    _check(options)
    request = GenerationRequest(
        prompt_ids=(),
        max_tokens=None if options.max_tokens == -1 else options.max_tokens,
        sampling=sampling_params(values),
        stop=options.stop,
        ignore_eos=options.ignore_eos,
        constraint=form_of(values),
    )
    config = engine_config(values, running_bytes())
    with ending_at_interrupt():
        engine = open_engine(config)
    template = values.get("chat_template")
    if engine.tokenizer is not None and template is not None:
        engine.tokenizer.chat_template = template or None
    try:
        source = _source(options)
        if source is None:
            Repl(engine, request, options.system, history_path() if options.history else None).run()
        else:
            _complete(engine, request, source, options)
    finally:
        with ending_at_interrupt(1):
            engine.close()


def _check(options: RunOptions) -> None:
    if options.prompt is not None and options.prompt_ids is not None:
        raise UsageError("A prompt is a text or token ids. Give --prompt or --prompt-ids, not both.")
    if options.chat and options.prompt is None:
        raise UsageError("--chat needs a --prompt. Leave both out for an interactive chat.")
    is_interactive = options.prompt is None and options.prompt_ids is None
    if options.as_json and is_interactive:
        raise UsageError("--json needs a prompt. Add --prompt or --prompt-ids.")
    if not options.chat and not is_interactive:
        refuse_idle(["system", "chat_template"], "is for chats. Add --chat, or leave the prompt out.")
    if not is_interactive:
        refuse_idle(["history"], "is for a chat in the terminal. Leave it or the prompt out.")


def _source(options: RunOptions) -> PromptSource | None:
    if options.prompt_ids is not None:
        return TokenPrompt(options.prompt_ids)
    if options.prompt is None:
        return None
    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    if not options.chat:
        return TextPrompt(text)
    system = () if options.system is None else (Turn("system", options.system),)
    return ChatPrompt((*system, Turn("user", text)))


def _complete(engine: Engine, request: GenerationRequest, source: PromptSource, options: RunOptions) -> None:
    prompts = Prompts(engine.tokenizer, engine.spec.n_vocab, engine.n_ctx, engine.grammars)
    outcome = generate(engine, prompts.complete(request, source), shows_text=not options.as_json)
    finished = outcome.finished
    if options.as_json:
        report: dict[str, Any] = {
            "text": outcome.text,
            "tokens": outcome.tokens,
            "finish_reason": finished.reason,
            "timings": finished.timings,
            "memory": finished.memory,
        }
        if tiers := tiers_info(finished.tiers):
            report["tiers"] = tiers
        print(msgspec.json.encode(report).decode(), flush=True)
    else:
        print(flush=True)
        show_figures(finished)
    if finished.reason == "cancelled":
        raise KeyboardInterrupt
