/** The two views, as ARIA tabs: arrow keys move between them, the address remembers which is shown. */

/** Wires the tabs; returns `show(name)`. `shown(name)` is called with the view that is on the screen. */
export function tabs(list, shown) {
  const all = [...list.querySelectorAll("[role=tab]")];
  const name = (tab) => tab.id.replace("tab-", "");

  function show(wanted, focus = false) {
    for (const tab of all) {
      const on = name(tab) === wanted;
      tab.setAttribute("aria-selected", String(on));
      tab.tabIndex = on ? 0 : -1;
      document.getElementById(tab.getAttribute("aria-controls")).hidden = !on;
      if (on && focus) tab.focus();
    }
    history.replaceState(null, "", `#${wanted}`);
    shown(wanted);
  }

  for (const [i, tab] of all.entries()) {
    tab.addEventListener("click", () => show(name(tab)));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step) show(name(all[(i + step + all.length) % all.length]), true);
    });
  }
  const known = all.map(name);
  const start = location.hash.slice(1);
  show(known.includes(start) ? start : known[0]);
  return show;
}
