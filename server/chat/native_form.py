"""Calls and results in the fields that chat templates read, as many at once and under such ids as a template takes."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from slimoe.server.chat.plain_form import plain_text
from slimoe.server.chat.template_messages import TemplateCaps

Entry = dict[str, Any]
_SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")


def native_messages(messages: Sequence[Entry], caps: TemplateCaps) -> list[Entry]:
    """The conversation with `tool_calls`, `tool_call_id` and the reasoning in the field that the template reads."""
    native: list[Entry] = []
    at = 0
    while at < len(messages):
        message = messages[at]
        end = at + 1
        while message.get("calls") and end < len(messages) and messages[end]["role"] == "tool":
            end += 1
        native += _turns(message, messages[at + 1 : end], caps)
        at = end
    return native


def _turns(message: Entry, results: Sequence[Entry], caps: TemplateCaps) -> Iterator[Entry]:
    """A message and the results of its calls, each call by itself where the template takes only one at a time."""
    if message["role"] == "tool":
        # It answers no call that is known, so it says itself whose it is.
        yield _result(message, caps, plain_text(message, in_tags=False))
        return
    calls = [{**call, "id": call["id"] or f"call{n:05}"} for n, call in enumerate(message.get("calls", ()))]
    answers: list[list[Entry]] = [[] for _ in calls]
    strays, in_order = [], []
    for result in results:
        n = _answered(result, calls, answers)
        if n is None:
            strays.append(_turns(result, (), caps))
        else:
            shown = _result({**result, "call_id": calls[n]["id"], "name": calls[n]["name"]}, caps, result["content"])
            answers[n].append(shown)
            in_order.append(shown)
    if len(calls) > 1 and not caps.is_parallel:
        for n, call in enumerate(calls):
            yield _said(message if n == 0 else {"role": "assistant", "content": ""}, [call], caps)
            yield from answers[n]
    else:
        yield _said(message, calls, caps)
        # Without ids, it is the order that tells whose a result is.
        yield from in_order if caps.shows_ids else [shown for each in answers for shown in each]
    for stray in strays:
        yield from stray


def _answered(result: Entry, calls: Sequence[Entry], answers: Sequence[Sequence[Entry]]) -> int | None:
    """The number of the call that a result answers: by its id, else the first of its name that has no answer yet."""
    id, name = result.get("call_id", ""), result.get("name", "")
    for n, call in enumerate(calls):
        if call["id"] == id if id else not answers[n] and name in ("", call["name"]):
            return n
    return None


def _result(message: Entry, caps: TemplateCaps, text: str) -> Entry:
    shown = {"role": "tool", "content": text, "tool_call_id": _id(message.get("call_id", ""), caps)}
    return {**shown, "name": message["name"]} if message.get("name") else shown


def _said(message: Entry, calls: Sequence[Entry], caps: TemplateCaps) -> Entry:
    shown: Entry = {"role": message["role"], "content": plain_text({**message, "calls": ()}, in_tags=False)}
    reasoning = message.get("reasoning", "")
    if reasoning and caps.reasoning == "chunk":
        text = [{"type": "text", "text": shown["content"]}] if shown["content"] else []
        shown["content"] = [{"type": "thinking", "thinking": reasoning}, *text]
    elif reasoning and caps.reasoning:
        shown[caps.reasoning] = reasoning
    if calls:
        shown["tool_calls"] = [
            {
                "id": _id(call["id"], caps),
                "type": "function",
                "function": {
                    "name": call["name"],
                    "arguments": call.get("value", call["arguments"]) if caps.calls == "object" else call["arguments"],
                },
            }
            for call in calls
        ]
    return shown


def _id(id: str, caps: TemplateCaps) -> str:
    """The id, or letters and digits that stand for it, as many as the template wants."""
    if not caps.has_short_ids or _SHORT_ID.fullmatch(id):
        return id
    return hashlib.sha256(id.encode("utf-8", "surrogatepass")).hexdigest()[:9]
