/** The adapters that the server has: loaded page by page, refreshed where somebody looks. */

const PAGE = 500;
const WHOLE = 1000; // up to so many are reloaded as a whole
const AT_ONCE = 6;

/** The owner ("" for the caller) and the name in what the caller calls an adapter. */
function parts(name) {
  const slash = name.lastIndexOf("/");
  return [name.slice(0, Math.max(slash, 0)), name.slice(slash + 1)];
}

/** The server's order: the caller's own by name, then others' by owner and name. */
function inOrder(a, b) {
  const [[ownerA, nameA], [ownerB, nameB]] = [parts(a), parts(b)];
  if (ownerA !== ownerB) return ownerA < ownerB ? -1 : 1;
  return nameA < nameB ? -1 : 1;
}

/** Whether the adapter is the caller's own, to change and delete; others' are `owner/name`. */
export function isOwn(adapter) {
  return !adapter.name.includes("/");
}

/** Dispatches `change` after every page and every refresh. Adapters are plain objects as the API gives them. */
export class Catalog extends EventTarget {
  loaded = false;
  error = null;
  #api;
  #adapters = new Map();
  #names = [];
  #loading = null;

  constructor(api) {
    super();
    this.#api = api;
  }

  get size() {
    return this.#names.length;
  }

  /** All names in order. */
  get names() {
    return this.#names;
  }

  /** An adapter, or undefined. */
  get(name) {
    return this.#adapters.get(name);
  }

  /** The adapters whose name or description holds every word of `text`, by name. */
  search(text) {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    const found = [];
    for (const name of this.#names) {
      const adapter = this.#adapters.get(name);
      const hay = `${name} ${adapter.description ?? ""}`.toLowerCase();
      if (words.every((word) => hay.includes(word))) found.push(adapter);
    }
    return found;
  }

  /** Loads everything; a second call while one runs waits for that one. */
  load() {
    this.#loading ??= this.#load().finally(() => (this.#loading = null));
    return this.#loading;
  }

  async #load() {
    const fresh = new Map();
    try {
      let after = "";
      for (;;) {
        const page = await this.#api.json(
          "GET",
          `v1/adapters?limit=${PAGE}${after && `&after=${encodeURIComponent(after)}`}`,
        );
        for (const adapter of page.data) fresh.set(adapter.name, adapter);
        if (!this.loaded) this.#take(fresh); // the first pages are shown while the rest comes
        if (!page.has_more) break;
        after = page.last_id;
      }
      this.error = null;
      this.loaded = true;
    } catch (error) {
      this.error = error;
      throw error;
    } finally {
      if (!this.error) this.#take(fresh);
      else this.#changed();
    }
  }

  #take(adapters) {
    this.#adapters = adapters;
    this.#names = [...adapters.keys()].sort(inOrder);
    this.#changed();
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }

  /** Looks again: at everything where that is little, else at the adapters that are on the screen. */
  async refresh(visible) {
    if (this.size <= WHOLE) return this.load();
    const runs = this.#runs(visible);
    for (let i = 0; i < runs.length; i += AT_ONCE)
      await Promise.all(runs.slice(i, i + AT_ONCE).map((run) => this.#reload(run)));
    this.#changed();
  }

  /** Names that follow each other in the server's order, together: one request each. */
  #runs(names) {
    const runs = [];
    const wanted = new Set(names);
    let index = -2;
    for (let i = 0; i < this.#names.length; i += 1) {
      if (!wanted.has(this.#names[i])) continue;
      if (i === index + 1) runs.at(-1).count += 1;
      else runs.push({ after: this.#names[i - 1] ?? "", count: 1 });
      index = i;
    }
    return runs;
  }

  async #reload({ after, count }) {
    const page = await this.#api.json(
      "GET",
      `v1/adapters?limit=${count}${after && `&after=${encodeURIComponent(after)}`}`,
    );
    for (const adapter of page.data) if (this.#adapters.has(adapter.name)) this.#adapters.set(adapter.name, adapter);
  }

  /** An adapter as the server has just described it. */
  put(adapter) {
    this.#take(new Map(this.#adapters).set(adapter.name, adapter));
  }

  /** An adapter that is gone. */
  drop(name) {
    const left = new Map(this.#adapters);
    left.delete(name);
    this.#take(left);
  }
}
