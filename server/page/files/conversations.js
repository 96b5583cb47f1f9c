// The list of conversations at the left: search, open, rename, delete, export, import.

import { ask, byId, count, el, link, say } from "./dom.js";
import { asJson, asMarkdown, fileName, parse, save } from "./export.js";

const MOST_IMPORT = 64 << 20;
const SEARCHED = 20000;

/** Asks for a line of text; resolves to it, or null. */
export async function askText(dialog, title, label, value, attributes = {}) {
  const field = el("input", { name: "text", value, required: true, ...attributes });
  const answer = await ask(
    dialog,
    title,
    [el("label", { class: "field" }, el("span", { class: "field-name" }, label), field)],
    [link("Cancel", () => dialog.close()), el("button", { class: "primary", type: "submit" }, "Save")],
  );
  return answer && answer.form.get("text").trim();
}

export class ConversationList {
  constructor(store, chat) {
    this.store = store;
    this.chat = chat;
    this.known = new Map();
    byId("new-conversation").addEventListener("click", () => this.openNew());
    byId("search").addEventListener("input", () => this.show());
    byId("rename").addEventListener("click", () => this.rename(chat.current));
    byId("delete").addEventListener("click", () => this.remove(chat.current));
    byId("export-json").addEventListener("click", () => this.export([chat.current], chat.current.title));
    byId("export-markdown").addEventListener("click", () =>
      save(`${fileName(chat.current.title)}.md`, asMarkdown(chat.current), "text/markdown"),
    );
    byId("export-all").addEventListener("click", () => this.export([...this.known.values()], "slimoe conversations"));
    byId("import").addEventListener("click", () => byId("import-file").click());
    byId("import-file").addEventListener("change", (event) => this.import(event.target));
    addEventListener("hashchange", () => this.follow());
    store.onchange(({ id }) => this.reload(id));
  }

  /** Reads what is kept and opens what the address names. */
  async load() {
    for (const conversation of await this.store.all()) this.known.set(conversation.id, conversation);
    this.follow();
    this.show();
  }

  /** Another tab changed a conversation. */
  async reload(id) {
    if (this.chat.running.has(id)) return;
    const found = await this.store.get(id);
    if (found) this.known.set(id, found);
    else this.known.delete(id);
    if (this.chat.current.id === id && found && !document.querySelector(".editing")) this.chat.open(found);
    this.show();
  }

  follow() {
    const found = this.known.get(location.hash.slice(1));
    if (found && found !== this.chat.current) this.open(found);
  }

  open(conversation) {
    const last = conversation.messages.at(-1);
    // The page was closed while it was written.
    if (last?.role === "assistant" && !last.finish && !this.chat.running.has(conversation.id)) last.finish = "broken_off";
    this.chat.open(conversation);
    document.body.dispatchEvent(new CustomEvent("show-chat"));
  }

  openNew() {
    this.chat.openNew();
    history.replaceState(null, "", location.pathname);
    document.body.dispatchEvent(new CustomEvent("show-chat"));
  }

  /** Called when the open conversation, or one that is being answered, has changed. */
  changed(conversation) {
    const { current, isNew } = this.chat;
    if (conversation) this.known.set(conversation.id, conversation);
    if (!isNew && location.hash.slice(1) !== current.id) history.replaceState(null, "", `#${current.id}`);
    this.show();
  }

  show() {
    const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const all = [...this.known.values()].sort((one, other) => other.updated - one.updated);
    const found = all.filter((conversation) => {
      if (!words.length) return true;
      const text = [conversation.title, ...conversation.messages.map((message) => message.content.slice(0, SEARCHED))].join("\n").toLowerCase();
      return words.every((word) => text.includes(word));
    });
    const focused = document.activeElement?.closest("#conversations li")?.dataset.id;
    byId("conversations").replaceChildren(...found.map((conversation) => this.row(conversation)));
    if (focused) byId("conversations").querySelector(`li[data-id="${focused}"] button`)?.focus();
    byId("no-conversations").hidden = found.length > 0;
    byId("no-conversations").textContent = words.length
      ? `None of ${count(all.length, "conversation")} has these words.`
      : this.store.isKept
        ? "Conversations are kept in this browser."
        : "This browser keeps nothing: conversations end with the page.";
    byId("export-all").hidden = all.length === 0;
  }

  row(conversation) {
    const isOpen = conversation.id === this.chat.current.id;
    return el(
      "li",
      { class: isOpen ? "open" : "", "data-id": conversation.id },
      el(
        "button",
        {
          type: "button",
          class: "row",
          "aria-current": isOpen ? "true" : undefined,
          onclick: () => this.open(conversation),
          onkeydown: (event) => {
            if (event.key === "Delete") this.remove(conversation);
            else if (event.key === "F2") this.rename(conversation);
          },
        },
        el("span", { class: "row-title" }, conversation.title),
        this.chat.running.has(conversation.id) && el("span", { class: "note" }, "writing"),
      ),
    );
  }

  async rename(conversation) {
    const title = await askText(byId("ask-name"), "Rename", "Title", conversation.title, { maxlength: 200 });
    if (!title) return;
    conversation.title = title;
    await this.chat.save(conversation);
    if (conversation === this.chat.current) this.chat.show();
  }

  async remove(conversation) {
    this.chat.running.get(conversation.id)?.abort();
    this.known.delete(conversation.id);
    await this.store.remove(conversation.id);
    if (conversation.id === this.chat.current.id) this.openNew();
    this.show();
    say(`“${conversation.title}” is deleted.`, async () => {
      await this.chat.save(conversation);
      this.open(conversation);
    });
  }

  export(conversations, name) {
    save(`${fileName(name)}.json`, asJson(conversations), "application/json");
  }

  async import(field) {
    const file = field.files[0];
    field.value = "";
    if (!file) return;
    try {
      if (file.size > MOST_IMPORT) throw new Error(`The file has more than ${MOST_IMPORT >> 20} MiB.`);
      const found = parse(await file.text());
      for (const conversation of found) await this.chat.save(conversation);
      if (found.length) this.open(found[0]);
      say(`${count(found.length, "conversation")} imported.`);
    } catch (error) {
      say(`Nothing was imported. ${error.message}`);
    }
  }
}
