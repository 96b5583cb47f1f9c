// Conversations, kept in this browser and nowhere else.

const DATABASE = "slimoe";
const TABLE = "conversations";
const MOST_DRAFT = 200000;

/** A name that nothing else has; `crypto.randomUUID` is missing on pages without TLS. */
export const newId = () =>
  Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");

const done = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

/** All conversations of this browser. Without a database they last as long as the page. */
export class Store {
  static async open() {
    try {
      const request = indexedDB.open(DATABASE, 1);
      request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
      return new Store(await done(request));
    } catch {
      return new Store(null);
    }
  }

  constructor(database) {
    this.database = database;
    this.channel = "BroadcastChannel" in window ? new BroadcastChannel("slimoe") : null;
  }

  get isKept() {
    return this.database !== null;
  }

  /** Calls back when another tab has changed something. */
  onchange(callback) {
    this.channel?.addEventListener("message", (event) => callback(event.data));
  }

  async all() {
    if (!this.database) return [];
    return done(this.database.transaction(TABLE).objectStore(TABLE).getAll());
  }

  async get(id) {
    if (!this.database) return undefined;
    return done(this.database.transaction(TABLE).objectStore(TABLE).get(id));
  }

  async put(conversation) {
    if (!this.database) return;
    const table = this.database.transaction(TABLE, "readwrite").objectStore(TABLE);
    await done(table.put(structuredClone(conversation)));
    this.channel?.postMessage({ id: conversation.id });
  }

  async remove(id) {
    if (!this.database) return;
    await done(this.database.transaction(TABLE, "readwrite").objectStore(TABLE).delete(id));
    this.channel?.postMessage({ id });
  }
}

const small = {
  get(name) {
    try {
      return localStorage.getItem(`slimoe.${name}`);
    } catch {
      return null;
    }
  },
  set(name, value) {
    try {
      if (value) localStorage.setItem(`slimoe.${name}`, value);
      else localStorage.removeItem(`slimoe.${name}`);
    } catch {
      // Unsent text that does not fit is kept by the field itself.
    }
  },
};

/** Unsent text by conversation, written at once so that a closed tab loses nothing. */
export const drafts = {
  get: (id) => small.get(`draft.${id}`) ?? "",
  set: (id, text) => small.set(`draft.${id}`, text.slice(0, MOST_DRAFT)),
};

/** Small choices that outlive the page. */
export const choices = {
  get(name, fallback) {
    try {
      return JSON.parse(small.get(`choice.${name}`)) ?? fallback;
    } catch {
      return fallback;
    }
  },
  set: (name, value) => small.set(`choice.${name}`, JSON.stringify(value)),
};
