/** The chat: one prompt, up to four columns that answer it. */

import { Column } from "./column.js";
import { button, el } from "./dom.js";
import { AUTO } from "./models.js";
import { Sampling } from "./sampling.js";

const MOST = 4;

/** The view in `place`. */
export class Chat {
  #services;
  #columns = [];
  #made = 0;
  #grid = el("div", { class: "columns" });
  #sampling = new Sampling();
  #prompt;
  #send;
  #stop;
  #add;

  constructor(place, services) {
    this.#services = services;
    this.#prompt = el("textarea", {
      id: "prompt",
      rows: "2",
      placeholder: "Ask every column the same thing",
      "aria-label": "Prompt",
      on: { keydown: (event) => this.#key(event) },
    });
    this.#send = button("Send to every column", {
      symbol: "send",
      text: "Send",
      kind: "primary",
      click: () => this.send(),
    });
    this.#stop = button("Stop every answer", {
      symbol: "stop",
      text: "Stop",
      kind: "danger",
      hidden: true,
      click: () => this.#columns.forEach((c) => c.stop()),
    });
    this.#add = button("Add a column", { symbol: "add", text: "Column", kind: "quiet", click: () => this.add() });
    const settings = button("Sampling settings", {
      symbol: "sliders",
      text: "Sampling",
      kind: "quiet",
      "aria-expanded": "false",
      click: () => {
        this.#sampling.node.hidden = !this.#sampling.node.hidden;
        settings.setAttribute("aria-expanded", String(!this.#sampling.node.hidden));
      },
    });
    const clear = button("Clear the conversations", {
      symbol: "trash",
      text: "Clear",
      kind: "quiet",
      click: () => this.#columns.forEach((c) => c.clear()),
    });
    place.append(
      this.#grid,
      el(
        "div",
        { class: "composer" },
        this.#sampling.node,
        el(
          "div",
          { class: "composer-box" },
          this.#prompt,
          el(
            "div",
            { class: "row" },
            this.#add,
            settings,
            clear,
            el("span", { class: "space" }),
            el("small", { class: "hint" }, "Enter sends, Shift+Enter breaks the line"),
            this.#stop,
            this.#send,
          ),
        ),
      ),
    );
    this.add();
    this.add();
    services.catalog.addEventListener("change", () => this.#defaults());
    services.monitor.addEventListener("change", () => this.#defaults());
  }

  /** Columns without a choice get one: the base and `auto`. */
  #defaults() {
    const { base } = this.#services.monitor;
    if (!base) return;
    for (const [index, column] of this.#columns.entries())
      if (column.model === null) column.choose(index === 0 ? base : AUTO);
  }

  /** A new column, unless there are four. */
  add(model = null) {
    if (this.#columns.length >= MOST) return;
    const column = new Column({ ...this.#services, id: `model-${(this.#made += 1)}` });
    column.addEventListener("remove", () => this.#remove(column));
    column.addEventListener("busy", () => this.#state());
    column.addEventListener("example", (event) => {
      this.#prompt.value = event.detail;
      this.#prompt.focus();
    });
    this.#columns.push(column);
    this.#grid.append(column.node);
    if (model !== null) column.choose(model);
    else this.#defaults();
    this.#state();
  }

  #remove(column) {
    column.stop();
    this.#columns = this.#columns.filter((other) => other !== column);
    column.node.remove();
    this.#state();
    this.#prompt.focus();
  }

  /** Makes the first column answer by `model`. */
  use(model) {
    this.#columns[0].choose(model);
    this.#columns[0].clear();
    this.#prompt.focus();
  }

  /** Sends what was typed to every column. */
  send() {
    const prompt = this.#prompt.value;
    if (!prompt.trim()) return;
    this.#prompt.value = "";
    for (const column of this.#columns) column.ask(prompt, this.#sampling);
  }

  #key(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!this.#columns.some((column) => column.busy)) this.send();
  }

  #state() {
    this.#grid.dataset.columns = this.#columns.length;
    const busy = this.#columns.some((column) => column.busy);
    this.#stop.hidden = !busy;
    this.#send.hidden = busy;
    this.#add.disabled = this.#columns.length >= MOST;
    this.#grid.classList.toggle("alone", this.#columns.length === 1);
  }
}
