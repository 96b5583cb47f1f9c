// Puts the page together: the server's state, the key, the columns, the keyboard.

import { ask, key } from "./api.js";
import { Chat } from "./chat.js";
import { ConversationList, askText } from "./conversations.js";
import { Feed } from "./feed.js";
import { Machine, largeButton } from "./machine.js";
import { ask as askForm, byId, bytes, el, link, number } from "./dom.js";
import * as settings from "./settings.js";
import { Store, choices } from "./store.js";

const AGAIN_MS = 1500;
const KEYS = [
  ["Enter", "sends the message"],
  ["Shift + Enter", "begins a new line"],
  ["Esc", "stops the answer; closes what is open"],
  ["↑", "in the empty field: edits your last message"],
  ["/", "goes to the message field"],
  ["Alt + N", "begins a new conversation"],
  ["Alt + S", "searches conversations"],
  ["Alt + G", "regenerates the last answer"],
  ["Alt + M", "goes to the map of experts; arrows move in it"],
  ["F2, Delete", "in the list: renames, deletes a conversation"],
  ["?", "shows this list"],
];

/** What the page knows of the server. */
class Server {
  constructor() {
    this.models = [];
    this.model = null;
    this.isAsking = false;
    this.timer = 0;
  }

  /** Looks whether it answers, until it does. */
  async look() {
    clearTimeout(this.timer);
    try {
      this.models = (await ask("/v1/models")).data;
      const health = await fetch("/health", { cache: "no-store" });
      const state = await health.json();
      this.showModels();
      if (health.ok) this.tell("");
      else {
        this.tell(stateText(state));
        this.again();
      }
    } catch (error) {
      if (error.status === 401) {
        this.tell("A key is needed");
        this.askKey();
        return;
      }
      this.tell(error.message);
      this.again();
    }
  }

  again() {
    this.timer = setTimeout(() => this.look(), AGAIN_MS);
  }

  tell(text) {
    const node = byId("connection");
    if (node.textContent !== text) node.textContent = text;
  }

  showModels() {
    const names = this.models.map((model) => model.id);
    const kept = choices.get("model", null);
    if (!names.includes(this.model)) this.model = names.includes(kept) ? kept : names[0];
    const field = byId("model");
    if ([...field.options].map((option) => option.value).join("\n") !== names.join("\n"))
      field.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
    field.value = this.model;
    byId("model-choice").hidden = names.length < 2;
    this.showModel();
  }

  showModel() {
    const found = this.models.find((model) => model.id === this.model);
    byId("model-name").textContent = this.model ?? "";
    if (!found) return;
    const parts = [`${found.id} answers`];
    if (found.max_model_len) parts.push(`${number(found.max_model_len)} tokens of context`);
    if (found.meta?.n_params) parts.push(`${number(found.meta.n_params / 1e6)} million parameters`);
    if (found.meta?.size) parts.push(bytes(found.meta.size));
    byId("empty-model").textContent = `${parts.join(", ")}.`;
  }

  /** Takes what the stream of events says of how a model stands. */
  take({ model, state, done_bytes: done, total_bytes: total, problem }) {
    if (this.models.length > 1 && model !== this.model) return;
    const words = {
      ready: "",
      asleep: "Asleep: your next message wakes it",
      loading: total ? `Loading the model, ${number((100 * done) / total)} %` : "Loading the model",
    };
    this.tell(words[state] ?? problem ?? `The model is ${state}`);
    if (state === "ready") this.look();
  }

  choose(name) {
    this.model = name;
    choices.set("model", name);
    this.showModel();
  }

  async askKey() {
    if (this.isAsking) return;
    this.isAsking = true;
    const title = key.get() ? "The key is wrong" : "This server asks for a key";
    key.forget();
    const given = await askText(byId("ask-key"), title, "Key, kept until this tab is closed", "", {
      type: "password",
      autocomplete: "off",
    });
    this.isAsking = false;
    if (!given) return;
    key.set(given);
    await this.look();
    document.dispatchEvent(new Event("key"));
  }
}

function stateText(state) {
  if (state.total_bytes) return `Loading the model, ${number((100 * state.done_bytes) / state.total_bytes)} %`;
  return state.error?.message ?? state.status;
}

/** Columns at the sides: beside the chat on wide screens, over it on narrow ones. */
class Columns {
  constructor() {
    this.wide = { list: matchMedia("(min-width: 760px)"), machine: matchMedia("(min-width: 1120px)") };
    for (const name of ["list", "machine"]) {
      byId(`show-${name}`).addEventListener("click", () => this.set(name, byId(name).hidden));
      this.wide[name].addEventListener("change", () => this.settle(name));
      this.settle(name);
    }
    document.body.addEventListener("show-chat", () => this.closeOver());
    // The chat is inert while something covers it, so that a click on it comes here.
    document.querySelector(".columns").addEventListener("click", (event) => {
      if (!event.target.closest("#list, #machine")) this.closeOver();
    });
  }

  settle(name) {
    this.apply(name, this.wide[name].matches && choices.get(`column.${name}`, true));
  }

  set(name, isShown) {
    if (this.wide[name].matches) choices.set(`column.${name}`, isShown);
    else if (isShown) this.closeOver();
    this.apply(name, isShown);
    if (isShown && !this.wide[name].matches) byId(name).querySelector("button, input:checked")?.focus();
  }

  apply(name, isShown) {
    byId(name).hidden = !isShown;
    byId(`show-${name}`).setAttribute("aria-expanded", String(isShown));
    const isOver = ["list", "machine"].some((one) => !this.wide[one].matches && !byId(one).hidden);
    byId("chat").inert = isOver;
    document.body.classList.toggle("covered", isOver);
  }

  /** Closes what covers the chat; says whether something did. */
  closeOver() {
    const over = ["list", "machine"].filter((name) => !this.wide[name].matches && !byId(name).hidden);
    for (const name of over) this.apply(name, false);
    return over.length > 0;
  }
}

function showTheme() {
  const other = window.slimoeTheme.current() === "dark" ? "Light" : "Dark";
  byId("theme").textContent = other;
  byId("theme").setAttribute("aria-label", `${other} colours`);
}

function showShortcuts() {
  const dialog = byId("shortcuts");
  const rows = KEYS.map(([keys, what]) => el("div", {}, el("dt", {}, el("kbd", {}, keys)), el("dd", {}, what)));
  askForm(dialog, "Keys", [el("dl", { class: "keys" }, rows)], [link("Close", () => dialog.close())]);
}

function listenToKeys(chat, list, columns) {
  const alt = {
    KeyN: () => list.openNew(),
    KeyS: () => {
      columns.set("list", true);
      byId("search").focus();
    },
    KeyG: () => {
      const last = chat.current.messages.length - 1;
      if (last > 0) chat.again(last);
    },
    KeyM: () => {
      columns.set("machine", true);
      byId("map")?.focus();
    },
  };
  addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]") || event.isComposing) return;
    const isField = event.target.matches("input, textarea, select");
    if (event.altKey && !event.ctrlKey && !event.metaKey && alt[event.code]) alt[event.code]();
    else if (event.key === "Escape") {
      if (!columns.closeOver() && chat.isRunning) chat.stop();
      return;
    } else if (event.key === "/" && !isField) byId("prompt").focus();
    else if (event.key === "?" && !isField) showShortcuts();
    else return;
    event.preventDefault();
  });
}

async function start() {
  const server = new Server();
  const store = await Store.open();
  const chat = new Chat(store, server);
  const list = new ConversationList(store, chat);
  chat.onchange = (conversation) => {
    byId("settings-summary").textContent = settings.summary(chat.current.settings);
    list.changed(conversation);
  };
  const columns = new Columns();
  byId("show-settings").addEventListener("click", async () => {
    const found = await settings.edit(chat.current.settings);
    if (!found) return;
    chat.current.settings = found;
    choices.set("settings", found);
    if (!chat.isNew) await chat.save(chat.current);
    chat.onchange();
  });
  const machine = new Machine();
  machine.mapPart.querySelector(".part-head").append(largeButton(machine.map, byId("machine")));
  byId("model").addEventListener("change", (event) => {
    server.choose(event.target.value);
    machine.select(event.target.value);
  });
  const feed = new Feed(
    (name, data) => (name === "state" ? server.take(data) : machine.take(name, data)),
    (error) => {
      if (error?.status === 0) server.look();
    },
  );
  byId("theme").addEventListener("click", () => window.slimoeTheme.flip());
  document.addEventListener("theme", showTheme);
  showTheme();
  byId("show-shortcuts").addEventListener("click", showShortcuts);
  listenToKeys(chat, list, columns);
  await list.load();
  await server.look();
  feed.start();
  byId("prompt").focus();
}

start();
