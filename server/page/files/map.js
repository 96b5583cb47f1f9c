// The map of experts: a cell for each expert of each layer, by what is known of it now.

import { bytes, count, el, number } from "./dom.js";

const LARGEST_CELL = 28;
const GUTTER = { left: 26, top: 18 };
const FLASH_MS = 900;
const COLOURS = ["ink", "soft", "line", "paper", "host", "device", "reading", "scale"];
const TIERS = { h: "in memory", d: "on a device", ".": "on disk only", x: "left out of the file" };
const still = matchMedia("(prefers-reduced-motion: reduce)");

/** The shortest name of a format: the bits of its types, once where they are the same. */
function bits(types) {
  const found = types.split(" ").map((type) => /\d+/.exec(type)?.[0] ?? "?");
  return found.every((one) => one === found[0]) ? found[0] : `${found[0]}+`;
}

export class ExpertMap {
  constructor() {
    this.view = "place";
    /** Told how the map lies, in words. */
    this.onfit = () => {};
    this.data = null;
    this.cell = null;
    this.flashed = new Map();
    this.limit = { width: 360, height: 440 };
    this.canvas = el("canvas", { "aria-hidden": "true" });
    this.readout = el("p", { class: "readout", id: "map-readout", role: "status" });
    this.probes = Object.fromEntries(COLOURS.map((name) => [name, el("i", { class: `probe-${name}`, hidden: false })]));
    this.node = el(
      "div",
      {
        id: "map",
        class: "map",
        tabIndex: 0,
        role: "application",
        "aria-roledescription": "map",
        "aria-label": "Map of experts. Arrows move from expert to expert.",
        "aria-describedby": "map-readout",
        onkeydown: (event) => this.move(event),
        onmousemove: (event) => this.point(event),
        onclick: (event) => this.point(event),
        onmouseleave: () => document.activeElement !== this.node && this.select(null),
        onfocus: () => this.data && !this.cell && this.select({ layer: 0, expert: 0 }),
        onblur: () => this.select(null),
      },
      el("div", { class: "probes", "aria-hidden": "true" }, Object.values(this.probes)),
      this.canvas,
    );
    document.addEventListener("theme", () => this.recolour());
    new ResizeObserver(() => this.fit()).observe(this.node);
  }

  recolour() {
    this.colours = Object.fromEntries(COLOURS.map((name) => [name, getComputedStyle(this.probes[name]).color]));
    this.draw();
  }

  /** Takes the newest state and marks the experts that were used since the one before. */
  update(data) {
    const before = this.data;
    this.data = data;
    const isNewAnswer = before?.layers.length === data.layers.length;
    const now = performance.now();
    for (const [row, layer] of data.layers.entries()) {
      const old = isNewAnswer ? before.layers[row].total_uses : null;
      layer.total_uses?.forEach((uses, expert) => {
        if (old && uses > old[expert]) this.flashed.set(row * 65536 + expert, now);
      });
    }
    if (before?.layers.length !== data.layers.length || before.layers[0]?.tiers.length !== data.layers[0]?.tiers.length) this.fit();
    else this.draw();
    if (this.cell) this.tell();
  }

  show(view) {
    this.view = view;
    this.draw();
  }

  /** Chooses the size of a cell, and whether layers or experts go across: whichever makes cells larger. */
  fit() {
    if (!this.data?.layers.length) return;
    const nLayers = this.data.layers.length;
    const nExperts = Math.max(...this.data.layers.map((layer) => layer.tiers.length));
    const width = Math.max(120, this.node.clientWidth - GUTTER.left);
    const size = (across, down) => [Math.min(LARGEST_CELL, width / across), Math.min(LARGEST_CELL, this.limit.height / down)];
    const [upright, lying] = [size(nExperts, nLayers), size(nLayers, nExperts)];
    // Many layers of few experts lie down for a smaller loss than the height that they would take.
    this.isLying = Math.min(...lying) > Math.min(...upright) * (nLayers > nExperts ? 0.7 : 1);
    [this.cellWidth, this.cellHeight] = this.isLying ? lying : upright;
    const [across, down] = this.isLying ? [nLayers, nExperts] : [nExperts, nLayers];
    if (Math.min(this.cellWidth, this.cellHeight) >= 8) this.cellWidth = this.cellHeight = Math.min(this.cellWidth, this.cellHeight);
    this.across = across;
    this.down = down;
    const [layers, experts] = this.isLying ? ["across", "down"] : ["down", "across"];
    this.onfit(`${count(nLayers, "layer")} ${layers}, ${count(nExperts, "expert")} ${experts}`);
    const scale = devicePixelRatio || 1;
    const [wide, high] = [GUTTER.left + across * this.cellWidth, GUTTER.top + down * this.cellHeight];
    this.canvas.width = Math.ceil(wide * scale);
    this.canvas.height = Math.ceil(high * scale);
    this.canvas.style.width = `${wide}px`;
    this.canvas.style.height = `${high}px`;
    if (!this.colours) this.recolour();
    this.draw();
  }

  draw() {
    if (this.frame || !this.data || !this.cellWidth) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.paint();
    });
  }

  paint() {
    const context = this.canvas.getContext("2d");
    const scale = devicePixelRatio || 1;
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.labels(context);
    const now = performance.now();
    let isMoving = false;
    const most = this.mostUses();
    for (const [row, layer] of this.data.layers.entries()) {
      const reading = new Set(layer.reading);
      isMoving ||= reading.size > 0 && !still.matches;
      for (let expert = 0; expert < layer.tiers.length; expert += 1) {
        const place = this.place(row, expert);
        const expertState = { layer, expert, tier: layer.tiers[expert], isReading: reading.has(expert), most };
        this.paintCell(context, place, expertState, now);
        const age = now - (this.flashed.get(row * 65536 + expert) ?? -Infinity);
        if (age < FLASH_MS) {
          this.ring(context, place, this.colours.ink, still.matches ? 1 : 1 - age / FLASH_MS);
          isMoving = true;
        } else this.flashed.delete(row * 65536 + expert);
      }
    }
    if (this.cell) this.ring(context, this.place(this.cell.layer, this.cell.expert), this.colours.ink, 1, 2);
    if (isMoving) setTimeout(() => this.draw(), still.matches ? FLASH_MS : 40);
  }

  mostUses() {
    const field = this.view === "all" ? "total_uses" : "uses";
    return this.data.layers.reduce((most, layer) => (layer[field] ? Math.max(most, ...layer[field]) : most), 1);
  }

  place(row, expert) {
    const [column, line] = this.isLying ? [row, expert] : [expert, row];
    const gap = Math.min(this.cellWidth, this.cellHeight) >= 12 ? 2 : Math.min(this.cellWidth, this.cellHeight) >= 5 ? 1 : 0.5;
    return {
      x: GUTTER.left + column * this.cellWidth,
      y: GUTTER.top + line * this.cellHeight,
      width: this.cellWidth - gap,
      height: this.cellHeight - gap,
    };
  }

  labels(context) {
    context.fillStyle = this.colours.soft;
    context.font = "11px Inter, ui-sans-serif, system-ui, sans-serif";
    const numbers = (n, size, write) => {
      const step = [1, 2, 4, 8, 16, 32, 64].find((one) => one * size >= 22) ?? 128;
      for (let index = 0; index < n; index += step) write(index);
    };
    const layerName = (index) => String(this.data.layers[index]?.layer ?? index);
    context.textBaseline = "middle";
    context.textAlign = "right";
    numbers(this.down, this.cellHeight + 6, (index) =>
      context.fillText(this.isLying ? String(index) : layerName(index), GUTTER.left - 8, GUTTER.top + (index + 0.5) * this.cellHeight - 0.5),
    );
    context.textAlign = "center";
    numbers(this.across, this.cellWidth, (index) =>
      context.fillText(this.isLying ? layerName(index) : String(index), GUTTER.left + (index + 0.5) * this.cellWidth - 1, GUTTER.top / 2 - 1),
    );
  }

  paintCell(context, place, state, now) {
    const { x, y, width, height } = place;
    const small = Math.min(width, height);
    if (this.view === "place") this.paintPlace(context, place, state, small);
    else this.paintShade(context, place, state, small);
    if (state.isReading) {
      context.fillStyle = this.colours.reading;
      if (small < 8) context.fillRect(x, y, width, height);
      else {
        // A read fills its cell from below, as it fills memory.
        const share = still.matches ? 0.5 : 0.3 + 0.4 * (0.5 + 0.5 * Math.sin(now / 150));
        context.fillRect(x, y + height * (1 - share), width, height * share);
        context.strokeStyle = this.colours.reading;
        context.lineWidth = 1.5;
        context.strokeRect(x + 0.75, y + 0.75, width - 1.5, height - 1.5);
      }
    }
  }

  paintPlace(context, { x, y, width, height }, { layer, expert, tier, most }, small) {
    if (tier === "h" || tier === "d") {
      context.fillStyle = tier === "h" ? this.colours.host : this.colours.device;
      context.fillRect(x, y, width, height);
      if (tier === "d" && small >= 7) {
        context.fillStyle = this.colours.paper;
        context.beginPath();
        context.arc(x + width / 2, y + height / 2, small / 6, 0, 7);
        context.fill();
      }
    } else if (small < 5) {
      context.fillStyle = this.colours.line;
      if (tier === ".") context.fillRect(x, y, width, height);
    } else {
      context.strokeStyle = tier === "." ? this.colours.soft : this.colours.line;
      context.globalAlpha = tier === "." ? 0.55 : 1;
      context.lineWidth = 1;
      context.strokeRect(x + 0.5, y + 0.5, width - 1, height - 1);
      if (tier === "x") {
        context.beginPath();
        context.moveTo(x + 3, y + 3);
        context.lineTo(x + width - 3, y + height - 3);
        context.moveTo(x + width - 3, y + 3);
        context.lineTo(x + 3, y + height - 3);
        context.strokeStyle = this.colours.soft;
        context.stroke();
      }
      context.globalAlpha = 1;
    }
    const uses = layer.uses?.[expert] ?? 0;
    if (uses && small >= 9) {
      const long = Math.max(2, (width - 6) * Math.sqrt(uses / most));
      context.fillStyle = tier === "h" || tier === "d" ? this.colours.paper : this.colours.ink;
      context.fillRect(x + 3, y + height - 5, long, 2);
    }
  }

  paintShade(context, { x, y, width, height }, { layer, expert, most, tier }, small) {
    const format = layer.formats[expert];
    const uses = (this.view === "all" ? layer.total_uses : layer.uses)?.[expert];
    let share = 0;
    let label = "";
    if (this.view === "type" && format >= 0) {
      share = this.shade(format);
      label = bits(this.data.formats[format].types);
    } else if (this.view !== "type" && uses) {
      share = 0.12 + 0.88 * Math.sqrt(uses / most);
      label = number(uses);
    }
    context.globalAlpha = share || 1;
    context.fillStyle = share ? this.colours.scale : this.colours.line;
    if (share || small < 5) context.fillRect(x, y, width, height);
    else {
      context.strokeStyle = this.colours.line;
      context.lineWidth = 1;
      context.strokeRect(x + 0.5, y + 0.5, width - 1, height - 1);
      if (tier === "x") context.fillRect(x + width / 2 - 2, y + height / 2 - 0.5, 4, 1);
    }
    context.globalAlpha = 1;
    if (!label || small < 9 || label.length * 6 > width + 1) return;
    context.fillStyle = share > 0.55 ? this.colours.paper : this.colours.ink;
    context.font = `${Math.min(10.5, small)}px Inter, ui-sans-serif, system-ui, sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.fillText(label, x + width / 2, y + height / 2 + 0.5);
  }

  /** How dark a format is shown: the larger, the darker. */
  shade(format) {
    const sizes = this.data.formats.map((one) => one.bytes);
    const [low, high] = [Math.min(...sizes), Math.max(...sizes)];
    return high > low ? 0.25 + (0.65 * (sizes[format] - low)) / (high - low) : 0.5;
  }

  ring(context, { x, y, width, height }, colour, alpha, wide = 1.5) {
    context.globalAlpha = alpha;
    context.strokeStyle = colour;
    context.lineWidth = wide;
    context.strokeRect(x - 0.5, y - 0.5, width + 1, height + 1);
    context.globalAlpha = 1;
  }

  point(event) {
    if (!this.data?.layers.length) return;
    const bounds = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - bounds.left - GUTTER.left) / this.cellWidth);
    const line = Math.floor((event.clientY - bounds.top - GUTTER.top) / this.cellHeight);
    const [layer, expert] = this.isLying ? [column, line] : [line, column];
    const exists = this.data.layers[layer]?.tiers[expert] !== undefined;
    this.select(exists && column >= 0 && line >= 0 ? { layer, expert } : null);
  }

  move(event) {
    if (!this.data?.layers.length) return;
    const cell = this.cell ?? { layer: 0, expert: 0 };
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    let { layer, expert } = cell;
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (steps[event.key]) {
      const [down, across] = this.isLying ? [...steps[event.key]].reverse() : steps[event.key];
      layer += down;
      expert += across;
    } else if (event.key === "Home") expert = 0;
    else if (event.key === "End") expert = this.data.layers[layer].tiers.length - 1;
    else return;
    event.preventDefault();
    layer = Math.max(0, Math.min(this.data.layers.length - 1, layer));
    this.select({ layer, expert: Math.max(0, Math.min(this.data.layers[layer].tiers.length - 1, expert)) });
  }

  select(cell) {
    this.cell = cell;
    this.tell();
    this.draw();
  }

  tell() {
    const text = this.cell ? this.words(this.cell) : "";
    if (this.readout.textContent !== text) this.readout.textContent = text;
  }

  /** What is known of an expert, in words. */
  words({ layer: row, expert }) {
    const layer = this.data.layers[row];
    const format = this.data.formats[layer.formats[expert]];
    const parts = [`Layer ${layer.layer}, expert ${expert}: ${TIERS[layer.tiers[expert]] ?? "unknown"}`];
    if (layer.reading.includes(expert)) parts.push("being read");
    if (format) parts.push(`${[...new Set(format.types.split(" "))].join(" and ")}, ${bytes(format.bytes)}`);
    const uses = layer.uses
      ? `Used by ${count(layer.uses[expert], "token")} of this answer, ${number(layer.total_uses[expert])} in all.`
      : "Its uses are not known.";
    return `${parts.join(", ")}. ${uses}`;
  }
}
