// The conversation that is open: its messages, what can be done with them, and the answers being written.

import { ServerError } from "./api.js";
import { write } from "./answer.js";
import { byId, say } from "./dom.js";
import { copied } from "./markdown.js";
import { Spoken } from "./spoken.js";
import { choices, drafts, newId } from "./store.js";
import { TurnView, fit } from "./turn.js";

const NEAR_END = 80;
const SAVE_MS = 1000;
const NEW = "new";
const touch = matchMedia("(hover: none) and (pointer: coarse)");

/** A conversation without messages, with the settings that were chosen last. */
function fresh() {
  const now = Date.now();
  const settings = choices.get("settings", {});
  return { id: newId(), title: "New conversation", created: now, updated: now, settings, messages: [] };
}

export class Chat {
  /** `server` says which model to ask and takes a key. */
  constructor(store, server) {
    this.store = store;
    this.server = server;
    /** Told of the conversation that changed, or of nothing when another was opened. */
    this.onchange = () => {};
    this.running = new Map();
    this.views = [];
    this.scroll = byId("scroll");
    this.prompt = byId("prompt");
    this.wasAtEnd = true;
    this.frame = 0;
    this.listen();
    this.open(fresh(), true);
  }

  listen() {
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    this.prompt.addEventListener("keydown", (event) => {
      // On a touch screen Enter begins a line: there is no other key for it.
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !touch.matches) {
        event.preventDefault();
        this.send();
      } else if (event.key === "ArrowUp" && !this.prompt.value) {
        const last = this.current.messages.findLastIndex((message) => message.role === "user");
        if (last < 0) return;
        event.preventDefault();
        this.edit(last);
      }
    });
    this.prompt.addEventListener("input", () => {
      drafts.set(this.draftName, this.prompt.value);
      fit(this.prompt);
    });
    byId("stop").addEventListener("click", () => this.stop());
    this.scroll.addEventListener("scroll", () => {
      const { scrollTop, scrollHeight, clientHeight } = this.scroll;
      this.wasAtEnd = scrollHeight - scrollTop - clientHeight < NEAR_END;
      byId("to-end").hidden = this.wasAtEnd;
    }, { passive: true });
    byId("to-end").addEventListener("click", () => this.toEnd(true));
  }

  get draftName() {
    return this.current.messages.length ? this.current.id : NEW;
  }

  get isRunning() {
    return this.running.has(this.current.id);
  }

  /** Shows a conversation. */
  open(conversation, isNew = false) {
    this.current = conversation;
    this.isNew = isNew;
    this.prompt.value = drafts.get(this.draftName);
    fit(this.prompt);
    this.show();
    this.toEnd(true);
  }

  openNew() {
    this.open(fresh(), true);
    this.prompt.focus();
  }

  show() {
    const { current } = this;
    byId("title").textContent = current.title;
    document.title = this.isNew ? "slimoe" : `${current.title} · slimoe`;
    byId("conversation-actions").hidden = this.isNew;
    byId("empty").hidden = current.messages.length > 0;
    // What did not change keeps its element, and with it selections, open folds and scrolling.
    const known = new Map(this.views.map((view) => [view.message, view]));
    this.views = current.messages.map((message, index) => {
      const actions = this.actions(message, index);
      return known.get(message)?.renew(actions) ?? new TurnView(message, index, actions);
    });
    const list = byId("messages");
    for (const [index, view] of this.views.entries())
      if (list.children[index] !== view.node) list.insertBefore(view.node, list.children[index] ?? null);
    while (list.children.length > this.views.length) list.lastChild.remove();
    this.showRunning();
    if (this.isRunning) this.views.at(-1)?.update(true);
    this.onchange();
  }

  showRunning() {
    byId("send").hidden = this.isRunning;
    byId("stop").hidden = !this.isRunning;
  }

  actions(message, index) {
    const isLast = index === this.current.messages.length - 1;
    return {
      copy: async () => say((await copied(message.content)) ? "Copied." : "The browser did not let it be copied."),
      edit: () => this.edit(index),
      again: () => this.again(index),
      go_on: isLast && (() => this.answer()),
      retry: isLast && (() => this.again(index)),
      results: isLast && ((texts) => this.giveResults(message, texts)),
    };
  }

  toEnd(isAsked = false) {
    if (!isAsked && !this.wasAtEnd) return;
    this.scroll.scrollTop = this.scroll.scrollHeight;
  }

  /** Sends what is written. While an answer arrives it stays in the field. */
  async send() {
    const text = this.prompt.value.trim();
    if (!text || this.isRunning) return;
    const { current } = this;
    drafts.set(this.draftName, "");
    this.prompt.value = "";
    fit(this.prompt);
    if (!current.messages.length) current.title = text.split("\n")[0].slice(0, 60);
    current.messages.push({ role: "user", content: text });
    await this.ask();
  }

  /** Adds an empty answer and has it written. */
  async ask() {
    this.current.messages.push({ role: "assistant", content: "" });
    await this.answer();
  }

  giveResults(message, texts) {
    for (const [index, call] of message.calls.entries())
      this.current.messages.push({ role: "tool", name: call.name, callId: call.id, content: texts[index] });
    return this.ask();
  }

  /** Writes the last message, an answer, from where it ends. */
  async answer() {
    const conversation = this.current;
    const message = conversation.messages.at(-1);
    if (this.running.has(conversation.id)) return;
    const control = new AbortController();
    this.running.set(conversation.id, control);
    this.isNew = false;
    this.wasAtEnd = true;
    this.show();
    this.toEnd(true);
    const spoken = new Spoken();
    spoken.told = message.content.length;
    let saved = performance.now();
    const isShown = () => this.current.id === conversation.id;
    await this.save(conversation);
    try {
      await write(conversation, this.server.model, control.signal, () => {
        if (isShown()) this.draw(spoken);
        if (performance.now() - saved > SAVE_MS) {
          saved = performance.now();
          this.save(conversation);
        }
      });
    } catch (error) {
      this.fail(message, error);
    }
    delete message.progress;
    this.running.delete(conversation.id);
    conversation.updated = Date.now();
    await this.save(conversation);
    if (isShown()) {
      spoken.update(message.content, true);
      if (message.finish === "stopped") spoken.say("Stopped.");
      this.show();
      this.toEnd();
    } else this.onchange();
  }

  fail(message, error) {
    if (error.name === "AbortError") {
      message.finish = "stopped";
      return;
    }
    const { status = -1, code = null, param = null } = error;
    message.error = { message: error.message, status, code, param };
    message.finish = error instanceof ServerError && error.status === 200 ? "broken_off" : "failed";
    if (status === 401) this.server.askKey();
  }

  draw(spoken) {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      if (!this.isRunning) return;
      const view = this.views.at(-1);
      view.update(true);
      spoken.update(view.message.content);
      this.toEnd();
    });
  }

  stop() {
    this.running.get(this.current.id)?.abort();
    this.prompt.focus();
  }

  /** Changes messages so that they can be had back. */
  async change(text, alter) {
    const conversation = this.current;
    if (this.running.has(conversation.id)) return;
    const before = structuredClone(conversation.messages);
    alter(conversation.messages);
    if (text)
      say(text, async () => {
        this.running.get(conversation.id)?.abort();
        conversation.messages = before;
        await this.save(conversation);
        this.open(conversation);
      });
  }

  edit(index) {
    if (this.isRunning) return;
    const message = this.current.messages[index];
    this.views[index].edit(async (text) => {
      if (message.role !== "user") {
        message.content = text;
        await this.save(this.current);
        this.show();
        return;
      }
      await this.change("The message and what followed it are replaced.", (messages) => {
        messages.splice(index, messages.length, { role: "user", content: text });
      });
      await this.ask();
    });
  }

  async again(index) {
    if (this.isRunning) return;
    const hasText = this.current.messages[index].content || index + 1 < this.current.messages.length;
    await this.change(hasText ? "The answer is replaced." : "", (messages) => messages.splice(index));
    await this.ask();
  }

  async save(conversation) {
    try {
      await this.store.put(conversation);
    } catch (error) {
      const isFull = error?.name === "QuotaExceededError";
      say(isFull ? "This browser's storage is full. Export and delete conversations." : `The conversation was not kept: ${error}`);
    }
    this.onchange(conversation);
  }
}
