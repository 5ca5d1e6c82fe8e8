/** Asks for the API key. */

import { button, dialog, el, field } from "./dom.js";

/** Opens the dialog, unless it is open. `reason` says why it is asked for. */
export function askForKey(keys, reason = null) {
  if (document.querySelector("dialog.key-dialog")) return;
  const input = el("input", { type: "password", autocomplete: "off", spellcheck: "false", value: keys.value });
  const save = (event) => {
    event.preventDefault();
    box.close();
    keys.value = input.value.trim();
  };
  const forget = button("Forget the key", {
    text: "Forget",
    kind: "quiet",
    disabled: !keys.value,
    click: () => {
      box.close();
      keys.value = "";
    },
  });
  const form = el(
    "form",
    { class: "stack", on: { submit: save } },
    reason ? el("p", { class: "notice" }, reason) : null,
    field("API key", input, { hint: "Kept in this tab only, and sent to this server only." }),
    el("div", { class: "row end" }, forget, el("button", { type: "submit", class: "button primary" }, "Use this key")),
  );
  const box = dialog("API key", { kind: "key-dialog small" }, form);
  input.focus();
}
