// Memory by use against its limits, and other limits for a running server.

import { ask } from "./api.js";
import { bar, key } from "./bars.js";
import { ask as askForm, byId, bytes, el, link, say, seconds } from "./dom.js";

const USES = {
  weights: "weights without experts",
  copied: "weights without experts",
  mapped: "pages shared with the file",
  experts: "experts",
  kv: "KV cache",
  compute: "buffers for computing",
  pinned: "pinned, on the way to devices",
  program: "program",
  drivers: "drivers of devices",
};
const PATTERNS = { experts: 0, weights: 1, copied: 1, kv: 2, compute: 3, program: 4 };

/** One memory, such as the host's or a device's, whose button stays where it is while the figures change. */
class Place {
  constructor(onchange) {
    this.title = el("strong");
    this.told = el("span", { class: "key-value" });
    this.stack = el("div");
    this.legend = el("ul", { class: "legend" });
    this.limit = el("span");
    this.button = link("Change", onchange);
    this.node = el(
      "div",
      { class: "memory-place" },
      el("p", { class: "place-head" }, this.title, this.told),
      this.stack,
      this.legend,
      el("p", { class: "note" }, this.limit, " ", this.button),
    );
  }

  update({ name, setting, budget, reserve, by_use: uses }) {
    const parts = Object.entries(uses)
      .filter(([, value]) => value > 0)
      .map(([use, value]) => ({ label: USES[use] ?? use, value, pattern: PATTERNS[use] ?? 5 }))
      .sort((one, other) => one.pattern - other.pattern);
    const used = parts.reduce((sum, part) => sum + part.value, 0) + (reserve ?? 0);
    if (reserve) parts.push({ label: "kept for the server's other processes", value: reserve, pattern: "r" });
    for (const part of parts) part.title = `${part.label}: ${bytes(part.value)}`;
    const title = name === "host" ? "Main memory" : name;
    const told = budget ? `${bytes(used)} of ${bytes(budget)}` : bytes(used);
    this.title.textContent = title;
    this.told.textContent = told;
    this.stack.replaceChildren(bar(parts, Math.max(budget ?? 0, used) || 1, `${title}: ${told}`));
    this.legend.replaceChildren(...parts.map((part) => key(`p${part.pattern}`, part.label, bytes(part.value))));
    this.limit.textContent = `The limit is ${setting}.`;
    this.button.setAttribute("aria-label", `Change the limit of ${title}`);
  }
}

/** All places of a model. */
export class MemoryView {
  constructor() {
    this.places = [];
    this.process = el("p", { class: "note" });
    this.node = el("div", {}, this.process);
  }

  update({ model, places, resident, peak }) {
    if (this.places.length !== places.length) {
      this.places = places.map((_, index) => new Place(() => changeLimit(this.told.model, this.told.places, this.told.places[index])));
      this.node.replaceChildren(...this.places.map((place) => place.node), this.process);
    }
    this.told = { model, places };
    for (const [index, place] of places.entries()) this.places[index].update(place);
    this.process.textContent = resident ? `The engine's process: ${bytes(resident)} now, ${bytes(peak)} at most so far.` : "";
  }
}

/** Asks for the limit of one place in memory and has the server take it; asks again when it does not. */
async function changeLimit(model, places, place) {
  const dialog = byId("ask-name");
  const name = place.name === "host" ? "main memory" : place.name;
  let given = place.setting;
  let problem = "";
  for (;;) {
    const field = el("input", { name: "text", value: given, required: true, autocomplete: "off", maxlength: 40 });
    const answer = await askForm(
      dialog,
      `Limit of ${name}`,
      [
        el(
          "label",
          { class: "field" },
          el("span", { class: "field-name" }, "Size, such as 8GiB, 50% or auto"),
          field,
          el("span", { class: "note" }, "Answers go on. Less memory means more reads from the disk, and the same text."),
        ),
        el("p", { class: "problem", role: "alert" }, problem),
      ],
      [link("Cancel", () => dialog.close()), el("button", { class: "primary", type: "submit" }, "Change")],
    );
    if (!answer) return;
    given = answer.form.get("text").trim();
    const others = places.filter((one) => one.name !== "host");
    const body =
      place.name === "host" ? { model, ram: given } : { model, vram: others.map((one) => (one === place ? given : one.setting)) };
    try {
      const { change } = await ask("/v1/memory", { body });
      say(`The limit is ${given}: ${bytes(change.loaded_bytes)} were read, and answers waited ${seconds(change.seconds)}.`);
      return;
    } catch (error) {
      problem = error.message;
    }
  }
}
