/** A text field with a list to choose from, after the ARIA pattern; the list shows the first matches only. */

import { el, fill, icon } from "./dom.js";

const SHOWN = 50;

/**
 * `options(text)` gives {value, label, detail} for what was typed; `choose(value)` is called with the chosen value.
 * Returns {node, input, set(value, label)}.
 */
export function combobox({ id, label, options, choose, placeholder = "" }) {
  let current = { value: null, label: "" };
  let found = [];
  let active = -1;
  const list = el("ul", { id: `${id}-list`, role: "listbox", "aria-label": label, hidden: true });
  const input = el("input", {
    id,
    role: "combobox",
    type: "text",
    autocomplete: "off",
    spellcheck: "false",
    placeholder,
    "aria-label": label,
    "aria-autocomplete": "list",
    "aria-expanded": "false",
    "aria-controls": list.id,
    on: {
      focus: () => {
        input.select();
        open("");
      },
      click: () => list.hidden && open(""),
      input: () => open(input.value),
      blur: () => {
        close();
        input.value = current.label;
      },
      keydown,
    },
  });
  const node = el("div", { class: "combobox" }, input, icon("down"), list);

  function open(text) {
    found = options(text);
    const rows = found.slice(0, SHOWN).map((option, i) =>
      el(
        "li",
        {
          id: `${id}-${i}`,
          role: "option",
          "aria-selected": String(option.value === current.value),
          on: {
            mousedown: (event) => {
              event.preventDefault();
              pick(i);
            },
          },
        },
        el("span", {}, option.label),
        option.detail ? el("small", {}, option.detail) : null,
      ),
    );
    const more = found.length - rows.length;
    if (more > 0) rows.push(el("li", { class: "more", role: "presentation" }, `${more} more: keep typing`));
    if (!found.length) rows.push(el("li", { class: "more", role: "presentation" }, "Nothing matches"));
    fill(list, rows);
    list.hidden = false;
    input.setAttribute("aria-expanded", "true");
    move(text && found.length ? 0 : found.findIndex((option) => option.value === current.value));
  }

  function close() {
    list.hidden = true;
    input.setAttribute("aria-expanded", "false");
    input.removeAttribute("aria-activedescendant");
  }

  function move(to) {
    const last = Math.min(found.length, SHOWN) - 1;
    active = to > last ? -1 : to;
    for (const [i, row] of [...list.children].entries()) row.classList.toggle("active", i === active);
    if (active < 0) input.removeAttribute("aria-activedescendant");
    else {
      input.setAttribute("aria-activedescendant", `${id}-${active}`);
      list.children[active].scrollIntoView({ block: "nearest" });
    }
  }

  function pick(index) {
    const option = found[index];
    set(option.value, option.label);
    close();
    choose(option.value);
  }

  function keydown(event) {
    const last = Math.min(found.length, SHOWN) - 1;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (list.hidden) open("");
      else if (last >= 0)
        move(event.key === "ArrowDown" ? (active >= last ? 0 : active + 1) : active <= 0 ? last : active - 1);
    } else if (event.key === "Enter" && !list.hidden && active >= 0) {
      event.preventDefault();
      pick(active);
    } else if (event.key === "Escape" && !list.hidden) {
      event.preventDefault();
      event.stopPropagation();
      close();
      input.value = current.label;
    }
  }

  function set(value, text) {
    current = { value, label: text };
    input.value = text;
  }

  return { node, input, set };
}
