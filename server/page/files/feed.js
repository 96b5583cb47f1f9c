// The server's stream of events, read for as long as somebody looks at the page.

import { call, events } from "./api.js";

const FIRST_WAIT_MS = 1000;
const LONGEST_WAIT_MS = 15000;

/** Calls `onevent(name, data)` for each event and `onlost(error)` whenever the stream ends; connects again by itself. */
export class Feed {
  constructor(onevent, onlost) {
    this.onevent = onevent;
    this.onlost = onlost;
    this.control = null;
    // A browser has few connections to one server, and hidden tabs would keep them.
    document.addEventListener("visibilitychange", () => (document.hidden ? this.stop() : this.start()));
    document.addEventListener("key", () => this.start());
  }

  stop() {
    this.control?.abort();
    this.control = null;
  }

  async start() {
    this.stop();
    const control = (this.control = new AbortController());
    let wait = FIRST_WAIT_MS;
    while (!control.signal.aborted) {
      let lost = null;
      try {
        for await (const { event, data } of events(await call("/v1/events", { signal: control.signal }))) {
          wait = FIRST_WAIT_MS;
          this.onevent(event, JSON.parse(data));
        }
      } catch (error) {
        lost = error;
      }
      if (control.signal.aborted) return;
      this.onlost(lost);
      if (lost?.status === 401 || lost?.status === 404) return;
      await new Promise((resolve) => setTimeout(resolve, wait));
      wait = Math.min(2 * wait, LONGEST_WAIT_MS);
    }
  }
}
