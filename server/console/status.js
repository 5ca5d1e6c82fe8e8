/** The header's view of the server. */

import { el, setText } from "./dom.js";
import { count, percent, rate } from "./format.js";

const [WIDTH, HEIGHT] = [72, 20];
const SVG = "http://www.w3.org/2000/svg";

/** A number with its name under it. */
function figure(label, title) {
  const value = el("b", {}, "–");
  return { value, node: el("span", { class: "figure", title }, value, el("span", {}, label)) };
}

/** A line through the last values. */
function sparkline() {
  const line = document.createElementNS(SVG, "polyline");
  const node = document.createElementNS(SVG, "svg");
  node.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  node.setAttribute("class", "spark");
  node.setAttribute("aria-hidden", "true");
  node.append(line);
  const draw = (values) => {
    const top = Math.max(...values, 1e-9);
    const step = WIDTH / Math.max(values.length - 1, 1);
    line.setAttribute(
      "points",
      values.map((v, i) => `${(i * step).toFixed(1)},${(HEIGHT - 2 - (v / top) * (HEIGHT - 4)).toFixed(1)}`).join(" "),
    );
  };
  return { node, draw };
}

/** Fills `place` and keeps it up to date with `monitor`. */
export function showStatus(place, monitor) {
  const word = el("span", { class: "state-word" }, "Connecting");
  const state = el("span", { class: "state", "data-state": "unknown" }, el("i", { class: "dot" }), word);
  const running = figure("running", "Requests in the running batch");
  const waiting = figure("queued", "Requests that wait");
  const cache = figure("KV cache", "Share of the KV cache's blocks in use");
  const speed = figure("tokens/s", "Generated tokens per second, over the last ten seconds");
  const spark = sparkline();
  place.append(state, running.node, waiting.node, cache.node, speed.node, spark.node);
  monitor.addEventListener("change", () => {
    state.dataset.state = monitor.ready ? "ready" : "down";
    state.title = monitor.reason;
    setText(word, monitor.ready ? "Ready" : "Not ready");
    setText(running.value, monitor.running === null ? "–" : count(monitor.running));
    setText(waiting.value, monitor.waiting === null ? "–" : count(monitor.waiting));
    setText(cache.value, monitor.cache === null ? "–" : percent(monitor.cache));
    setText(speed.value, monitor.speed === null ? "–" : rate(monitor.speed));
    spark.draw(monitor.speeds);
  });
}
