// Reads Prometheus' text format, and computes what the charts show: rates of counters and quantiles of histograms.

/**
 * The samples of a scrape.
 *
 * @param {string} text what `/metrics` answers
 * @returns {Map<string, {labels: Record<string, string>, value: number}[]>} samples by the name of the metric
 */
export function parse(text) {
  const samples = new Map();
  for (const line of text.split("\n")) {
    if (line === "" || line[0] === "#") continue;
    const sample = parseLine(line);
    if (sample === null) continue;
    const list = samples.get(sample.name);
    if (list === undefined) samples.set(sample.name, [sample]);
    else list.push(sample);
  }
  return samples;
}

const LINE = /^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?[ \t]+([^ \t]+)/;
const LABEL = /([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"/g;
const ESCAPES = { "\\n": "\n", '\\"': '"', "\\\\": "\\" };

function parseLine(line) {
  const found = LINE.exec(line);
  if (found === null) return null;
  const labels = {};
  for (const [, name, value] of (found[2] ?? "").matchAll(LABEL))
    labels[name] = value.replace(/\\[n"\\]/g, (escape) => ESCAPES[escape]);
  return { name: found[1], labels, value: toNumber(found[3]) };
}

function toNumber(text) {
  if (text === "+Inf") return Infinity;
  if (text === "-Inf") return -Infinity;
  return Number(text);
}

/** The sum of a metric's samples with these labels, or null where the scrape has none of them. */
export function sum(samples, name, where = {}) {
  const wanted = Object.entries(where);
  const found = (samples.get(name) ?? []).filter(({ labels }) => wanted.every(([label, value]) => labels[label] === value));
  return found.length === 0 ? null : found.reduce((total, { value }) => total + value, 0);
}

/** The sums of a metric's samples by the value of one label. */
export function sumsBy(samples, name, label) {
  const sums = new Map();
  for (const { labels, value } of samples.get(name) ?? []) {
    if (labels[label] === undefined) continue;
    sums.set(labels[label], (sums.get(labels[label]) ?? 0) + value);
  }
  return sums;
}

/** How far a counter has come between two scrapes. After a restart it counts from 0 again. */
export const increase = (before, now) => (now === null ? null : now < (before ?? 0) ? now : now - (before ?? 0));

/** The cumulated counts of a histogram by upper bound, all its samples added up. */
export function buckets(samples, name) {
  const counts = new Map();
  for (const { labels, value } of samples.get(`${name}_bucket`) ?? []) {
    const bound = toNumber(labels.le);
    counts.set(bound, (counts.get(bound) ?? 0) + value);
  }
  return new Map([...counts].sort(([a], [b]) => a - b));
}

/**
 * A quantile of what a histogram has counted between two scrapes, by linear interpolation within the bucket.
 *
 * @returns {number | null} null where nothing was counted. Beyond the last finite bound: that bound.
 */
export function quantile(before, now, q) {
  const isNew = [...now].some(([bound, count]) => count < (before.get(bound) ?? 0)); // the server has restarted
  const counted = [...now].map(([bound, count]) => [bound, isNew ? count : count - (before.get(bound) ?? 0)]);
  const total = counted.at(-1)?.[1] ?? 0;
  if (total <= 0) return null;
  const rank = q * total;
  let lower = 0;
  let below = 0;
  for (const [bound, count] of counted) {
    if (count >= rank && count > below) {
      if (bound === Infinity) return lower;
      return lower + ((bound - lower) * (rank - below)) / (count - below);
    }
    if (bound !== Infinity) lower = bound;
    below = count;
  }
  return lower;
}
