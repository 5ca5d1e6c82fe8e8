/** The two files of an adapter, out of whatever was dropped or chosen. */

export const CONFIG = "adapter_config.json";
export const WEIGHTS = "adapter_model.safetensors";
const DEPTH = 3;
const MOST = 2000;

/** All files under a dropped entry, with their paths; bounded, so that a dropped home folder ends. */
async function walk(entry, depth, found) {
  if (found.length >= MOST) return;
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    found.push({ file, path: entry.fullPath });
  } else if (depth > 0) {
    const reader = entry.createReader();
    for (;;) {
      const entries = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
      if (!entries.length) return;
      for (const inner of entries) await walk(inner, depth - 1, found);
    }
  }
}

/** What was dropped, as {file, path}. The entries must be taken before the event ends. */
export function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return Promise.resolve(chosen(transfer.files));
  const found = [];
  return Promise.all(entries.map((entry) => walk(entry, DEPTH, found))).then(() => found);
}

/** What a file input holds, as {file, path}. */
export function chosen(files) {
  return [...files].map((file) => ({ file, path: `/${file.webkitRelativePath || file.name}` }));
}

/**
 * The adapter in a list of files: {config, weights, folder}. Throws an Error that says what is missing; where several
 * folders hold adapters (checkpoints), the one nearest to the top counts.
 */
export function adapterIn(list) {
  const depth = (path) => path.split("/").length;
  const configs = list.filter(({ file }) => file.name === CONFIG).sort((a, b) => depth(a.path) - depth(b.path));
  for (const config of configs) {
    const folder = config.path.slice(0, -CONFIG.length);
    const weights = list.find(({ file, path }) => file.name === WEIGHTS && path === folder + WEIGHTS);
    if (weights)
      return { config: config.file, weights: weights.file, folder: folder.split("/").filter(Boolean).at(-1) ?? "" };
  }
  const names = new Set(list.map(({ file }) => file.name));
  if ([...names].some((name) => name.endsWith(".bin")))
    throw new Error(`The weights are .bin: save them again with safe_serialization=True, as ${WEIGHTS}.`);
  const missing = [CONFIG, WEIGHTS].filter((name) => !names.has(name));
  throw new Error(
    missing.length ? `There is no ${missing.join(" and no ")}.` : `${CONFIG} and ${WEIGHTS} are in different folders.`,
  );
}

/** A name that the server takes, out of a folder's. */
export function nameFrom(folder) {
  return folder
    .toLowerCase()
    .replace(/[^a-z0-9._-]+/g, "-")
    .replace(/^[^a-z0-9]+/, "")
    .slice(0, 64);
}
