// One answer: the request, and what arrives of it.

import { ServerError, call, events } from "./api.js";
import { bodyOf } from "./settings.js";

/** A conversation as the API takes it. */
export function turns(conversation) {
  const found = [];
  if (conversation.settings.system) found.push({ role: "system", content: conversation.settings.system });
  for (const message of conversation.messages) {
    const turn = { role: message.role, content: message.content };
    if (message.calls?.length)
      turn.tool_calls = message.calls.map(({ id, name, arguments: given }) => ({
        id,
        type: "function",
        function: { name, arguments: given },
      }));
    if (message.role === "tool") turn.tool_call_id = message.callId;
    found.push(turn);
  }
  return found;
}

/**
 * Asks for the answer to a conversation, whose last message is the answer's beginning: empty, or to be gone on with.
 * Writes into that message as text arrives and calls `onchange` each time.
 */
export async function write(conversation, model, signal, onchange) {
  const message = conversation.messages.at(-1);
  const isGoingOn = message.content !== "";
  const asked = isGoingOn ? conversation : { ...conversation, messages: conversation.messages.slice(0, -1) };
  const body = {
    ...bodyOf(conversation.settings),
    messages: turns(asked),
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    return_progress: true,
  };
  if (model) body.model = model;
  delete message.finish;
  delete message.error;
  const begun = performance.now();
  let first = null;
  for await (const { data } of events(await call("/v1/chat/completions", { body, signal }))) {
    if (data === "[DONE]") break;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(500, chunk.error);
    const choice = chunk.choices?.[0];
    if (chunk.model) message.model = chunk.model;
    if (chunk.prompt_progress) message.progress = chunk.prompt_progress;
    if (choice?.delta) take(message, choice.delta);
    if (choice?.finish_reason) message.finish = choice.finish_reason;
    if (first === null && (choice?.delta?.content || choice?.delta?.reasoning_content || choice?.delta?.tool_calls)) {
      first = performance.now();
      message.figures = { first_ms: first - begun };
    }
    count(message, chunk, first);
    onchange();
  }
  delete message.progress;
  if (!message.finish) throw broken();
}

const broken = () => new ServerError(200, { message: "The answer broke off.", code: "broken_off" });

function take(message, delta) {
  if (delta.content) message.content += delta.content;
  const reasoning = delta.reasoning_content ?? delta.reasoning;
  if (reasoning) message.reasoning = (message.reasoning ?? "") + reasoning;
  for (const part of delta.tool_calls ?? []) {
    message.calls ??= [];
    const call = (message.calls[part.index ?? 0] ??= { id: "", name: "", arguments: "" });
    if (part.id) call.id = part.id;
    if (part.function?.name) call.name += part.function.name;
    if (part.function?.arguments) call.arguments += part.function.arguments;
  }
}

function count(message, chunk, first) {
  const figures = (message.figures ??= {});
  if (chunk.usage) {
    figures.prompt = chunk.usage.prompt_tokens;
    figures.written = chunk.usage.completion_tokens;
    figures.known = chunk.usage.prompt_tokens_details?.cached_tokens ?? 0;
    const took = first === null ? 0 : (performance.now() - first) / 1000;
    if (took > 0.25 && !figures.predicted_ms) figures.speed = (figures.written - 1) / took;
  }
  if (chunk.timings) {
    figures.prompt_ms = chunk.timings.prompt_ms;
    figures.predicted_ms = chunk.timings.predicted_ms;
    figures.speed = chunk.timings.predicted_per_second ?? 0;
  }
  if (chunk.tiers) {
    for (const [name, value] of Object.entries(chunk.tiers)) if (Number.isFinite(value)) figures[`tier_${name}`] = value;
  }
}
