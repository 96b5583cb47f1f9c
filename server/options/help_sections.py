"""The sections of a command's help page. Apart: a table of every flag's subject, which has no other place."""

import click

SECTIONS = {
    "Model": ("n_ctx", "n_batch", "n_parallel", "kv_type", "n_threads", "draft", "trace"),
    "Prompts on disk": ("prompt_cache", "prompt_cache_size"),
    "Memory and devices": ("ram", "vram", "device", "rpc", "weights", "policy", "direct_io"),
    "Exactness": ("max_kl", "lossy"),
    "Sampling": (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repeat_penalty",
        "repeat_last_n",
        "presence_penalty",
        "frequency_penalty",
        "seed",
        "json_schema",
        "grammar",
    ),
    "Server": ("host", "port", "alias", "n_queue", "max_connections", "exit_with_parent", "grace"),
    "Loading": ("models", "models_max", "idle_unload"),
    "Log": ("log_format", "log_prompts"),
    "Access": ("api_key_env", "api_key_file", "no_key", "allowed_host", "allowed_origin"),
    "Compression": (
        "stats",
        "recipe",
        "list_recipes",
        "target_size",
        "target_bpw",
        "keep_experts",
        "score",
        "overall",
        "merge",
        "specialise",
        "constants",
        "width",
        "order",
        "main_experts",
        "drop_layers",
        "drop_attention",
        "drop_blocks",
        "two_copies",
        "feedback",
        "no_feedback",
        "refit",
        "heal",
        "search",
        "stock",
    ),
}
"""Flags by subject, by their names in a command's function; what stands in no section is told first, as Options."""


def write_options(command: click.Command, ctx: click.Context, formatter: click.HelpFormatter) -> None:
    """Writes a command's flags into its help page, section by section, the command's own first."""
    section_of = {name: title for title, names in SECTIONS.items() for name in names}
    rows: dict[str, list[tuple[str, str]]] = {title: [] for title in ("Options", *SECTIONS)}
    for param in command.get_params(ctx):
        row = param.get_help_record(ctx) if isinstance(param, click.Option) else None
        if row is not None:
            rows[section_of.get(param.name or "", "Options")].append(row)
    for title, found in rows.items():
        if found:
            with formatter.section(title):
                formatter.write_dl(found)
