/** What the server reports of itself, polled: readiness, load, and traffic per adapter. */

import { Poll } from "./poll.js";
import { byLabel, parse, single } from "./prometheus.js";

const PERIOD_MS = 2000;
const WINDOW_MS = 10_000;
const HISTORY = 40;
const RUNNING = "vllm:num_requests_running";
const WAITING = "vllm:num_requests_waiting";
const CACHE = "vllm:kv_cache_usage_perc";
const TOKENS = "vllm:generation_tokens_total";
const REQUESTS = "loramux_requests_total";
const ADAPTER_TOKENS = "loramux_generation_tokens_total";

/** Dispatches `change` after each look. */
export class Monitor extends EventTarget {
  ready = null;
  reason = "Connecting";
  base = null;
  running = null;
  waiting = null;
  cache = null;
  speed = null;
  speeds = [];
  requests = new Map();
  #api;
  #samples = [];
  #blind = false; // this key may not read /metrics
  #poll = new Poll(() => this.#look(), PERIOD_MS);

  constructor(api) {
    super();
    this.#api = api;
  }

  start() {
    this.#poll.start();
  }

  /** Looks again at once, as after a change of the key. */
  refresh() {
    this.#blind = false;
    return this.#poll.now();
  }

  /** Tokens per second of an adapter over the last seconds; null where /metrics does not tell it apart. */
  speedOf(name) {
    const [first, last] = [this.#samples[0], this.#samples.at(-1)];
    if (!last?.adapters.has(name) || last.at === first.at) return null;
    return ((last.adapters.get(name) - (first.adapters.get(name) ?? 0)) / (last.at - first.at)) * 1000;
  }

  async #look() {
    try {
      await this.#readiness();
      await this.#metrics();
    } finally {
      this.dispatchEvent(new Event("change"));
    }
  }

  async #readiness() {
    try {
      this.base = (await this.#api.json("GET", "ready")).model ?? this.base;
      this.ready = true;
      this.reason = "Ready";
    } catch (error) {
      this.ready = false;
      this.reason = error.message;
      if (error.status === 0) throw error;
    }
  }

  async #metrics() {
    if (this.#blind) return;
    let text;
    try {
      text = await (await this.#api.request("GET", "metrics")).text();
    } catch (error) {
      this.#blind = error.status === 401 || error.status === 403;
      this.running = this.waiting = this.cache = this.speed = null;
      this.requests = new Map();
      this.#samples = [];
      this.speeds = [];
      if (this.#blind) return;
      throw error;
    }
    const samples = parse(text, [RUNNING, WAITING, CACHE, TOKENS, REQUESTS, ADAPTER_TOKENS]);
    this.running = single(samples, RUNNING);
    this.waiting = single(samples, WAITING);
    this.cache = single(samples, CACHE);
    this.requests = byLabel(samples, REQUESTS, "adapter");
    this.#remember({
      at: performance.now(),
      tokens: single(samples, TOKENS) ?? 0,
      adapters: byLabel(samples, ADAPTER_TOKENS, "adapter"),
    });
  }

  #remember(sample) {
    const before = this.#samples.at(-1);
    if (before && sample.tokens < before.tokens) this.#samples = []; // the server was started anew
    this.#samples.push(sample);
    while (this.#samples.length > 2 && sample.at - this.#samples[0].at > WINDOW_MS) this.#samples.shift();
    const first = this.#samples[0];
    this.speed = sample.at > first.at ? ((sample.tokens - first.tokens) / (sample.at - first.at)) * 1000 : 0;
    this.speeds = [...this.speeds, this.speed].slice(-HISTORY);
  }
}
