/** The upload dialog: two files, a name, what the adapter is for, and a progress bar. */

import { button, dialog, el, field, fill } from "./dom.js";
import { adapterIn, chosen, dropped, nameFrom } from "./files.js";
import { bytes, items } from "./format.js";
import { toast } from "./toast.js";

const NAME = "[a-z0-9][a-z0-9._\\-]{0,63}";

/** Lets files be dropped on `node`; `take` gets a promise of {file, path}. */
export function dropTarget(node, take) {
  let depth = 0;
  const carriesFiles = (event) => [...event.dataTransfer.types].includes("Files");
  const show = (change) => node.classList.toggle("dropping", (depth = Math.max(0, depth + change)) > 0);
  node.addEventListener("dragenter", (event) => carriesFiles(event) && show(1));
  node.addEventListener("dragleave", (event) => carriesFiles(event) && show(-1));
  node.addEventListener("dragover", (event) => carriesFiles(event) && event.preventDefault());
  node.addEventListener("drop", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    show(-depth);
    take(dropped(event.dataTransfer));
  });
}

/** One upload, from the choice of files to its end. */
export class Upload {
  #api;
  #catalog;
  #found = null;
  #stop = null;
  #box;
  #name = el("input", {
    required: true,
    pattern: NAME,
    maxlength: "64",
    spellcheck: "false",
    autocomplete: "off",
    name: "name",
  });
  #description = el("textarea", {
    rows: "2",
    name: "description",
    placeholder: "What it is good at: the router reads this",
  });
  #examples = el("textarea", { rows: "3", name: "examples", placeholder: "Prompts it is made for, one per line" });
  #files = el("div", { class: "picked" });
  #notice = el("p", { class: "hint", "aria-live": "polite" });
  #error = el("p", { class: "error", role: "alert", hidden: true });
  #bar = el("progress", { max: "1", value: 0, "aria-label": "Upload progress" });
  #submit = el("button", { type: "submit", class: "button primary", disabled: true }, "Upload");

  constructor(api, catalog) {
    this.#api = api;
    this.#catalog = catalog;
    this.#bar.hidden = true;
    this.#name.addEventListener("input", () => this.#foretell());
    const pickFiles = this.#picker({ multiple: true, "aria-label": "The two files" });
    const pickFolder = this.#picker({ webkitdirectory: true, "aria-label": "A folder" });
    const zone = el(
      "div",
      { class: "zone" },
      el("p", {}, "Drop a folder that PEFT saved, or its two files"),
      el(
        "div",
        { class: "row center" },
        button("Choose files", { text: "Choose files", click: () => pickFiles.click() }),
        button("Choose a folder", { text: "Choose a folder", click: () => pickFolder.click() }),
      ),
      pickFiles,
      pickFolder,
      this.#files,
    );
    dropTarget(zone, (files) => this.take(files));
    const form = el(
      "form",
      { class: "stack", on: { submit: (event) => this.#send(event) } },
      zone,
      field("Name", this.#name, { hint: "Lower-case letters, digits and . _ -" }),
      this.#notice,
      field("Description", this.#description, { wide: true }),
      field("Examples", this.#examples, { wide: true }),
      this.#error,
      this.#bar,
      el(
        "div",
        { class: "row end" },
        button("Cancel", { text: "Cancel", kind: "quiet", click: () => this.#box.close() }),
        this.#submit,
      ),
    );
    this.#box = dialog("Upload an adapter", { kind: "upload" }, form);
    this.#box.addEventListener("close", () => this.#stop?.abort());
  }

  #picker(props) {
    const input = el("input", {
      type: "file",
      hidden: true,
      ...props,
      on: { change: () => this.take(Promise.resolve(chosen(input.files))) },
    });
    return input;
  }

  /** Looks for an adapter in the files that a promise gives. */
  async take(files) {
    try {
      this.#found = adapterIn(await files);
      const { config, weights, folder } = this.#found;
      fill(
        this.#files,
        [config, weights].map((file) => el("div", {}, el("span", {}, file.name), el("b", {}, bytes(file.size)))),
      );
      this.#name.value ||= nameFrom(folder);
      this.#refuse(null);
    } catch (error) {
      this.#found = null;
      fill(this.#files);
      this.#refuse(error.message);
    }
    this.#submit.disabled = this.#found === null;
    this.#foretell();
  }

  #refuse(message) {
    this.#error.hidden = message === null;
    this.#error.textContent = message ?? "";
  }

  /** Says what an upload under this name will do. */
  #foretell() {
    const known = this.#catalog.get(this.#name.value);
    this.#notice.textContent = known
      ? `Replaces ${known.name}@${known.version}: new requests use the new version at once, running ones finish on theirs.`
      : "";
    this.#submit.textContent = known ? "Upload a new version" : "Upload";
  }

  async #send(event) {
    event.preventDefault();
    const form = new FormData();
    form.append("name", this.#name.value);
    if (this.#description.value.trim()) form.append("description", this.#description.value.trim());
    const examples = items(this.#examples.value);
    if (examples.length) form.append("examples", JSON.stringify(examples));
    form.append("files", this.#found.config, this.#found.config.name);
    form.append("files", this.#found.weights, this.#found.weights.name);
    this.#stop = new AbortController();
    this.#refuse(null);
    this.#working(true);
    try {
      const adapter = await this.#api.upload(form, {
        progress: (share) => this.#progress(share),
        signal: this.#stop.signal,
      });
      this.#catalog.put(adapter);
      this.#stop = null;
      this.#box.close();
      toast(`${adapter.name}@${adapter.version} is ready.`);
      for (const warning of adapter.warnings) toast(`${adapter.name}: ${warning}`);
    } catch (error) {
      if (error.name === "AbortError") toast("The upload was cancelled.");
      else this.#refuse(error.full ?? error.message);
    } finally {
      this.#working(false);
    }
  }

  #working(on) {
    this.#bar.hidden = !on;
    this.#submit.disabled = on;
    if (on) this.#progress(0);
    else this.#foretell();
  }

  /** The bytes are the client's part; then the server checks them, for as long as it takes. */
  #progress(share) {
    if (share < 1) this.#bar.value = share;
    else this.#bar.removeAttribute("value");
    this.#submit.textContent = share < 1 ? `Uploading ${Math.round(share * 100)}%` : "Checking";
  }
}
