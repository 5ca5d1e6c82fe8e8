/** One prompt and its answer on the screen. */

import { el, fill } from "./dom.js";
import { facts, why } from "./served.js";

/** `show(answer)` may be called as often as the answer changes; what was unfolded stays so. */
export class Turn {
  node;
  #base;
  #text = document.createTextNode("");
  #thought = document.createTextNode("");
  #thinking = el("details", { class: "thinking", open: true, hidden: true }, el("summary", {}, "Reasoning"));
  #body = el("div", { class: "answer" });
  #error = el("p", { class: "error", role: "alert", hidden: true });
  #facts = el("div", { class: "facts" });
  #why = null;

  constructor(prompt, base) {
    this.#base = base;
    this.#body.append(this.#text);
    this.#thinking.append(el("div", {}, this.#thought));
    this.node = el(
      "div",
      { class: "turn" },
      el("div", { class: "prompt" }, prompt),
      this.#thinking,
      this.#body,
      this.#error,
      this.#facts,
    );
  }

  /** Shows what there is of an answer. */
  show(answer) {
    if (!this.#text.length && answer.text) this.#thinking.open = false; // the answer begins
    grow(this.#thought, answer.reasoning);
    grow(this.#text, answer.text);
    this.#thinking.hidden = !answer.reasoning;
    this.#body.classList.toggle("waiting", answer.ended === null && !answer.text);
    this.#body.hidden = answer.ended !== null && !answer.text;
    fill(this.#facts, facts(answer, this.#base));
    if (answer.error && this.#error.hidden) {
      this.#error.textContent = answer.error.full;
      this.#error.hidden = false;
    }
    if (this.#why === null && answer.served) {
      this.#why = why(answer.served.router);
      if (this.#why) this.node.append(this.#why);
    }
  }
}

/** Adds what `text` has more than the node. */
function grow(node, text) {
  if (text.length > node.length) node.appendData(text.slice(node.length));
}
