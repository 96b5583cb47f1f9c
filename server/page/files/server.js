// What the page knows of the server: its models, how they stand, the key that it asks for.

import { ask, key } from "./api.js";
import { askText } from "./conversations.js";
import { byId, bytes, el, number } from "./dom.js";
import { choices } from "./store.js";

const AGAIN_MS = 1500;

function stateText(state) {
  if (state.total_bytes) return `Loading the model, ${number((100 * state.done_bytes) / state.total_bytes)} %`;
  return state.error?.message ?? state.status;
}

/** What the page knows of the server. */
export class Server {
  constructor() {
    this.models = [];
    this.states = new Map();
    this.model = null;
    this.isLost = false;
    this.isAsking = false;
    this.timer = 0;
  }

  /** Looks whether it answers, until it does. */
  async look() {
    clearTimeout(this.timer);
    try {
      this.models = (await ask("/v1/models")).data;
      this.isLost = false;
      const health = await fetch("/health", { cache: "no-store" });
      const state = await health.json();
      this.tell(health.ok ? "" : stateText(state), !health.ok && state.status !== "loading");
      this.showModels();
      if (!health.ok) this.again();
    } catch (error) {
      this.isLost = true;
      if (error.status === 401) {
        this.tell("A key is needed");
        this.askKey();
        return;
      }
      this.tell(error.message, true);
      this.again();
    }
  }

  again() {
    this.timer = setTimeout(() => this.look(), AGAIN_MS);
  }

  tell(text, isBad = false) {
    const node = byId("connection");
    if (node.textContent !== text) node.textContent = text;
    node.classList.toggle("problem", Boolean(isBad));
  }

  showModels() {
    const names = this.models.map((model) => model.id);
    const kept = choices.get("model", null);
    if (!names.includes(this.model)) this.model = names.includes(kept) ? kept : names[0];
    const field = byId("model");
    const options = this.models.map((model) => el("option", { value: model.id, disabled: model.fits === false }, this.line(model)));
    const lines = (list) => [...list].map((option) => option.textContent).join("\n");
    if (lines(field.options) !== lines(options)) field.replaceChildren(...options);
    field.value = this.model;
    byId("model-choice").hidden = names.length < 2;
    this.showModel();
    this.showState();
  }

  /** A model in the list: its name, its size, and how it stands. */
  line(model) {
    const state = this.states.get(model.id)?.state ?? { loaded: "ready", unloaded: "asleep" }[model.status?.value];
    // What is to be opened needs some bytes; what is damaged has only a problem.
    const unfit = model.problem && !model.required_bytes ? model.problem : "does not fit";
    const word = model.fits === false ? unfit : { ready: "loaded", asleep: "not loaded", loading: "loading" }[state];
    return [model.id, model.meta?.size && bytes(model.meta.size), word].filter(Boolean).join(" · ");
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
  take(told) {
    const before = this.states.get(told.model)?.state;
    this.states.set(told.model, told);
    if (before !== told.state && told.state === "ready" && before) this.look();
    else this.showModels();
  }

  showState() {
    const told = this.states.get(this.model);
    if (!told || this.isLost) return;
    const { state, done_bytes: done, total_bytes: total, problem } = told;
    const words = {
      ready: "",
      asleep: "Not loaded: your next message loads it",
      loading: total ? `Loading the model, ${number((100 * done) / total)} %` : "Loading the model",
    };
    this.tell(problem ?? words[state] ?? `The model is ${state}`, problem || !(state in words));
  }

  choose(name) {
    this.model = name;
    choices.set("model", name);
    this.showModel();
    this.showState();
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
    byId("prompt").focus();
    if (!given) return;
    key.set(given);
    await this.look();
    document.dispatchEvent(new Event("key"));
  }
}
