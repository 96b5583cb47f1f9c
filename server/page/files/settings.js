// How answers are chosen: the fields of a request that a person sets, and their form.

import { ask, byId, el, link } from "./dom.js";

/** Name in the request, label, what it does, default of the server, and the bounds of numbers. */
const FIELDS = [
  ["temperature", "Temperature", "0 takes the likeliest", "0.8", { min: 0, max: 100, step: "any" }],
  ["top_p", "Top p", "the likeliest up to this share", "0.95", { min: 0, max: 1, step: "any" }],
  ["top_k", "Top k", "so many likeliest; 0 for all", "40", { min: 0, step: 1 }],
  ["min_p", "Min p", "share of the likeliest", "0.05", { min: 0, max: 1, step: "any" }],
  ["max_tokens", "Most tokens", "of an answer", "to the context's end", { min: 1, step: 1 }],
  ["seed", "Seed", "for the same answer again", "a new one each time", { min: 0, step: 1 }],
  ["repeat_penalty", "Repeat penalty", "above 1: less repetition", "1", { min: 0.01, step: "any" }],
  ["repeat_last_n", "Repeat window", "tokens looked back on", "64", { min: -1, step: 1 }],
  ["presence_penalty", "Presence penalty", "−2 to 2", "0", { min: -2, max: 2, step: "any" }],
  ["frequency_penalty", "Frequency penalty", "−2 to 2", "0", { min: -2, max: 2, step: "any" }],
];
const TEXTS = [
  ["system", "System prompt", "what the model is told before the conversation", 4],
  ["stop", "Stop strings", "one a line; an answer ends before them", 2],
  ["schema", "JSON schema", "the answer is held to it", 3],
  ["tools", "Tools", "a JSON list of functions, as OpenAI's API has them; you give their results", 3],
];

const MOST_TOLD = 2;

/** The fields of a request's body; raises Error for text that should be JSON and is none. */
export function bodyOf(settings) {
  const body = {};
  for (const [name] of FIELDS) if (settings[name] !== undefined) body[name] = settings[name];
  if (settings.stop) body.stop = settings.stop.split("\n").filter(Boolean);
  if (settings.schema) {
    const schema = json(settings.schema, "The JSON schema");
    body.response_format = { type: "json_schema", json_schema: { name: "answer", schema, strict: true } };
  }
  if (settings.tools) body.tools = json(settings.tools, "The list of tools");
  return body;
}

function json(text, what) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw Object.assign(new Error(`${what} is no JSON (${error.message}).`), { code: "settings" });
  }
}

/** What differs from the server's defaults, in a few words. */
export function summary(settings) {
  const parts = TEXTS.filter(([name]) => settings[name]).map(([, label]) => label.toLowerCase());
  for (const [name, label] of FIELDS) if (settings[name] !== undefined) parts.push(`${label.toLowerCase()} ${settings[name]}`);
  const rest = parts.splice(MOST_TOLD);
  if (rest.length) parts.push(`${rest.length} more`);
  return parts.length ? `: ${parts.join(", ")}` : "";
}

/** Asks for settings; resolves to the new ones, or null. */
export async function edit(settings) {
  const numbers = FIELDS.map(([name, label, what, usual, bounds]) =>
    el(
      "label",
      { class: "field" },
      el("span", { class: "field-name" }, label),
      el("input", { type: "number", name, value: settings[name] ?? "", placeholder: usual, inputmode: "decimal", ...bounds }),
      el("span", { class: "note" }, what),
    ),
  );
  const texts = TEXTS.map(([name, label, what, rows]) =>
    el(
      "label",
      { class: "field tall" },
      el("span", { class: "field-name" }, label),
      el("textarea", { name, rows, value: settings[name] ?? "", spellcheck: name === "system" ? "true" : "false" }),
      el("span", { class: "note" }, what),
    ),
  );
  const dialog = byId("settings");
  const defaults = link("Defaults", () => {
    for (const field of dialog.querySelectorAll("input, textarea")) field.value = "";
  });
  const answer = await ask(
    dialog,
    "Settings",
    [
      el("p", { class: "note" }, "For this conversation and new ones. What is empty is left to the server."),
      texts[0],
      el("div", { class: "fields" }, numbers),
      ...texts.slice(1),
    ],
    [
      defaults,
      link("Cancel", () => dialog.close()),
      el("button", { class: "primary", value: "save", type: "submit" }, "Save"),
    ],
  );
  if (!answer) return null;
  const found = {};
  for (const [name] of FIELDS) if (answer.form.get(name) !== "") found[name] = Number(answer.form.get(name));
  for (const [name] of TEXTS) if (answer.form.get(name).trim()) found[name] = answer.form.get(name);
  return found;
}
