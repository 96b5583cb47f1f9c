// One message of a conversation as the page shows it.

import { advice } from "./api.js";
import { bytes, count, el, link, number, seconds } from "./dom.js";
import { MarkdownView } from "./markdown.js";

const ENDS = {
  length: "It reached its limit.",
  stopped: "You stopped it.",
  broken_off: "It broke off.",
};

/** Shows a message; `actions` are what can be done with it, by name: `copy, edit, again, go_on, retry, results`. */
export class TurnView {
  constructor(message, index, actions) {
    this.message = message;
    this.actions = actions;
    this.isUser = message.role === "user";
    const name = this.isUser ? "You" : message.role === "tool" ? `Result of ${message.name || "a tool"}` : message.model || "Answer";
    this.name = el("h2", { class: "turn-name" }, name);
    this.reasoning = el("details", { class: "reasoning", hidden: true }, el("summary"), el("div", { class: "prose" }));
    this.prose = el("div", { class: "prose" });
    this.calls = el("div", { class: "calls" });
    this.problem = el("div", { class: "problem-box", hidden: true });
    this.figures = el("p", { class: "figures" });
    this.tools = el("div", { class: "actions" });
    this.node = el(
      "article",
      { class: `turn ${message.role}`, "aria-label": `${name}, message ${index + 1}` },
      el("div", { class: "turn-head" }, this.name, this.tools),
      this.reasoning,
      this.prose,
      this.calls,
      this.problem,
      this.figures,
    );
    this.text = new MarkdownView(this.prose);
    this.thought = new MarkdownView(this.reasoning.lastChild);
    this.update(false);
  }

  /** Takes what can be done with the message now. */
  renew(actions) {
    this.actions = actions;
    if (!actions.results) this.calls.replaceChildren();
    this.update(false);
    return this;
  }

  /** Shows what the message has become; `isWriting` while more of it arrives. */
  update(isWriting) {
    const { message } = this;
    this.node.classList.toggle("writing", isWriting);
    this.node.setAttribute("aria-busy", String(isWriting));
    if (message.role === "assistant") {
      this.name.textContent = message.model || "Answer";
      this.text.update(message.content);
    } else this.prose.textContent = message.content;
    this.showReasoning(isWriting);
    this.showCalls(isWriting);
    this.showProblem();
    this.showFoot(isWriting);
  }

  showReasoning(isWriting) {
    const { reasoning = "" } = this.message;
    this.reasoning.hidden = !reasoning;
    if (!reasoning) return;
    const isThinking = isWriting && !this.message.content;
    this.reasoning.firstChild.textContent = isThinking ? "Reasoning…" : `Reasoning, ${count(reasoning.trim().split(/\s+/).length, "word")}`;
    this.thought.update(reasoning);
  }

  showCalls(isWriting) {
    const calls = this.message.calls ?? [];
    if (!calls.length && !this.calls.firstChild) return;
    if (this.calls.querySelector("textarea")) return;
    this.calls.replaceChildren(
      ...calls.map((call) =>
        el(
          "figure",
          { class: "code call" },
          el("figcaption", {}, el("span", {}, "Calls ", el("strong", {}, call.name || "a tool"))),
          el("pre", { tabIndex: 0, role: "region", "aria-label": `Arguments of ${call.name}` }, el("code", {}, pretty(call.arguments))),
        ),
      ),
    );
    if (!isWriting && calls.length && this.actions.results) this.askResults(calls);
  }

  askResults(calls) {
    const fields = calls.map((call) =>
      el("label", { class: "field tall" }, el("span", { class: "field-name" }, `Result of ${call.name}`), el("textarea", { rows: 2 })),
    );
    const send = () => this.actions.results(fields.map((field) => field.querySelector("textarea").value));
    this.calls.append(...fields, el("button", { type: "button", class: "primary", onclick: send }, "Send results"));
  }

  showProblem() {
    const { error } = this.message;
    this.problem.hidden = !error;
    if (!error || this.problem.dataset.shown === error.message) return;
    this.problem.dataset.shown = error.message;
    this.problem.setAttribute("role", "alert");
    const again = this.actions.retry && link("Try again", this.actions.retry);
    this.problem.replaceChildren(el("p", { class: "problem" }, error.message), el("p", { class: "note" }, advice(error)), again ?? "");
  }

  showFoot(isWriting) {
    const { message, actions } = this;
    if (isWriting) {
      this.tools.replaceChildren();
      this.figures.textContent = progress(message);
      return;
    }
    const end = message.finish && ENDS[message.finish];
    this.figures.textContent = [end, figures(message.figures)].filter(Boolean).join(" ");
    const can = [
      ["copy", "Copy", message.content],
      ["edit", "Edit", true],
      ["again", "Again", message.role === "assistant"],
      ["go_on", "Continue", message.role === "assistant" && message.content && message.finish !== "stop" && !message.calls],
    ];
    this.tools.replaceChildren(...can.filter(([name, , holds]) => holds && actions[name]).map(([name, label]) => link(label, actions[name])));
  }

  /** Lets the text be changed in place. */
  edit(onsave) {
    const field = el("textarea", { class: "edit", value: this.message.content, "aria-label": "Text of the message" });
    const close = () => {
      form.replaceWith(this.prose);
      this.tools.hidden = false;
      this.tools.querySelector("button")?.focus();
    };
    const save = () => {
      close();
      onsave(field.value);
    };
    const form = el(
      "div",
      { class: "editing" },
      field,
      el(
        "div",
        { class: "actions" },
        el("button", { type: "button", class: "primary", onclick: save }, this.isUser ? "Send again" : "Save"),
        link("Cancel", close),
        this.isUser && el("span", { class: "note" }, "What follows is replaced."),
      ),
    );
    form.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close();
      else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    this.prose.replaceWith(form);
    this.tools.hidden = true;
    fit(field);
    field.addEventListener("input", () => fit(field));
    field.focus();
  }
}

/** Makes a text field as high as its text. */
export function fit(field) {
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight + 2, innerHeight * 0.5)}px`;
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

function progress({ progress: read, figures: found = {}, content, reasoning }) {
  if (content || reasoning) {
    const speed = found.speed ? `, ${number(found.speed, 1)} tokens/s` : "";
    return found.written ? `${count(found.written, "token")}${speed}` : "";
  }
  if (read?.total) return `Reading the prompt: ${number(read.processed)} of ${count(read.total, "token")}`;
  return "Reading the prompt";
}

/** The figures of an answer in a line. */
export function figures(found) {
  if (!found?.written) return "";
  const parts = [count(found.written, "token")];
  if (found.speed) parts.push(`${number(found.speed, 1)} tokens/s`);
  if (found.prompt) {
    const known = found.known ? ` (${number(found.known)} known)` : "";
    parts.push(`prompt ${number(found.prompt)}${known}${found.prompt_ms ? ` in ${seconds(found.prompt_ms / 1000)}` : ""}`);
  }
  if (found.tier_hit_share !== undefined) parts.push(`${number(found.tier_hit_share * 100)} % of experts at hand`);
  if (found.tier_bytes_read) parts.push(`${bytes(found.tier_bytes_read)} read`);
  return parts.join(" · ");
}
