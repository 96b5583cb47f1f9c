// Tells a screen reader what is written, by sentences instead of by tokens.

import { byId, el } from "./dom.js";

const SENTENCE = /[.!?:]["')\]]?\s|\n/g;
const LONGEST_KEPT = 40;

/** Light Markdown as it is said: without its marks. */
const plain = (text) =>
  text
    .replace(/^ *(```|~~~).*$/gm, "")
    .replace(/^ *\|?( *:?-+:? *\|)+.*$/gm, "")
    .replace(/!?\[([^\]]*)\]\((?:[^()]|\([^()]*\))*\)/g, "$1")
    .replace(/^ *(#{1,6}|>) /gm, "")
    .replace(/\*\*|~~|`/g, "")
    .replace(/(^|\s)[*_](?=\S)|(?<=\S)[*_](?=\s|[.,;:!?]|$)/gm, "$1")
    .replaceAll("|", ", ")
    .trim();

/** Reads an answer out while it grows. */
export class Spoken {
  constructor() {
    this.node = byId("spoken");
    this.told = 0;
    this.node.replaceChildren();
  }

  say(text) {
    this.node.append(el("p", {}, text));
    while (this.node.childNodes.length > LONGEST_KEPT) this.node.firstChild.remove();
  }

  /** Tells the whole sentences that are new; at the end the rest as well. */
  update(text, isEnd = false) {
    let end = this.told;
    for (const match of text.slice(this.told).matchAll(SENTENCE)) end = this.told + match.index + match[0].length;
    if (isEnd) end = text.length;
    const fresh = plain(text.slice(this.told, end));
    this.told = end;
    if (fresh) this.say(fresh);
  }
}
