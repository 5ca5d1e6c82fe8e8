/** Something done again and again, never twice at once, and not while nobody looks. */

const SLOWEST_MS = 30_000;

export class Poll {
  #task;
  #period;
  #wait;
  #timer = null;
  #busy = false;
  #on = false;

  /** `task` is awaited; after a failure the pauses double, up to half a minute. */
  constructor(task, periodMs) {
    this.#task = task;
    this.#period = this.#wait = periodMs;
    document.addEventListener("visibilitychange", () => !document.hidden && this.#on && this.now());
  }

  start() {
    if (this.#on) return;
    this.#on = true;
    this.now();
  }

  stop() {
    this.#on = false;
    clearTimeout(this.#timer);
  }

  /** Does it now, and then goes on. */
  async now() {
    if (this.#busy) return;
    this.#busy = true;
    clearTimeout(this.#timer);
    try {
      await this.#task();
      this.#wait = this.#period;
    } catch {
      this.#wait = Math.min(this.#wait * 2, SLOWEST_MS);
    } finally {
      this.#busy = false;
    }
    if (this.#on && !document.hidden) this.#timer = setTimeout(() => this.now(), this.#wait);
  }
}
