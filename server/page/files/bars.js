// Bars of several parts, and the lines that explain them. Every part has a pattern besides its colour.

import { el } from "./dom.js";

/** A bar of parts, each with its share, pattern and name; what is left stays empty. */
export function bar(parts, whole, label) {
  const node = el("div", { class: "stack", role: "img", "aria-label": label });
  for (const [index, part] of parts.entries()) {
    const piece = el("span", { class: `part p${part.pattern ?? index}`, title: part.title });
    piece.style.width = `${(100 * part.value) / whole}%`;
    node.append(piece);
  }
  return node;
}

/** A line that explains a pattern. */
export const key = (pattern, name, value) =>
  el("li", {}, el("span", { class: `swatch ${pattern}`, "aria-hidden": "true" }), el("span", { class: "key-name" }, name), el("span", { class: "key-value" }, value));
