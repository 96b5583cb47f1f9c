// Puts the page together: the server's state, the key, the columns, the keyboard.

import { Chat } from "./chat.js";
import { ConversationList } from "./conversations.js";
import { Feed } from "./feed.js";
import { Machine } from "./machine.js";
import { ask as askForm, byId, el, link } from "./dom.js";
import { Server } from "./server.js";
import * as settings from "./settings.js";
import { Store, choices } from "./store.js";

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

/** Columns at the sides: beside the chat on wide screens, over it on narrow ones. */
class Columns {
  constructor(machine) {
    this.machine = machine;
    this.wide = { list: matchMedia("(min-width: 760px)"), machine: matchMedia("(min-width: 1120px)") };
    for (const name of ["list", "machine"]) {
      byId(`show-${name}`).addEventListener("click", () => this.set(name, byId(name).hidden));
      this.wide[name].addEventListener("change", () => this.settle(name));
      this.settle(name);
    }
    document.body.addEventListener("show-chat", () => this.closeOver());
    document.body.addEventListener("enlarge", () => this.cover());
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
    if (name === "machine" && !isShown && this.machine.isLarge) this.machine.enlarge(false);
    this.cover();
  }

  /** What is covered cannot be reached. */
  cover() {
    byId("list").inert = this.machine.isLarge;
    byId("chat").inert = this.machine.isLarge || ["list", "machine"].some((one) => !this.wide[one].matches && !byId(one).hidden);
  }

  /** Closes what covers the chat; says whether something did. */
  closeOver() {
    if (this.machine.isLarge) {
      this.machine.enlarge(false);
      return true;
    }
    const over = ["list", "machine"].filter((name) => !this.wide[name].matches && !byId(name).hidden);
    for (const name of over) this.apply(name, false);
    return over.length > 0;
  }
}

/** Says where goes what is written: only an address of this machine itself keeps it here. */
function showPrivacy({ hostname }) {
  const isHere = /^(127(\.\d+){3}|\[::1\]|(.+\.)?localhost)$/.test(hostname);
  byId("empty-title").textContent = isHere
    ? "What you write stays on this machine."
    : `What you write goes to ${hostname}, where the model runs, and nowhere else.`;
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
  const machine = new Machine();
  const columns = new Columns(machine);
  byId("show-settings").addEventListener("click", async () => {
    const found = await settings.edit(chat.current.settings);
    if (!found) return;
    chat.current.settings = found;
    choices.set("settings", found);
    if (!chat.isNew) await chat.save(chat.current);
    chat.onchange();
  });
  byId("model").addEventListener("change", (event) => {
    server.choose(event.target.value);
    machine.select(event.target.value);
  });
  const feed = new Feed(
    (name, data) => {
      if (name === "state") server.take(data);
      machine.take(name, data);
    },
    (error) => {
      if (error?.status === 0) server.look();
    },
  );
  byId("theme").addEventListener("click", () => window.slimoeTheme.flip());
  document.addEventListener("theme", showTheme);
  showTheme();
  showPrivacy(location);
  byId("show-shortcuts").addEventListener("click", showShortcuts);
  listenToKeys(chat, list, columns);
  await list.load();
  await server.look();
  machine.select(server.model);
  feed.start();
  byId("prompt").focus();
}

start();
