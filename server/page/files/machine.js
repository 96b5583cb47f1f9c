// The column beside the chat: the map of experts, speed, time and memory, as the server tells them.

import { bar, key } from "./bars.js";
import { byId, bytes, count, el, link, number, seconds } from "./dom.js";
import { ExpertMap } from "./map.js";
import { MemoryView } from "./memory.js";

const VIEWS = [
  ["place", "Place"],
  ["type", "Precision"],
  ["use", "Use"],
  ["all", "Total use"],
];
const MARKS = [
  ["d", "device", "on a device"],
  ["h", "host", "in memory"],
  [".", "disk", "on disk"],
  ["x", "dropped", "left out"],
];
const TIMES = [
  ["compute_seconds", "computing"],
  ["disk_seconds", "waiting for the disk"],
  ["device_seconds", "devices and links"],
  ["other_seconds", "other"],
];
const BOUNDS = { cpu: "the processor", disk: "the disk", link: "the link", device: "the device" };

export class Machine {
  constructor() {
    this.models = new Map();
    this.shown = null;
    this.isLarge = false;
    this.map = new ExpertMap();
    this.sizes = el("p", { class: "note" });
    this.map.onfit = (text) => (this.sizes.textContent = text);
    this.larger = link("Larger", () => this.enlarge(!this.isLarge), { id: "larger" });
    this.legend = el("ul", { class: "legend" });
    this.table = el("details", { class: "as-table" }, el("summary", {}, "As a table"), el("div"));
    this.table.addEventListener("toggle", () => this.showTable());
    this.speed = el("div");
    this.time = el("div");
    this.memory = new MemoryView();
    this.mapPart = el(
      "section",
      { "aria-labelledby": "experts-title" },
      el("div", { class: "part-head" }, el("h2", { id: "experts-title" }, "Experts"), this.sizes, this.larger),
      this.viewChoice(),
      this.map.node,
      this.map.readout,
      this.legend,
      this.table,
    );
    this.empty = el("p", { class: "note waiting" }, "The map of experts is here as long as the model is loaded.");
    this.parts = [this.mapPart, this.section("Speed", this.speed), this.section("Time", this.time), this.section("Memory", this.memory.node)];
    byId("machine").replaceChildren(this.empty, ...this.parts);
    for (const part of this.parts) part.hidden = true;
  }

  section(title, body) {
    const id = `${title.toLowerCase()}-title`;
    return el("section", { "aria-labelledby": id }, el("h2", { id }, title), body);
  }

  viewChoice() {
    const choices = VIEWS.map(([value, label]) =>
      el(
        "label",
        {},
        el("input", { type: "radio", name: "view", value, checked: value === "place", onchange: () => this.choose(value) }),
        el("span", {}, label),
      ),
    );
    return el("fieldset", { class: "views" }, el("legend", { class: "hidden" }, "What the map shows"), ...choices);
  }

  choose(view) {
    this.map.show(view);
    this.showLegend();
  }

  /** Gives the map the whole page, or takes it back. */
  enlarge(isLarge) {
    this.isLarge = isLarge;
    byId("machine").classList.toggle("large", isLarge);
    this.larger.textContent = isLarge ? "Smaller" : "Larger";
    this.map.limit.height = isLarge ? Math.max(440, innerHeight - 300) : 440;
    this.map.fit();
    this.larger.dispatchEvent(new CustomEvent("enlarge", { bubbles: true }));
  }

  /** Takes an event of the stream. */
  take(name, data) {
    if (name === "state" && data.state !== "ready" && data.state !== "silent") this.forget(data.model);
    if (!["experts", "places", "work"].includes(name)) return;
    const known = this.models.get(data.model) ?? {};
    known[name] = data;
    this.models.set(data.model, known);
    this.shown ??= data.model;
    if (data.model === this.shown) this.show(name);
  }

  /** Shows another model, once something is known of it. */
  select(model) {
    this.shown = model;
    this.empty.hidden = false;
    for (const part of this.parts) part.hidden = true;
    for (const name of ["experts", "places", "work"]) if (this.state[name]) this.show(name);
  }

  /** A model is no longer open: what was known of it holds no more. */
  forget(model) {
    this.models.delete(model);
    if (model === this.shown) this.select(model);
  }

  get state() {
    return this.models.get(this.shown) ?? {};
  }

  show(name) {
    this.empty.hidden = true;
    if (name === "experts") this.showExperts();
    else if (name === "places") this.showMemory();
    else this.showWork();
  }

  showExperts() {
    const { experts } = this.state;
    const nLayers = experts.layers.length;
    this.mapPart.hidden = false;
    this.map.node.hidden = nLayers === 0;
    if (nLayers) this.map.update(experts);
    if (!nLayers) {
      this.sizes.textContent = "This model has no experts: every token uses all of it.";
      return;
    }
    this.showLegend();
    if (this.table.open) this.showTable();
  }

  showLegend() {
    const { experts } = this.state;
    if (!experts) return;
    const marks = experts.layers.map((layer) => layer.tiers).join("");
    const total = (mark) => marks.split(mark).length - 1;
    const rows =
      this.map.view === "type"
        ? experts.formats.map((format, index) => {
            const n = experts.layers.reduce((sum, layer) => sum + layer.formats.filter((one) => one === index).length, 0);
            const row = key("type", [...new Set(format.types.split(" "))].join(" and "), `${number(n)} × ${bytes(format.bytes)}`);
            row.firstChild.style.opacity = this.map.shade(index);
            return row;
          })
        : this.map.view === "place"
          ? MARKS.filter(([mark]) => mark === "h" || mark === "." || total(mark)).map(([mark, name, label]) => key(name, label, number(total(mark))))
          : [key("scale", this.map.view === "use" ? "tokens of this answer that used it" : "tokens that used it since the start", `up to ${number(this.map.mostUses())}`)];
    const reading = experts.layers.reduce((sum, layer) => sum + layer.reading.length, 0);
    if (this.map.view === "place") rows.push(key("reading", "being read", number(reading)), key("used", "used by this answer", ""));
    this.legend.replaceChildren(...rows);
  }

  showTable() {
    const { experts } = this.state;
    if (!this.table.open || !experts) return;
    const names = ["Layer", ...MARKS.map(([, , label]) => label), "being read", "uses"];
    const rows = experts.layers.map((layer) => [
      layer.layer,
      ...MARKS.map(([mark]) => layer.tiers.split(mark).length - 1),
      layer.reading.length,
      layer.uses ? layer.uses.reduce((sum, one) => sum + one, 0) : "–",
    ]);
    this.table.lastChild.replaceChildren(
      el(
        "table",
        {},
        el("thead", {}, el("tr", {}, names.map((name) => el("th", { scope: "col" }, name)))),
        el("tbody", {}, rows.map((row) => el("tr", {}, row.map((cell, index) => el(index ? "td" : "th", index ? {} : { scope: "row" }, String(cell)))))),
      ),
    );
  }

  showWork() {
    const { work } = this.state;
    this.showSpeed(work.speed ?? {});
    const { answer } = work;
    this.parts[2].hidden = !answer?.seconds;
    if (!answer?.seconds) return;
    const parts = TIMES.map(([name, label], index) => ({ label, value: answer[name] ?? 0, pattern: index, title: label })).filter((part) => part.value > 0);
    const whole = parts.reduce((sum, part) => sum + part.value, 0) || 1;
    const share = (value) => `${number((100 * value) / whole)} %`;
    const told = parts.map((part) => `${share(part.value)} ${part.label}`).join(", ");
    this.time.replaceChildren(
      bar(parts, whole, told),
      el("ul", { class: "legend" }, parts.map((part) => key(`p${part.pattern}`, part.label, `${seconds(part.value)} · ${share(part.value)}`))),
      el(
        "p",
        { class: "note" },
        `${work.n_running ? "This answer so far" : "The last answer"}: ${seconds(answer.seconds)} for ${count(answer.n_prompt, "token")} of prompt and ${number(answer.n_predicted)} written`,
        answer.hit_share === null || answer.hit_share === undefined ? "." : `; ${number(answer.hit_share * 100)} % of the experts that they used were at hand.`,
      ),
    );
  }

  showSpeed({ measured, predicted, most, bound }) {
    this.parts[1].hidden = !measured && !predicted;
    if (this.parts[1].hidden) return;
    const whole = Math.max(measured ?? 0, predicted ?? 0, most ?? 0) * 1.04;
    const told = predicted
      ? `${number(predicted, 1)} predicted, at most ${number(most, 1)}: ${BOUNDS[bound] ?? bound} sets the limit.`
      : "Nothing is predicted: slimoe plan has not measured this machine for this model.";
    const scale = el("div", { class: "scale-bar", "aria-hidden": "true" }, el("span", { class: "scale-fill" }));
    scale.firstChild.style.width = `${(100 * (measured ?? 0)) / whole}%`;
    for (const [value, name] of [[predicted, "predicted"], [most, "most"]]) {
      if (!value) continue;
      const tick = el("span", { class: `tick ${name}`, title: `${name === "most" ? "at most" : name} ${number(value, 1)}` });
      tick.style.left = `${(100 * value) / whole}%`;
      scale.append(tick);
    }
    const big = el("p", { class: "big" }, measured ? number(measured, 1) : "–", el("span", { class: "unit" }, " tokens/s"));
    this.speed.replaceChildren(big, ...(predicted ? [scale] : []), el("p", { class: "note" }, told));
  }

  showMemory() {
    this.parts[3].hidden = false;
    this.memory.update(this.state.places);
  }
}
