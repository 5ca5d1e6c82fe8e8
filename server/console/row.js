/** One adapter as a row of the table; it is updated in place, so that focus and selection stay. */

import { isOwn } from "./catalog.js";
import { button, el, fill, icon, setText } from "./dom.js";
import { bytes, count, rate, shortDigest } from "./format.js";

const TIERS = { device: "on the device", host: "in host memory", disk: "on disk" };

/** `act` has `detail(adapter)`, `pin(adapter)`, `remove(adapter)` and `chat(adapter)`. */
export class Row {
  node;
  adapter;
  #name = el("span", { class: "name-text" });
  #about = el("small", {});
  #pinned = el(
    "span",
    { class: "pinned", title: "Stays on the device" },
    icon("pin"),
    el("span", { class: "spoken" }, "pinned"),
  );
  #version = el("td", { class: "number" });
  #digest = el("code", {});
  #rank = el("td", { class: "number wide-only" });
  #bytes = el("td", { class: "number" });
  #tier = el("span", { class: "tier" });
  #requests = el("td", { class: "number wide-only" });
  #speed = el("td", { class: "number" });
  #pin;
  #remove;
  #chat;

  constructor(act) {
    const open = el(
      "button",
      { type: "button", class: "name", on: { click: () => act.detail(this.adapter) } },
      this.#name,
    );
    this.#chat = button("", { text: "Chat", kind: "quiet", click: () => act.chat(this.adapter) });
    this.#pin = button("", { text: "Pin", kind: "quiet", click: () => act.pin(this.adapter) });
    this.#remove = button("", { symbol: "trash", kind: "quiet", click: () => act.remove(this.adapter) });
    this.node = el(
      "tr",
      {},
      el("th", { scope: "row" }, el("div", { class: "name-line" }, open, this.#pinned), this.#about),
      this.#version,
      el("td", { class: "wide-only" }, this.#digest),
      this.#rank,
      this.#bytes,
      el("td", {}, this.#tier),
      this.#requests,
      this.#speed,
      el("td", { class: "actions" }, el("div", { class: "row" }, this.#chat, this.#pin, this.#remove)),
    );
  }

  /** Shows this adapter, and its traffic as `monitor` knows it. */
  show(adapter, monitor) {
    this.adapter = adapter;
    setText(this.#name, adapter.name);
    setText(this.#about, adapter.status === "failed" ? (adapter.last_error ?? "failed") : (adapter.description ?? ""));
    this.#about.classList.toggle("error", adapter.status === "failed");
    this.#pinned.hidden = !adapter.pinned;
    setText(this.#version, String(adapter.version));
    setText(this.#digest, shortDigest(adapter.digest));
    this.#digest.title = adapter.digest;
    setText(this.#rank, String(adapter.rank));
    setText(this.#bytes, bytes(adapter.bytes));
    if (this.#tier.dataset.tier !== adapter.tier) {
      this.#tier.dataset.tier = adapter.tier;
      this.#tier.title = TIERS[adapter.tier];
      fill(this.#tier, el("i", { class: "dot" }), adapter.tier);
    }
    const [requests, speed] = [monitor.requests.get(adapter.name), monitor.speedOf(adapter.name)];
    setText(this.#requests, requests === undefined ? "–" : count(requests));
    setText(this.#speed, speed === null ? "–" : rate(speed));
    this.#pin.hidden = this.#remove.hidden = !isOwn(adapter);
    setText(this.#pin, adapter.pinned ? "Unpin" : "Pin");
    this.#pin.setAttribute("aria-label", `${adapter.pinned ? "Unpin" : "Pin"} ${adapter.name}`);
    this.#chat.setAttribute("aria-label", `Chat with ${adapter.name}`);
    this.#remove.setAttribute("aria-label", `Delete ${adapter.name}`);
    this.#remove.title = "Delete";
  }
}
