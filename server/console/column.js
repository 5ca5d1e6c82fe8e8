/** One conversation with one choice of what answers it. */

import { Api } from "./api.js";
import { combobox } from "./combobox.js";
import { Answer, complete } from "./completion.js";
import { button, el, fill } from "./dom.js";
import { Fusion } from "./fusion.js";
import { AUTO, FUSION, modelOptions } from "./models.js";
import { Turn } from "./turn.js";

const EXAMPLES = 3;
const NEAR_END = 40; // pixels

/** Dispatches `example` with a prompt in `detail`, `busy` when it starts or ends answering, `remove`. */
export class Column extends EventTarget {
  node;
  #api;
  #catalog;
  #monitor;
  #model = null;
  #fusion;
  #picker;
  #messages = [];
  #stop = null;
  #log = el("div", { class: "log", tabindex: "0", role: "log", "aria-label": "Conversation" });
  #intro = el("div", { class: "intro" });
  #halt = button("Stop", { symbol: "stop", kind: "quiet", hidden: true, click: () => this.stop() });

  constructor({ api, catalog, monitor, id }) {
    super();
    this.#api = api;
    this.#catalog = catalog;
    this.#monitor = monitor;
    this.#fusion = new Fusion(catalog, id);
    this.#fusion.node.hidden = true;
    this.#picker = combobox({
      id,
      label: "Model or adapter",
      placeholder: "choose a model",
      options: (text) => modelOptions(catalog, monitor.base, text),
      choose: (model) => this.choose(model),
    });
    this.node = el(
      "section",
      { class: "column", "aria-label": "Conversation column" },
      el(
        "div",
        { class: "column-head" },
        this.#picker.node,
        this.#halt,
        button("Remove this column", {
          symbol: "close",
          kind: "quiet remove",
          click: () => this.dispatchEvent(new Event("remove")),
        }),
      ),
      this.#fusion.node,
      this.#log,
    );
    this.#log.append(this.#intro);
  }

  get model() {
    return this.#model;
  }

  get busy() {
    return this.#stop !== null;
  }

  /** Sets what answers: the base's name, an adapter, `auto` or FUSION. */
  choose(model) {
    this.#model = model;
    this.#picker.set(model, model === FUSION ? "fusion" : model);
    this.#fusion.node.hidden = model !== FUSION;
    this.#introduce();
  }

  /** Says what the choice is, and offers its examples, while nothing has been said. */
  async #introduce() {
    const model = this.#model;
    if (this.#messages.length) return;
    if (model === AUTO)
      return fill(
        this.#intro,
        el("p", {}, "The server picks the adapter that the prompt needs, or the base, and says why."),
      );
    if (model === FUSION) return fill(this.#intro, el("p", {}, "The weighted sum of several adapters over the base."));
    if (model === this.#monitor.base) return fill(this.#intro, el("p", {}, "The base model, without an adapter."));
    let adapter = this.#catalog.get(model);
    try {
      adapter ??= await this.#api.json("GET", Api.adapter(model));
    } catch {
      return fill(this.#intro); // the answer will say what is wrong
    }
    if (this.#model !== model) return undefined;
    const examples = adapter.examples.slice(0, EXAMPLES).map((text) =>
      el(
        "button",
        {
          type: "button",
          class: "example",
          on: { click: () => this.dispatchEvent(new CustomEvent("example", { detail: text })) },
        },
        text,
      ),
    );
    return fill(this.#intro, el("p", {}, adapter.description ?? "No description."), examples);
  }

  /** Ends the answer that is being written. */
  stop() {
    this.#stop?.abort();
  }

  /** Forgets the conversation. */
  clear() {
    this.stop();
    this.#messages = [];
    fill(this.#log, this.#intro);
    this.#introduce();
  }

  /** Asks, and writes the answer as it comes. `sampling` gives the fields and the system turn. */
  async ask(prompt, sampling) {
    this.stop();
    const stop = (this.#stop = new AbortController());
    this.#state();
    this.#intro.remove();
    const said = { role: "user", content: prompt };
    const answer = new Answer();
    const turn = new Turn(prompt, this.#monitor.base);
    this.#log.append(turn.node);
    turn.show(answer);
    this.#log.scrollTop = this.#log.scrollHeight;
    const body = { ...this.#target(), ...sampling.fields, messages: [...sampling.system, ...this.#messages, said] };
    await complete(this.#api, body, answer, { signal: stop.signal, changed: () => this.#show(turn, answer) });
    if (this.#stop !== stop) return; // cleared or asked again meanwhile
    if (!answer.error && answer.text) this.#messages.push(said, answer.turn);
    this.#stop = null;
    this.#state();
  }

  /** Shows the news of an answer; a reader at the end stays there. */
  #show(turn, answer) {
    const log = this.#log;
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_END;
    turn.show(answer);
    if (atEnd) log.scrollTop = log.scrollHeight;
  }

  /** The request's fields that say who answers. */
  #target() {
    if (this.#model === FUSION) return { model: this.#monitor.base, adapters: this.#fusion.adapters };
    if (this.#model === AUTO) return { model: AUTO, router: { explain: true } };
    return { model: this.#model ?? this.#monitor.base ?? "" };
  }

  #state() {
    this.#halt.hidden = !this.busy;
    this.node.setAttribute("aria-busy", String(this.busy));
    this.dispatchEvent(new Event("busy"));
  }
}
