/** The adapters and weights of an explicit fusion. */

import { combobox } from "./combobox.js";
import { button, el, fill } from "./dom.js";
import { adapterOptions } from "./models.js";

/** Editor for the `adapters` of a request. */
export class Fusion {
  node = el("div", { class: "fusion" });
  #catalog;
  #id;
  #rows = [];
  #made = 0;

  constructor(catalog, id) {
    this.#catalog = catalog;
    this.#id = id;
    this.#add();
    this.#add();
  }

  /** The request's `adapters`. */
  get adapters() {
    return this.#rows.filter((row) => row.name).map(({ name, weight }) => ({ name, weight: Number(weight.value) }));
  }

  #add() {
    const row = { name: null };
    const number = (this.#made += 1);
    const pick = combobox({
      id: `${this.#id}-fusion-${number}`,
      label: `Adapter ${number} of the fusion`,
      placeholder: "adapter",
      options: (text) => adapterOptions(this.#catalog, text),
      choose: (name) => (row.name = name),
    });
    row.weight = el("input", { type: "number", step: "0.1", value: "1", "aria-label": `Weight of adapter ${number}` });
    row.node = el(
      "div",
      { class: "fusion-row" },
      pick.node,
      row.weight,
      button("Remove this adapter", {
        symbol: "close",
        kind: "quiet",
        click: () => {
          this.#rows = this.#rows.filter((r) => r !== row);
          this.#draw();
        },
      }),
    );
    this.#rows.push(row);
    this.#draw();
  }

  #draw() {
    fill(
      this.node,
      this.#rows.map((row) => row.node),
      button("Add an adapter", { symbol: "add", text: "Adapter", kind: "quiet", click: () => this.#add() }),
    );
  }
}
