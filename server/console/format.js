/** Values as people read and write them. */

const UNITS = ["B", "kB", "MB", "GB", "TB"];

/** Bytes with a decimal unit. */
export function bytes(count) {
  let unit = 0;
  while (count >= 1000 && unit < UNITS.length - 1) {
    count /= 1000;
    unit += 1;
  }
  return `${unit === 0 || count >= 100 ? Math.round(count) : count.toFixed(1)} ${UNITS[unit]}`;
}

/** Milliseconds as ms or s. */
export function duration(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 1)} s`;
}

/** A rate with as many digits as make sense. */
export function rate(value) {
  return value >= 100 ? String(Math.round(value)) : value.toFixed(value >= 10 ? 1 : value > 0 ? 2 : 0);
}

/** A share of 0 to 1. */
export function percent(share) {
  return `${share > 0 && share < 0.1 ? (share * 100).toFixed(1) : Math.round(share * 100)}%`;
}

/** A count with thousands separated. */
export function count(value) {
  return value.toLocaleString("en");
}

/** A word with its count: 1 token, 2 tokens. */
export function plural(value, word) {
  return `${count(value)} ${word}${value === 1 ? "" : "s"}`;
}

/** The beginning of a digest, without its algorithm. */
export function shortDigest(digest) {
  return digest.replace(/^sha256:/, "").slice(0, 10);
}

/** A unix time in seconds, in the reader's own zone. */
export function date(seconds) {
  return new Date(seconds * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
}

/** The items of a text that somebody wrote, one after each `separator`. */
export function items(text, separator = "\n") {
  return text
    .split(separator)
    .map((item) => item.trim())
    .filter(Boolean);
}
