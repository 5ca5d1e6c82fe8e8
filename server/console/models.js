/** What a column can be answered by, as the picker lists it. */

export const AUTO = "auto";
export const FUSION = Symbol("fusion");

/** The options of the picker for what was typed: the base, `auto`, fusion, then adapters. */
export function modelOptions(catalog, base, text) {
  const fixed = [
    { value: base, label: base ?? "", detail: "the base model" },
    { value: AUTO, label: AUTO, detail: "the server chooses" },
    { value: FUSION, label: "fusion", detail: "several adapters, weighted" },
  ].filter(
    (option) => option.value && `${option.label} ${option.detail}`.toLowerCase().includes(text.toLowerCase().trim()),
  );
  return [...fixed, ...adapterOptions(catalog, text)];
}

/** The adapters for what was typed; `name@version` is offered as it stands. */
export function adapterOptions(catalog, text) {
  const found = catalog
    .search(text)
    .map(({ name, description }) => ({ value: name, label: name, detail: description }));
  const pinned = /^([a-z0-9][a-z0-9._/-]*)@\d+$/.exec(text.trim());
  if (pinned && catalog.get(pinned[1]))
    found.unshift({ value: text.trim(), label: text.trim(), detail: "this very version" });
  return found;
}
