/** How answers are drawn: one form for all columns. An empty field leaves the choice to the server. */

import { el, field } from "./dom.js";

const NUMBERS = [
  ["temperature", "Temperature", { min: 0, max: 2, step: 0.1 }],
  ["top_p", "Top p", { min: 0, max: 1, step: 0.05 }],
  ["top_k", "Top k", { min: 0, step: 1 }],
  ["min_p", "Min p", { min: 0, max: 1, step: 0.05 }],
  ["max_tokens", "Max tokens", { min: 1, step: 1 }],
  ["seed", "Seed", { step: 1 }],
];

/** The form and its values. */
export class Sampling {
  node;
  #inputs = {};
  #system;
  #stops;

  constructor() {
    const numbers = NUMBERS.map(([name, label, limits]) =>
      field(label, (this.#inputs[name] = el("input", { type: "number", name, placeholder: "default", ...limits }))),
    );
    this.#system = el("textarea", { rows: "2", name: "system" });
    this.#stops = el("textarea", { rows: "2", name: "stop" });
    this.node = el(
      "form",
      { class: "sampling", hidden: true, "aria-label": "Sampling settings", on: { submit: (e) => e.preventDefault() } },
      numbers,
      field("System prompt", this.#system, { wide: true }),
      field("Stop texts, one per line", this.#stops, { wide: true }),
    );
  }

  /** The fields of a request. */
  get fields() {
    const found = {};
    for (const [name, input] of Object.entries(this.#inputs)) if (input.value !== "") found[name] = Number(input.value);
    const stops = this.#stops.value.split("\n").filter(Boolean);
    if (stops.length) found.stop = stops;
    return found;
  }

  /** The system turn as a list of none or one. */
  get system() {
    const content = this.#system.value.trim();
    return content ? [{ role: "system", content }] : [];
  }
}
