// What the metrics view shows, computed from two scrapes of `/metrics`.

import { buckets, increase, quantile, sum, sumsBy } from "./prometheus.js";

const OUTCOMES = ["completed", "failed", "cancelled", "interrupted"];

/** The counters that must stay 0, and what another number means. */
export const ZEROS = [
  {
    name: "lastcall_turns_without_terminal_event_total",
    label: "Turns without an end",
    means: "A turn has ended, and its streams were not told so.",
  },
  {
    name: "lastcall_resume_gaps_total",
    label: "Resume gaps",
    means: "A client that came back could not get all the events that it had missed.",
  },
  {
    name: "lastcall_turn_ends_not_stored_total",
    label: "Ends not stored",
    means: "A turn has ended, and the store has not taken the end.",
  },
  {
    name: "lastcall_turns_crashed_total",
    label: "Turns crashed",
    means: "A fault of this service has ended a turn; the log has the error.",
  },
  {
    name: "lastcall_shutdown_tasks_left_total",
    label: "Tasks left",
    means: "A task has outlived the shutdown of its service.",
  },
  {
    name: "lastcall_shutdown_streams_aborted_total",
    label: "Streams aborted",
    means: "A shutdown has not sent a stream to its end: its client was gone, or did not read.",
  },
];

/** The figures at one moment: gauges, and the rates and quantiles since the scrape before. */
export function figuresOf(before, now, seconds) {
  const rate = (name, where) => {
    const value = sum(now, name, where);
    return value === null ? null : increase(sum(before, name, where), value) / seconds;
  };
  const between = (name, q) => quantile(buckets(before, name), buckets(now, name), q);
  const figures = {
    outputTokens: rate("lastcall_output_tokens_total") ?? 0,
    inputTokens: rate("lastcall_input_tokens_total") ?? 0,
    firstToken50: between("lastcall_turn_first_token_seconds", 0.5),
    firstToken95: between("lastcall_turn_first_token_seconds", 0.95),
    gap95: between("lastcall_turn_token_gap_seconds", 0.95),
    lag50: between("lastcall_event_loop_lag_seconds", 0.5),
    lag99: between("lastcall_event_loop_lag_seconds", 0.99),
    streams: sum(now, "lastcall_streams"),
    running: sum(now, "lastcall_turns", { state: "running" }),
    queued: sum(now, "lastcall_turns", { state: "queued" }),
    cpu: rate("lastcall_cpu_seconds_total"),
  };
  for (const outcome of OUTCOMES) figures[outcome] = rate("lastcall_turns_total", { outcome }) ?? 0;
  return figures;
}

/** The figures that need one scrape only. */
export function gaugesOf(now) {
  return {
    sessionsRunning: sum(now, "lastcall_sessions", { state: "running" }),
    sessionsIdle: sum(now, "lastcall_sessions", { state: "idle" }),
    turnsRunning: sum(now, "lastcall_turns", { state: "running" }),
    turnsQueued: sum(now, "lastcall_turns", { state: "queued" }),
    streams: sum(now, "lastcall_streams"),
    streamsByFace: sumsBy(now, "lastcall_streams", "face"),
    upstreamActive: sum(now, "lastcall_upstream_connections", { state: "active" }),
    upstreamIdle: sum(now, "lastcall_upstream_connections", { state: "idle" }),
    tasks: sum(now, "lastcall_tasks"),
    workers: sum(now, "lastcall_workers"),
    memory: sum(now, "lastcall_resident_memory_bytes"),
    isStoreRefusing: (sum(now, "lastcall_store_refusing") ?? 0) > 0,
  };
}

/** The counters that must be 0, each with its value: null where this server does not count it. */
export const zerosOf = (now) => ZEROS.map((zero) => ({ ...zero, value: sum(now, zero.name) }));
