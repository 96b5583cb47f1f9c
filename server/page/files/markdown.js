// Light Markdown as nodes of the document. What the model wrote is only ever text in them.

import { el, link, say } from "./dom.js";

const MOST_DEPTH = 8;
const MOST_INLINE = 20000;
const FENCE = /^ {0,3}(`{3,}|~{3,}) *([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?: +(.*?))?(?: +#+)? *$/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const TABLE_RULE = /^ *\|?(?: *:?-+:? *\|)+(?: *:?-+:? *)?\|? *$/;
const SCHEMES = new Set(["http:", "https:", "mailto:"]);

/** The text cut into blocks: `{kind, lines}`. */
export function blocks(lines) {
  const found = [];
  let at = 0;
  const take = (kind, end) => {
    found.push({ kind, lines: lines.slice(at, end) });
    at = end;
  };
  while (at < lines.length) {
    const line = lines[at];
    if (!line.trim()) at += 1;
    else if (FENCE.test(line)) take("fence", endOfFence(lines, at));
    else if (HEADING.test(line)) take("heading", at + 1);
    else if (RULE.test(line)) take("rule", at + 1);
    else if (QUOTE.test(line)) take("quote", endWhile(lines, at, (one) => QUOTE.test(one)));
    else if (ITEM.test(line)) take("list", endOfList(lines, at));
    else if (isTable(lines, at)) take("table", endWhile(lines, at, (one) => one.includes("|")));
    else take("paragraph", endWhile(lines, at, (one, index) => one.trim() && (index === at || !begins(lines, index))));
  }
  return found;
}

const isTable = (lines, at) => lines[at].includes("|") && at + 1 < lines.length && TABLE_RULE.test(lines[at + 1]);
const begins = (lines, at) =>
  [FENCE, HEADING, RULE, QUOTE, ITEM].some((rule) => rule.test(lines[at])) || isTable(lines, at);

function endWhile(lines, at, holds) {
  let end = at;
  while (end < lines.length && holds(lines[end], end)) end += 1;
  return end;
}

function endOfFence(lines, at) {
  const mark = FENCE.exec(lines[at])[1];
  const end = lines.findIndex((line, index) => {
    const bare = line.trim();
    return index > at && bare.length >= mark.length && bare === mark[0].repeat(bare.length);
  });
  return end < 0 ? lines.length : end + 1;
}

/** A list goes on through lines that are indented, further items, and single empty lines before either. */
function endOfList(lines, at) {
  const indent = ITEM.exec(lines[at])[1].length;
  const ordered = /\d/.test(ITEM.exec(lines[at])[2]);
  const belongs = (line) => {
    const item = ITEM.exec(line);
    if (item && item[1].length <= indent + 1) return !RULE.test(line) && /\d/.test(item[2]) === ordered;
    return line.search(/\S/) > indent + 1;
  };
  let end = at + 1;
  while (end < lines.length) {
    if (lines[end].trim()) {
      const isLazy = !begins(lines, end) && lines[end - 1].trim();
      if (!belongs(lines[end]) && !isLazy) break;
      end += 1;
    } else if (end + 1 < lines.length && belongs(lines[end + 1])) end += 1;
    else break;
  }
  return end;
}

function renderBlocks(lines, depth) {
  if (depth > MOST_DEPTH) return [el("p", {}, lines.join("\n"))];
  return blocks(lines).map((block) => render(block, depth));
}

function render({ kind, lines }, depth = 0) {
  switch (kind) {
    case "fence":
      return code(lines);
    case "heading": {
      const [, marks, text = ""] = HEADING.exec(lines[0]);
      // The page's own headings come first.
      return el(`h${Math.min(6, marks.length + 2)}`, { class: `h${marks.length}` }, inline(text));
    }
    case "rule":
      return el("hr");
    case "quote":
      return el("blockquote", {}, renderBlocks(lines.map((line) => line.replace(QUOTE, "")), depth + 1));
    case "list":
      return list(lines, depth);
    case "table":
      return table(lines);
    default:
      return el("p", {}, inline(lines.join("\n").trim()));
  }
}

function code(lines) {
  const [, mark, info] = FENCE.exec(lines[0]);
  const last = lines.length > 1 && lines.at(-1).trim().startsWith(mark) ? -1 : undefined;
  const text = lines.slice(1, last).join("\n");
  const copy = async () => say((await copied(text)) ? "Copied." : "The browser did not let it be copied.");
  const name = info.trim().split(/\s/)[0];
  return el(
    "figure",
    { class: "code" },
    el("figcaption", {}, el("span", {}, name), link("Copy", copy, { "aria-label": `Copy ${name} code` })),
    el("pre", { tabIndex: 0, "aria-label": `${name} code`, role: "region" }, el("code", {}, text)),
  );
}

/** Puts text on the clipboard, on pages too that are not served over TLS; says whether it is there. */
export async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const field = el("textarea", { class: "hidden", value: text });
    document.body.append(field);
    field.select();
    const isDone = document.execCommand("copy");
    field.remove();
    return isDone;
  }
}

function list(lines, depth) {
  const [, space, mark] = ITEM.exec(lines[0]);
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= space.length + 1) items.push([line.slice(item[0].length)]);
    else {
      const width = space.length + mark.length + 1;
      items.at(-1).push(line.slice(0, width).trim() ? line.trimStart() : line.slice(width));
    }
  }
  const isLoose = lines.some((line, index) => !line.trim() && index < lines.length - 1);
  const nodes = items.map((own) => {
    const parts = renderBlocks(own, depth + 1);
    const tight = !isLoose && parts[0]?.tagName === "P" ? [...parts.shift().childNodes] : [];
    return el("li", {}, ...tight, ...parts);
  });
  if (!/\d/.test(mark)) return el("ul", {}, nodes);
  const node = el("ol", {}, nodes);
  node.start = parseInt(mark, 10);
  return node;
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
  const sides = cells(lines[1]).map((rule) => (rule.endsWith(":") ? (rule.startsWith(":") ? "center" : "right") : ""));
  const row = (line, name) =>
    el("tr", {}, cells(line).map((cell, index) => el(name, { class: sides[index] || undefined }, inline(cell))));
  return el(
    "div",
    { class: "table", tabIndex: 0, role: "region", "aria-label": "Table" },
    el("table", {}, el("thead", {}, row(lines[0], "th")), el("tbody", {}, lines.slice(2).map((line) => row(line, "td")))),
  );
}

const SPECIAL = /!?\[|[\\`*_~<\n]|https?:\/\//g;
const WORD = /[\p{L}\p{N}]/u;

/** Nodes for text within a line: code, emphasis, links, breaks. */
export function inline(text, depth = 0) {
  if (text.length > MOST_INLINE || depth > MOST_DEPTH) return [text];
  const nodes = [];
  const missing = new Set();
  let plain = 0;
  let at = 0;
  const special = new RegExp(SPECIAL);
  for (;;) {
    special.lastIndex = at;
    const match = special.exec(text);
    if (!match) break;
    at = match.index;
    const found = span(text, at, depth, missing);
    if (!found) {
      at += match[0].length;
      continue;
    }
    if (plain < at) nodes.push(text.slice(plain, at));
    nodes.push(found.node);
    at = plain = found.end;
  }
  if (plain < text.length) nodes.push(text.slice(plain));
  return nodes;
}

/** The span that begins at a special character: its node and end; null when the character stands for itself. */
function span(text, at, depth, missing) {
  const mark = text[at];
  if (mark === "\n") return { node: el("br"), end: at + 1 };
  if (mark === "\\") {
    return /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "") ? { node: text[at + 1], end: at + 2 } : null;
  }
  if (mark === "`") return codeSpan(text, at, missing);
  // A picture is a link: nothing is loaded from elsewhere.
  if (mark === "!") {
    const found = linkSpan(text, at + 1, depth);
    if (found && !found.node.textContent) found.node.textContent = "image";
    return found;
  }
  if (mark === "[" || mark === "<" || mark === "h") return linkSpan(text, at, depth);
  return emphasis(text, at, depth, missing);
}

function codeSpan(text, at, missing) {
  const ticks = /^`+/.exec(text.slice(at, at + 64))[0];
  if (missing.has(ticks)) return null;
  for (let end = text.indexOf(ticks, at + ticks.length); end >= 0; end = text.indexOf(ticks, end)) {
    let after = end + ticks.length;
    if (text[after] !== "`") {
      const inner = text.slice(at + ticks.length, end).replace(/\n/g, " ");
      const bare = /^ .*[^ ].* $/.test(inner) ? inner.slice(1, -1) : inner;
      return { node: el("code", {}, bare), end: after };
    }
    while (text[after] === "`") after += 1;
    end = after;
  }
  missing.add(ticks);
  return null;
}

function linkSpan(text, at, depth) {
  const rest = text.slice(at, at + 2048);
  const whole = /^\[((?:[^\][\\\n]|\\.)*)\]\(<?([^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*)>?(?:\s+"[^"]*")?\)/.exec(rest);
  if (whole) return anchor(whole[2], inline(whole[1], depth + 1), at + whole[0].length);
  const bare = /^<(https?:\/\/[^\s<>]+|[^\s<>@]+@[^\s<>@]+)>/.exec(rest);
  if (bare) return anchor(bare[1].includes("://") ? bare[1] : `mailto:${bare[1]}`, [bare[1]], at + bare[0].length);
  const address = /^https?:\/\/[^\s<>"'`\])]+[^\s<>"'`\]).,;:!?*_]/.exec(rest);
  return address && anchor(address[0], [address[0]], at + address[0].length);
}

function anchor(address, children, end) {
  let scheme;
  try {
    scheme = new URL(address).protocol;
  } catch {
    return null;
  }
  if (!SCHEMES.has(scheme)) return null;
  return { node: el("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, children), end };
}

function emphasis(text, at, depth, missing) {
  const mark = text[at];
  const twice = text[at + 1] === mark;
  if (mark === "~" && !twice) return null;
  const ends = twice ? mark + mark : mark;
  const begin = at + ends.length;
  if (missing.has(ends) || !text[begin] || /\s/.test(text[begin])) return null;
  if (mark === "_" && at > 0 && WORD.test(text[at - 1])) return null;
  for (let end = text.indexOf(ends, begin + 1); end >= 0; end = text.indexOf(ends, end + 1)) {
    const isInside = mark === "_" && WORD.test(text[end + ends.length] ?? "");
    const isOther = !twice && (text[end + 1] === mark || text[end - 1] === mark);
    if (/\s/.test(text[end - 1]) || isInside || isOther) continue;
    const name = mark === "~" ? "del" : twice ? "strong" : "em";
    // *** closes the inner span first.
    const stop = twice && text[end + 2] === mark ? end + 1 : end;
    return { node: el(name, {}, inline(text.slice(begin, stop), depth + 1)), end: stop + ends.length };
  }
  missing.add(ends);
  return null;
}

/** Shows a text that grows: blocks that did not change keep their nodes, and with them selections and scrolling. */
export class MarkdownView {
  constructor(node) {
    this.node = node;
    this.shown = [];
  }

  update(text) {
    const found = blocks(text.replace(/\r\n?/g, "\n").replaceAll("\t", "    ").split("\n"));
    const sources = found.map((block) => `${block.kind}\n${block.lines.join("\n")}`);
    let same = 0;
    while (same < sources.length && this.shown[same] === sources[same]) same += 1;
    while (this.node.childNodes.length > same) this.node.lastChild.remove();
    this.node.append(...found.slice(same).map((block) => render(block)));
    this.shown = sources;
  }
}
