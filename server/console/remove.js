/** Deletes an adapter, after asking. */

import { Api } from "./api.js";
import { button, dialog, el } from "./dom.js";
import { toast } from "./toast.js";

/** Asks; resolves when the dialog is closed. */
export function confirmRemoval(api, catalog, adapter) {
  return new Promise((resolve) => {
    const error = el("p", { class: "error", role: "alert", hidden: true });
    const remove = button("Delete", {
      text: "Delete",
      kind: "danger",
      click: async () => {
        remove.disabled = true;
        try {
          await api.json("DELETE", Api.adapter(adapter.name));
          catalog.drop(adapter.name);
          box.close();
          toast(`${adapter.name} is deleted.`);
        } catch (failure) {
          error.hidden = false;
          error.textContent = failure.full;
          remove.disabled = false;
        }
      },
    });
    const cancel = button("Keep it", { text: "Keep it", kind: "quiet", click: () => box.close() });
    const box = dialog(
      "Delete this adapter?",
      { kind: "small" },
      el(
        "p",
        {},
        el("b", {}, adapter.name),
        adapter.version > 1 ? " and all its versions. " : ". ",
        "Running requests finish; new ones get a 404.",
      ),
      error,
      el("div", { class: "row end" }, cancel, remove),
    );
    box.addEventListener("close", () => resolve());
    cancel.focus();
  });
}
