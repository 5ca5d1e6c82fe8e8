/** DOM nodes from values. Text becomes text nodes and attribute values only: nothing is ever parsed as HTML. */

const PROPERTIES = new Set(["value", "checked", "disabled", "hidden", "textContent", "open", "indeterminate"]);
const SVG = "http://www.w3.org/2000/svg";

const ICONS = {
  add: "M12 5v14M5 12h14",
  close: "M6 6l12 12M18 6L6 18",
  down: "M6 9l6 6 6-6",
  key: "M12.5 11.5L20 4M17 7l2.5 2.5M9 19a4.5 4.5 0 1 0 0-9 4.5 4.5 0 0 0 0 9z",
  pin: "M9 4h6l-1 6 4 3v2H6v-2l4-3-1-6zM12 15v5",
  search: "M11 18a7 7 0 1 0 0-14 7 7 0 0 0 0 14zM20 20l-4-4",
  send: "M12 19V5M6 11l6-6 6 6",
  sliders: "M4 7h10M18 7h2M4 17h2M10 17h10M16 5v4M8 15v4",
  stop: "M7 7h10v10H7z",
  theme: "M12 4a8 8 0 1 0 8 8 6 6 0 0 1-8-8z",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13M10 11v5M14 11v5",
  upload: "M12 16V5M7 9l5-5 5 5M5 16v4h14v-4",
  refresh: "M19 12a7 7 0 1 1-2-5l2 2M19 4v5h-5",
};

/**
 * An element. `props` are attributes (true: present, null and false: absent), some DOM properties, `on` for listeners.
 * Children may be nodes, strings, numbers, arrays of them, or null.
 */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === "on") for (const [type, handler] of Object.entries(value)) node.addEventListener(type, handler);
    else if (PROPERTIES.has(name)) node[name] = value;
    else if (value !== null && value !== false && value !== undefined)
      node.setAttribute(name, value === true ? "" : value);
  }
  append(node, children);
  return node;
}

/** Adds children as `el` takes them. */
export function append(node, children) {
  for (const child of [children].flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false)
      node.append(child instanceof Node ? child : String(child));
  }
}

/** Replaces all children. */
export function fill(node, ...children) {
  node.replaceChildren();
  append(node, children);
}

/** Sets a text that changes often, touching the document only when it does. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** One of the icons above, invisible to screen readers. */
export function icon(name) {
  const shape = document.createElementNS(SVG, "path");
  shape.setAttribute("d", ICONS[name]);
  const picture = document.createElementNS(SVG, "svg");
  picture.setAttribute("viewBox", "0 0 24 24");
  picture.setAttribute("class", "icon");
  picture.setAttribute("aria-hidden", "true");
  picture.append(shape);
  return picture;
}

/** A button with an icon, or `text`, or both; the label is what is spoken. */
export function button(label, { symbol = null, text = null, kind = "", click, ...props }) {
  const plain = text === null;
  return el(
    "button",
    {
      type: "button",
      class: `button ${kind}`,
      "aria-label": label,
      title: plain ? label : null,
      ...props,
      on: { click },
    },
    symbol ? icon(symbol) : null,
    text,
  );
}

/** A control under its label; the hint is read with it. */
export function field(label, control, { hint = null, wide = false } = {}) {
  return el(
    "label",
    { class: wide ? "field wide" : "field" },
    el("span", {}, label),
    control,
    hint ? el("small", {}, hint) : null,
  );
}

/** A modal dialog with a title; it leaves the document when it closes. */
export function dialog(title, { kind = "" } = {}, ...children) {
  const node = el("dialog", { class: `dialog ${kind}`, "aria-label": title });
  const close = button("Close", { symbol: "close", kind: "quiet", click: () => node.close() });
  append(node, [el("div", { class: "dialog-head" }, el("h2", {}, title), close), ...children]);
  node.addEventListener("close", () => node.remove());
  document.body.append(node);
  node.showModal();
  return node;
}
