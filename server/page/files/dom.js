// Makes elements. Text becomes text nodes, never HTML.

const PROPERTIES = new Set(["hidden", "disabled", "value", "checked", "type", "id", "open", "href", "rows", "tabIndex"]);

/** An element with attributes, listeners (`onclick`) and children, which are nodes, texts or nothing. */
export function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (PROPERTIES.has(key)) node[key] = value;
    else if (key === "class") node.className = value;
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** The element with an id, which the page has. */
export const byId = (id) => document.getElementById(id);

/** A button that looks like a link. */
export const link = (label, onclick, attributes = {}) =>
  el("button", { type: "button", class: "link", onclick, ...attributes }, label);

/** A number as people read it, with so many digits behind the point. */
export function number(value, digits = 0) {
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

/** Bytes in the units of the command line. */
export function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let size = Math.abs(n);
  let unit = 0;
  while (size >= 1024 && unit < units.length - 1) {
    size /= 1024;
    unit += 1;
  }
  return `${number(size, unit === 0 || size >= 100 ? 0 : 1)} ${units[unit]}`;
}

/** Seconds as people read them. */
export function seconds(value) {
  if (value < 1) return `${number(value * 1000)} ms`;
  if (value < 120) return `${number(value, 1)} s`;
  return `${number(Math.floor(value / 60))} min ${number(value % 60)} s`;
}

/** A word with its number: `1 token`, `2 tokens`. */
export const count = (n, word) => `${number(n)} ${word}${n === 1 ? "" : "s"}`;

let undone = null;
/** Says something for a while, with a button that takes it back. */
export function say(text, undo) {
  const toast = byId("toast");
  clearTimeout(undone);
  const close = () => {
    toast.hidden = true;
    toast.replaceChildren();
  };
  const take = undo && (() => {
    close();
    undo();
  });
  toast.replaceChildren(el("span", {}, text), ...(take ? [link("Undo", take)] : []), link("Close", close));
  toast.hidden = false;
  undone = setTimeout(close, undo ? 20000 : 8000);
}

/** Opens a dialog with a form; resolves to its values, or null when it was closed without an answer. */
export function ask(dialog, title, body, buttons) {
  return new Promise((resolve) => {
    const form = el("form", { method: "dialog" }, el("h2", { id: dialog.getAttribute("aria-labelledby") }, title));
    form.append(...body, el("div", { class: "dialog-foot" }, ...buttons));
    let answer = null;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      answer = { form: new FormData(form), button: event.submitter?.value ?? "" };
      dialog.close();
    });
    dialog.replaceChildren(form);
    dialog.addEventListener("close", () => resolve(answer), { once: true });
    dialog.showModal();
  });
}
