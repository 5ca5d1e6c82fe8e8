/** Light, dark, or what the system says; remembered in this browser. */

import { button } from "./dom.js";

const SLOT = "loramux.theme";
const NEXT = { system: "light", light: "dark", dark: "system" };

function apply(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

/** The button that goes through the themes. */
export function themeButton() {
  let theme = localStorage.getItem(SLOT);
  if (!(theme in NEXT)) theme = "system";
  const label = () => `Theme: ${theme}`;
  const node = button(label(), {
    symbol: "theme",
    kind: "quiet",
    click: () => {
      theme = NEXT[theme];
      localStorage.setItem(SLOT, theme);
      apply(theme);
      node.setAttribute("aria-label", label());
      node.title = label();
    },
  });
  apply(theme);
  return node;
}
