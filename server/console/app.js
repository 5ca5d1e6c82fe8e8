/** Puts the page together. */

import { Adapters } from "./adapters.js";
import { Api } from "./api.js";
import { Catalog } from "./catalog.js";
import { Chat } from "./chat.js";
import { button } from "./dom.js";
import { askForKey } from "./keydialog.js";
import { Keys } from "./keys.js";
import { Monitor } from "./monitor.js";
import { showStatus } from "./status.js";
import { tabs } from "./tabs.js";
import { themeButton } from "./theme.js";

const keys = new Keys();
const api = new Api(keys);
const catalog = new Catalog(api);
const monitor = new Monitor(api);
const services = { api, catalog, monitor };

document
  .getElementById("tools")
  .append(button("API key", { symbol: "key", kind: "quiet", click: () => askForKey(keys) }), themeButton());
showStatus(document.getElementById("status"), monitor);

const chat = new Chat(document.getElementById("view-chat"), services);
const adapters = new Adapters(document.getElementById("view-adapters"), services, (model) => {
  show("chat");
  chat.use(model);
});
const show = tabs(document.querySelector("[role=tablist]"), (name) => (adapters.visible = name === "adapters"));

const load = () => catalog.load().catch(() => {}); // the table shows the error
api.addEventListener("unauthorized", () =>
  askForKey(keys, keys.value ? "The server refused this key." : "This server asks for a key."),
);
keys.addEventListener("change", () => {
  load();
  monitor.refresh();
});
monitor.addEventListener("change", () => monitor.ready && !catalog.loaded && !catalog.error && load());
monitor.start();
load();
