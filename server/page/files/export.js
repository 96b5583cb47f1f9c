// Conversations out of the browser and into it.

import { el } from "./dom.js";
import { newId } from "./store.js";

const FORMAT = "slimoe-conversations";
const ROLES = new Set(["user", "assistant", "tool", "system"]);
const MOST_MESSAGES = 10000;

/** The document that `parse` reads. */
export const asJson = (conversations) => JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);

/** A conversation as a page to read. */
export function asMarkdown(conversation) {
  const parts = [`# ${conversation.title}`];
  if (conversation.settings.system) parts.push("**System**", conversation.settings.system);
  for (const message of conversation.messages) {
    const name = { user: "You", tool: `Result of ${message.name ?? "a tool"}` }[message.role] ?? message.model ?? "Answer";
    parts.push(`**${name}**`);
    if (message.reasoning) parts.push(message.reasoning.replace(/^/gm, "> "));
    if (message.content) parts.push(message.content);
    for (const call of message.calls ?? []) parts.push(`\`${call.name}\``, "```json\n" + call.arguments + "\n```");
  }
  return parts.join("\n\n") + "\n";
}

/** Lets the browser save a text under a name. */
export function save(name, text, type) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  const anchor = el("a", { href: address, download: name });
  document.body.append(anchor);
  anchor.click();
  anchor.remove();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
}

/** A title as the name of a file. */
export const fileName = (title) => title.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 60) || "conversation";

/** The conversations of a file, each as a new one; raises Error that says what is wrong with it. */
export function parse(text) {
  let found;
  try {
    found = JSON.parse(text);
  } catch (error) {
    throw new Error(`The file is no JSON: ${error.message}.`);
  }
  const list = Array.isArray(found?.conversations) ? found.conversations : Array.isArray(found?.messages) ? [found] : null;
  if (!list) throw new Error("The file holds no conversations: it has neither `conversations` nor `messages`.");
  return list.map((one, index) => read(one, `Conversation ${index + 1}`));
}

function read(one, where) {
  if (!Array.isArray(one?.messages) || one.messages.length > MOST_MESSAGES)
    throw new Error(`${where} has no list of at most ${MOST_MESSAGES} messages.`);
  const settings = {};
  for (const [name, value] of Object.entries(one.settings ?? {}))
    if (["string", "number"].includes(typeof value)) settings[name] = value;
  const messages = [];
  for (const [index, message] of one.messages.entries()) {
    if (!ROLES.has(message?.role)) throw new Error(`Message ${index + 1} of ${where} has the role ${message?.role}.`);
    const content = typeof message.content === "string" ? message.content : textOf(message.content);
    if (message.role === "system") settings.system = content;
    else messages.push({ ...kept(message), role: message.role, content });
  }
  const time = Number.isFinite(one.updated) ? one.updated : Date.now();
  const title = typeof one.title === "string" && one.title ? one.title : (messages[0]?.content ?? "Imported").slice(0, 60);
  return { id: newId(), title, created: time, updated: time, settings, messages };
}

const textOf = (parts) =>
  Array.isArray(parts) ? parts.map((part) => (typeof part?.text === "string" ? part.text : "")).join("\n") : "";

function kept(message) {
  const own = {};
  for (const name of ["reasoning", "model", "finish", "name", "callId"])
    if (typeof message[name] === "string") own[name] = message[name];
  const calls = message.calls ?? message.tool_calls?.map((call) => ({ id: call.id, ...call.function }));
  if (Array.isArray(calls))
    own.calls = calls.map((call) => ({
      id: String(call?.id ?? ""),
      name: String(call?.name ?? ""),
      arguments: String(call?.arguments ?? ""),
    }));
  if (typeof message.tool_call_id === "string") own.callId = message.tool_call_id;
  const figures = Object.entries(message.figures ?? {}).filter(([, value]) => Number.isFinite(value));
  if (figures.length) own.figures = Object.fromEntries(figures);
  return own;
}
