/** The adapters: a searchable, sortable table, a page at a time, and what can be done to each. */

import { Api } from "./api.js";
import { showDetail } from "./detail.js";
import { button, el, fill, icon, setText } from "./dom.js";
import { plural } from "./format.js";
import { Poll } from "./poll.js";
import { confirmRemoval } from "./remove.js";
import { Row } from "./row.js";
import { toast } from "./toast.js";
import { Upload, dropTarget } from "./upload.js";

const PAGE = 25;
const PERIOD_MS = 4000;
const HEADS = [
  ["name", "Name", ""],
  ["version", "Version", "number"],
  ["digest", "Digest", "wide-only"],
  ["rank", "Rank", "number wide-only"],
  ["bytes", "Size", "number"],
  ["tier", "Tier", ""],
  ["requests", "Requests", "number wide-only"],
  ["speed", "Tokens/s", "number"],
];
const TIER_ORDER = { device: 0, host: 1, disk: 2 };
const DOWNWARDS = new Set(["bytes", "requests", "speed", "version", "rank"]); // the largest first

/** The view in `place`. `use(model)` takes the reader to the chat. */
export class Adapters {
  #services;
  #use;
  #place;
  #page = 0;
  #sort = { key: "name", down: false };
  #rows = [];
  #shown = [];
  #heads = new Map();
  #search;
  #body = el("tbody");
  #summary = el("span", { class: "hint", "aria-live": "polite" });
  #message = el("p", { class: "empty-note" });
  #range = el("span", { class: "hint" });
  #back;
  #next;
  #poll = new Poll(() => this.#services.catalog.refresh(this.#shown.map((adapter) => adapter.name)), PERIOD_MS);

  constructor(place, services, use) {
    this.#place = place;
    this.#services = services;
    this.#use = use;
    this.#search = el("input", {
      type: "search",
      placeholder: "Search names and descriptions",
      "aria-label": "Search adapters",
      on: {
        input: () => {
          this.#page = 0;
          this.#draw();
        },
      },
    });
    this.#back = button("Previous page", { text: "Previous", kind: "quiet", click: () => this.#turn(-1) });
    this.#next = button("Next page", { text: "Next", kind: "quiet", click: () => this.#turn(1) });
    place.append(
      el(
        "div",
        { class: "bar" },
        el("div", { class: "search" }, icon("search"), this.#search),
        this.#summary,
        el("span", { class: "space" }),
        button("Reload the list", {
          symbol: "refresh",
          kind: "quiet",
          click: () => services.catalog.load().catch((error) => toast(error.full, { error: true })),
        }),
        button("Upload an adapter", { symbol: "upload", text: "Upload", kind: "primary", click: () => this.#upload() }),
      ),
      el(
        "div",
        { class: "table-box" },
        el(
          "table",
          { "aria-label": "Adapters" },
          el(
            "thead",
            {},
            el(
              "tr",
              {},
              HEADS.map((head) => this.#head(...head)),
              el("th", { scope: "col" }, el("span", { class: "spoken" }, "Actions")),
            ),
          ),
          this.#body,
        ),
        this.#message,
      ),
      el("div", { class: "pager" }, this.#range, this.#back, this.#next),
      el("div", { class: "drop-note", "aria-hidden": "true" }, icon("upload"), "Drop a PEFT folder or its two files"),
    );
    dropTarget(place, (files) => this.#upload(files));
    services.catalog.addEventListener("change", () => this.#draw());
    services.monitor.addEventListener("change", () => this.#draw());
  }

  /** The view is on the screen, or is not. */
  set visible(on) {
    if (on) this.#poll.start();
    else this.#poll.stop();
    this.#draw();
  }

  #head(key, label, kind) {
    const sort = el("button", { type: "button", class: "sort", on: { click: () => this.#order(key) } }, label);
    const cell = el("th", { scope: "col", class: kind }, sort);
    this.#heads.set(key, cell);
    return cell;
  }

  #order(key) {
    this.#sort = { key, down: this.#sort.key === key ? !this.#sort.down : DOWNWARDS.has(key) };
    this.#page = 0;
    this.#draw();
  }

  #turn(by) {
    this.#page += by;
    this.#draw();
    this.#poll.now();
  }

  #value(adapter, key) {
    const { monitor } = this.#services;
    if (key === "tier") return TIER_ORDER[adapter.tier];
    if (key === "requests") return monitor.requests.get(adapter.name) ?? 0;
    if (key === "speed") return monitor.speedOf(adapter.name) ?? 0;
    return adapter[key];
  }

  #sorted(found) {
    const { key, down } = this.#sort;
    if (key === "name") return down ? found.reverse() : found; // found by name
    const values = new Map(found.map((adapter) => [adapter, this.#value(adapter, key)]));
    const sign = down ? -1 : 1;
    return found.sort((a, b) => (values.get(a) < values.get(b) ? -sign : values.get(a) > values.get(b) ? sign : 0));
  }

  #draw() {
    if (this.#place.hidden) return;
    const { catalog, monitor } = this.#services;
    const found = this.#sorted(catalog.search(this.#search.value));
    const pages = Math.max(Math.ceil(found.length / PAGE), 1);
    this.#page = Math.min(Math.max(this.#page, 0), pages - 1);
    const start = this.#page * PAGE;
    this.#shown = found.slice(start, start + PAGE);
    while (this.#rows.length < this.#shown.length) {
      const row = new Row({
        detail: (adapter) => showDetail(this.#services.api, catalog, adapter, this.#use),
        pin: (adapter) => this.#pin(adapter),
        remove: (adapter) => confirmRemoval(this.#services.api, catalog, adapter),
        chat: (adapter) => this.#use(adapter.name),
      });
      this.#rows.push(row);
      this.#body.append(row.node);
    }
    for (const [i, row] of this.#rows.entries()) {
      row.node.hidden = i >= this.#shown.length;
      if (i < this.#shown.length) row.show(this.#shown[i], monitor);
    }
    for (const [key, cell] of this.#heads) {
      cell.setAttribute("aria-sort", key !== this.#sort.key ? "none" : this.#sort.down ? "descending" : "ascending");
    }
    setText(
      this.#summary,
      found.length === catalog.size
        ? plural(catalog.size, "adapter")
        : `${found.length} of ${plural(catalog.size, "adapter")}`,
    );
    setText(this.#range, found.length ? `${start + 1} to ${start + this.#shown.length} of ${found.length}` : "");
    this.#back.disabled = this.#page === 0;
    this.#next.disabled = this.#page >= pages - 1;
    this.#back.hidden = this.#next.hidden = pages === 1;
    this.#message.hidden = this.#shown.length > 0;
    fill(
      this.#message,
      catalog.error
        ? catalog.error.full
        : !catalog.loaded
          ? "Loading"
          : catalog.size
            ? "No adapter matches."
            : "No adapters yet: drop one here.",
    );
  }

  #upload(files = null) {
    if (document.querySelector("dialog.upload")) return;
    const upload = new Upload(this.#services.api, this.#services.catalog);
    if (files) upload.take(files);
  }

  async #pin(adapter) {
    try {
      const body = { pinned: !adapter.pinned };
      this.#services.catalog.put(await this.#services.api.json("PATCH", Api.adapter(adapter.name), { body }));
    } catch (error) {
      toast(error.full ?? error.message, { error: true });
    }
  }
}
