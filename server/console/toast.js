/** Short messages at the edge of the window, read out by screen readers. */

import { button, el } from "./dom.js";

const SHOWN_MS = 6000;
const MOST = 4;

/** Shows a message; errors stay until they are closed. */
export function toast(text, { error = false } = {}) {
  const place = document.getElementById("toasts");
  const note = el(
    "div",
    { class: error ? "toast error" : "toast" },
    el("span", {}, text),
    button("Dismiss", { symbol: "close", kind: "quiet", click: () => note.remove() }),
  );
  place.append(note);
  while (place.children.length > MOST) place.firstElementChild.remove();
  if (!error) setTimeout(() => note.remove(), SHOWN_MS);
}
