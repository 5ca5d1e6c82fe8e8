/** The few series of /metrics that the console shows. */

const SAMPLE = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /([A-Za-z_]\w*)="((?:[^"\\]|\\.)*)"/g;
const ESCAPES = { "\\n": "\n", '\\"': '"', "\\\\": "\\" };

/** The samples of the families in `names`: a Map of name to a list of {labels, value}. */
export function parse(text, names) {
  const found = new Map(names.map((name) => [name, []]));
  for (const line of text.split("\n")) {
    if (line.startsWith("#")) continue;
    const [, name, labels, value] = SAMPLE.exec(line) ?? [];
    if (!found.has(name)) continue;
    const pairs = [...(labels ?? "").matchAll(LABEL)].map(([, key, raw]) => [
      key,
      raw.replace(/\\[n"\\]/g, (e) => ESCAPES[e]),
    ]);
    found.get(name).push({ labels: Object.fromEntries(pairs), value: Number(value) });
  }
  return found;
}

/** The only value of a series, or null. */
export function single(samples, name) {
  return samples.get(name)[0]?.value ?? null;
}

/** Values by one label, the other labels added up. */
export function byLabel(samples, name, label) {
  const sums = new Map();
  for (const { labels, value } of samples.get(name)) sums.set(labels[label], (sums.get(labels[label]) ?? 0) + value);
  return sums;
}
