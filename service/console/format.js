// Times and counts in words.

const SECOND = 1000;
const MINUTE = 60 * SECOND;
const HOUR = 60 * MINUTE;
const DAY = 24 * HOUR;
const CLOCK = new Intl.DateTimeFormat([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
const DATE = new Intl.DateTimeFormat([], { dateStyle: "medium", timeStyle: "medium" });
const COUNT = new Intl.NumberFormat("en");

/** A length of time of so many milliseconds: `0.4 ms`, `85 ms`, `1.42 s`, `3 min 5 s`, `2 h 10 min`, `4 d 3 h`. */
export function duration(ms) {
  if (!Number.isFinite(ms)) return "–";
  if (ms < 0) return `−${duration(-ms)}`;
  if (ms < 10) return `${Math.round(ms * 10) / 10} ms`;
  if (ms < 999.5) return `${Math.round(ms)} ms`;
  if (ms < MINUTE) return `${(ms / SECOND).toFixed(ms < 10 * SECOND ? 2 : 1)} s`;
  if (ms < HOUR) return pair(ms, MINUTE, "min", SECOND, "s");
  if (ms < DAY) return pair(ms, HOUR, "h", MINUTE, "min");
  return pair(ms, DAY, "d", HOUR, "h");
}

function pair(ms, large, largeName, small, smallName) {
  const count = Math.floor(ms / large);
  const rest = Math.floor((ms - count * large) / small);
  return rest && count < 10 ? `${count} ${largeName} ${rest} ${smallName}` : `${count} ${largeName}`;
}

/** How long ago a moment is, roughly: `now`, `12 min`, `3 h`, `5 d`. `moment` is what the API gives (RFC 3339). */
export function ago(moment, now = Date.now()) {
  const ms = now - Date.parse(moment);
  return ms < MINUTE ? "now" : rough(ms);
}

/** How long it is until a moment, roughly. */
export function until(moment, now = Date.now()) {
  const ms = Date.parse(moment) - now;
  return ms <= 0 ? "now" : ms < MINUTE ? `${Math.ceil(ms / SECOND)} s` : rough(ms);
}

function rough(ms) {
  for (const [size, name] of [[DAY, "d"], [HOUR, "h"], [MINUTE, "min"]]) {
    if (ms >= size) return `${COUNT.format(Math.floor(ms / size))} ${name}`;
  }
  return "now";
}

/** The time of day of a moment, with seconds. */
export const clock = (moment) => CLOCK.format(new Date(moment));

/** Date and time of a moment. */
export const date = (moment) => DATE.format(new Date(moment));

/** A number with separators. */
export const count = (number) => COUNT.format(number);

/** `1 message`, `2 messages`. */
export const counted = (number, one, many = `${one}s`) => `${COUNT.format(number)} ${number === 1 ? one : many}`;

/** A bound, which is mostly a whole number of seconds: `30 s`. */
export const boundWords = (ms) => (ms % SECOND === 0 && ms < MINUTE ? `${ms / SECOND} s` : duration(ms));

/** The least of …, 0.5, 1, 2, 5, 10, 20, … that is not below a value above 0: for scales and their steps. */
export function roundAbove(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value);
}

/** A size: `812 B`, `1.4 KiB`, `3.0 MiB`. */
export function bytes(size) {
  if (size < 1024) return `${size} B`;
  for (const unit of ["KiB", "MiB", "GiB"]) {
    size /= 1024;
    if (size < 1024 || unit === "GiB") return `${size.toFixed(1)} ${unit}`;
  }
}
