/** One adapter in full: its facts, its texts, which can be changed, and its versions. */

import { Api } from "./api.js";
import { isOwn } from "./catalog.js";
import { button, dialog, el, field, fill } from "./dom.js";
import { bytes, date, items } from "./format.js";
import { toast } from "./toast.js";

const VERSIONS = 8;
const VISIBILITIES = [
  ["private", "its owner only"],
  ["shared", "the tenants named"],
  ["public", "every tenant"],
];

/** Opens the dialog. `use(model)` takes the reader to the chat. */
export function showDetail(api, catalog, adapter, use) {
  const facts = [
    ["Digest", el("code", {}, adapter.digest)],
    ["Rank", adapter.rank],
    ["Size", bytes(adapter.bytes)],
    ["Base", adapter.base_model],
    ["Owner", adapter.owner],
    ["Open to", [adapter.visibility, ...(adapter.shared_with ?? [])].join(", ")],
    ["Targets", adapter.target_modules.join(", ")],
    ["Uploaded", date(adapter.created_at)],
    ["Status", adapter.last_error ?? adapter.status],
    ...adapter.warnings.map((warning) => ["Warning", warning]),
  ];
  const box = dialog(
    `${adapter.name}@${adapter.version}`,
    { kind: "detail" },
    el(
      "dl",
      { class: "facts-list" },
      facts.map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]),
    ),
    isOwn(adapter) ? texts(api, catalog, adapter) : null,
    versions(api, adapter, (model) => {
      box.close();
      use(model);
    }),
  );
}

/** The form for description, examples and who may use it. */
function texts(api, catalog, adapter) {
  const description = el("textarea", { rows: "2", value: adapter.description ?? "" });
  const examples = el("textarea", { rows: "4", value: adapter.examples.join("\n") });
  const open = el(
    "select",
    { on: { change: () => (named.hidden = open.value !== "shared") } },
    VISIBILITIES.map(([value, text]) => el("option", { value, selected: value === adapter.visibility }, text)),
  );
  const tenants = el("input", { type: "text", value: (adapter.shared_with ?? []).join(", ") });
  const named = field("Tenants, separated by commas", tenants);
  named.hidden = adapter.visibility !== "shared";
  const error = el("p", { class: "error", role: "alert", hidden: true });
  const save = async (event) => {
    event.preventDefault();
    const body = {
      description: description.value.trim() || null,
      examples: items(examples.value),
      visibility: open.value,
    };
    if (open.value === "shared") body.shared_with = items(tenants.value, ",");
    try {
      catalog.put(await api.json("PATCH", Api.adapter(adapter.name), { body }));
      error.hidden = true;
      toast(`${adapter.name} is saved.`);
    } catch (failure) {
      error.hidden = false;
      error.textContent = failure.full;
    }
  };
  return el(
    "form",
    { class: "stack", on: { submit: save } },
    field("Description", description, { wide: true }),
    field("Examples, one per line: the router learns from them", examples, { wide: true }),
    field("Open to", open),
    named,
    error,
    el("div", { class: "row end" }, el("button", { type: "submit", class: "button" }, "Save")),
  );
}

/** The versions from the newest down, a few at a time. */
function versions(api, adapter, use) {
  const list = el("ul", { class: "versions" });
  let next = adapter.version;
  const more = button("Older versions", { text: "Older versions", kind: "quiet", click: load });

  async function load() {
    const wanted = [];
    for (; next > 0 && wanted.length < VERSIONS; next -= 1) wanted.push(`${adapter.name}@${next}`);
    more.hidden = next < 1;
    const found = await Promise.all(wanted.map((name) => api.json("GET", Api.adapter(name)).catch(() => null)));
    for (const version of found.filter(Boolean)) list.append(row(version));
  }

  function row(version) {
    const name = `${version.name}@${version.version}`;
    return el(
      "li",
      {},
      el("b", {}, name),
      el("code", {}, version.digest.slice(7, 19)),
      el("span", {}, `rank ${version.rank}`),
      el("span", {}, bytes(version.bytes)),
      el("span", {}, date(version.created_at)),
      button(`Chat with ${name}`, { text: "Chat", kind: "quiet", click: () => use(name) }),
    );
  }

  load();
  const section = el("section", { class: "stack" });
  fill(section, el("h3", {}, "Versions"), list, more);
  return section;
}
