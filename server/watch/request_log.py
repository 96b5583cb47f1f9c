"""One line in the log for each request, without a word of what it says. Apart: it knows how a person reads it."""

from datetime import datetime

import msgspec

from slimoe.offload.printable import printable
from slimoe.server.log_format import JOURNAL
from slimoe.server.watch.record import CLIENT_LEFT, RequestRecord

MOST_CHARS = 200
"""Of a path, which a client makes up."""
_QUIET_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


def log_request(record: RequestRecord) -> None:
    """Writes a request's line; looking at the server is no event unless it fails."""
    if record.method in _QUIET_METHODS and (record.status < 400 or record.status == CLIENT_LEFT):
        return
    path = record.path if len(record.path) <= MOST_CHARS else f"{record.path[:MOST_CHARS]}..."
    head = f"{record.method} {path} {record.status}"
    fields = {
        "event": "request",
        "method": record.method,
        **msgspec.structs.asdict(record.event("end")),
        "path": path,
        "model": record.model,
    }
    del fields["what"]
    level = "error" if record.status >= 500 else "info"
    JOURNAL.tell_later(head, level, printable(f"{datetime.now():%H:%M:%S} {head}{_figures(record)}"), fields)


def _figures(record: RequestRecord) -> str:
    """What a person wants to know of an answer."""
    parts = []
    if record.model is not None:
        cached = f" ({record.n_cached} known)" if record.n_cached else ""
        parts.append(f"{record.model}: {record.n_prompt}{cached} + {record.n_predicted} tokens")
        if record.first_seconds is not None:
            parts.append(f"first after {record.first_seconds:.2f} s")
    parts.append(f"{record.total_seconds:.2f} s")
    seen = sum(record.tiers[name] for name in ("device_hits", "hits", "pending", "misses"))
    if seen:
        in_memory = record.tiers["device_hits"] + record.tiers["hits"]
        parts.append(f"{100 * in_memory / seen:.0f} % of experts in memory")
    parts += [word for word in (record.finish_reason, record.error) if word]
    return f" {', '.join(parts)} [{record.id}]"
