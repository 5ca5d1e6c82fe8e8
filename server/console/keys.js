/** The API key: kept for this tab only, and gone when it closes. */

const SLOT = "loramux.key";

/** Dispatches `change`. */
export class Keys extends EventTarget {
  /** The key, or an empty text. */
  get value() {
    return sessionStorage.getItem(SLOT) ?? "";
  }

  set value(key) {
    if (key) sessionStorage.setItem(SLOT, key);
    else sessionStorage.removeItem(SLOT);
    this.dispatchEvent(new Event("change"));
  }
}
