// Talks to the server that this page came from, and to nobody else.

const KEY = "slimoe.key";

/** The key of the server: kept until the tab is closed, sent in a header, never in an address. */
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** What the server answered instead of what was asked for; status 0 when it did not answer at all. */
export class ServerError extends Error {
  constructor(status, info, retryAfter = null) {
    super(info.message);
    this.status = status;
    this.code = info.code ?? null;
    this.param = info.param ?? null;
    this.retryAfter = retryAfter;
  }
}

/** Sends a request; raises ServerError unless its status is one of success. */
export async function call(path, { body, signal, method } = {}) {
  const headers = {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: method ?? (body === undefined ? "GET" : "POST"),
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      credentials: "omit",
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, { message: "The server does not answer." });
  }
  if (response.ok) return response;
  let info = { message: `The server answered with status ${response.status}.` };
  try {
    info = (await response.json()).error ?? info;
  } catch {
    // What is no JSON says no more than its status.
  }
  throw new ServerError(response.status, info, Number(response.headers.get("Retry-After")) || null);
}

/** The JSON document that a request is answered with. */
export const ask = async (path, options) => (await call(path, options)).json();

/** The events of a stream: `{event, data, id}`, the data as text. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let found = { event: "message", data: [], id: null };
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (found.data.length) yield { ...found, data: found.data.join("\n") };
          found = { event: "message", data: [], id: null };
          continue;
        }
        const at = line.indexOf(":");
        if (at === 0) continue;
        const field = at < 0 ? line : line.slice(0, at);
        const text = at < 0 ? "" : line.slice(at + 1).replace(/^ /, "");
        if (field === "data") found.data.push(text);
        else if (field === "event") found.event = text;
        else if (field === "id") found.id = text;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** What a person can do about an error, in a sentence. */
export function advice(error) {
  if (error.status === 0) return "Is it running? What you wrote is kept: try again when it is back.";
  if (error.code === "context_length_exceeded")
    return "Edit an earlier message, begin a new conversation, lower the answer's limit in Settings, or start the server with a larger --ctx.";
  if (error.status === 401) return "Enter the key that the server was started with.";
  if (error.status === 403) return "Open the page under an address that the server allows: see --allowed-host and --allowed-origin.";
  if (error.code === "settings") return "Change it in Settings.";
  if (error.code === "insufficient_memory") return "Start the server with a larger --ram, or a smaller model or --ctx.";
  if (error.status === 429) return "Others are being answered. Try again in a moment.";
  if (error.code === "broken_off") return "The part that arrived is kept. Continue it, or ask again.";
  if (error.status === 400 && error.param) return `It is about ${error.param}: see Settings, or edit the message.`;
  if (error.status >= 500) return "Try again; the server's own messages say more.";
  return "";
}
