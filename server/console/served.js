/** What stood behind an answer: adapters, the router's reasons, tokens and times. */

import { el } from "./dom.js";
import { duration, plural, rate } from "./format.js";

const ENDINGS = { length: "cut at the token limit", content_filter: "filtered" };
const SCORES = 5;

/** The adapters of an answer as one text. */
function adapters(served, base) {
  if (!served.adapters.length) return [base ?? "base"];
  const alone = served.adapters.length === 1 && served.adapters[0].weight === 1;
  return served.adapters.map((a) => `${a.name}@${a.version}${alone ? "" : ` × ${Number(a.weight.toFixed(3))}`}`);
}

/** The router's best candidates, as bars between the lowest and the highest. */
function scores(router) {
  const shown = (router.scores ?? []).slice(0, SCORES);
  if (!shown.length) return null;
  const values = shown.map((entry) => entry.score);
  const [low, high] = [Math.min(...values, 0), Math.max(...values, 1e-9)];
  const chosen = new Set((router.chosen ?? []).map((entry) => entry.name));
  return el(
    "ul",
    { class: "scores" },
    shown.map(({ name, score }) =>
      el(
        "li",
        { class: chosen.has(name) ? "chosen" : "" },
        el("span", {}, name),
        el("meter", { min: low, max: high, value: score, "aria-label": `score of ${name}` }),
        el("b", {}, score.toFixed(3)),
      ),
    ),
  );
}

/** Who answered, how much and how fast, as far as it is known. */
export function facts(answer, base) {
  const chips = [];
  const { served } = answer;
  if (served) chips.push(adapters(served, base).map((text) => el("span", { class: "chip strong" }, text)));
  if (answer.tokens !== null) chips.push(el("span", { class: "chip" }, plural(answer.tokens, "token")));
  if (answer.firstText !== null) {
    chips.push(el("span", { class: "chip", title: "Time to first token" }, `first ${duration(answer.firstText)}`));
  }
  if (answer.speed !== null) chips.push(el("span", { class: "chip" }, `${rate(answer.speed)} tok/s`));
  if (answer.stopped) chips.push(el("span", { class: "chip warn" }, "stopped"));
  else if (answer.finish in ENDINGS) chips.push(el("span", { class: "chip warn" }, ENDINGS[answer.finish]));
  return chips;
}

/** The router's decision, folded; null where there is none. */
export function why(router) {
  if (!router?.rung) return null;
  const time = router.milliseconds == null ? "" : ` in ${router.milliseconds.toFixed(1)} ms`;
  return el(
    "details",
    { class: "why" },
    el("summary", {}, `Routed by ${router.rung}${time}`),
    router.reason ? el("p", {}, router.reason) : null,
    scores(router),
  );
}
