// The service card: health for everybody, the engine's numbers for who may read /metrics.

import { ask, savedKey } from "./endpoint.js";

const PERIOD_MS = 2000;
const POINTS = 120;
const RECENT = 15;

// The key that may not read the numbers: it is not tried again.
let denied = null;

/** Keep the card fresh while the page is visible. `onState(text, bad)` hears how the endpoint is. */
export function watch(card, onState) {
  const samples = [];
  const tick = async () => {
    if (!document.hidden) await refresh(card, samples, onState);
    setTimeout(tick, PERIOD_MS);
  };
  tick();
}

async function refresh(card, samples, onState) {
  try {
    // Public routes get no key: a wrong one would be refused there too.
    const health = await fetch("health");
    onState(health.ok ? "healthy" : "the engine does not answer", !health.ok);
    show(card, "version", (await (await fetch("version")).json()).version);
    if (denied === savedKey()) return;
    const metrics = await ask("metrics");
    denied = [401, 403].includes(metrics.status) ? savedKey() : null;
    card.querySelector("#service-note").textContent = denied === null ? "" : "The engine's numbers need an administrator's key.";
    if (!metrics.ok) return;
    samples.push({ time: performance.now() / 1000, ...parse(await metrics.text()) });
    if (samples.length > POINTS) samples.shift();
    numbers(card, samples);
  } catch {
    onState("nobody answers", true);
  }
}

function numbers(card, samples) {
  const now = samples.at(-1);
  const rates = samples.slice(1).map((sample, i) => per(samples[i], sample, "generation_tokens_total"));
  const before = samples.at(-RECENT) ?? samples[0];
  const firsts = change(before, now, "time_to_first_token_seconds_count");
  show(card, "running", now.num_requests_running?.toFixed(0));
  show(card, "waiting", now.num_requests_waiting?.toFixed(0));
  show(card, "kv", percent(now.kv_cache_usage_perc));
  show(card, "rate", rates.at(-1)?.toFixed(0));
  show(card, "ttft", firsts > 0 ? `${((change(before, now, "time_to_first_token_seconds_sum") / firsts) * 1000).toFixed(0)} ms` : undefined);
  show(card, "hits", now.prefix_cache_queries_total > 0 ? percent(now.prefix_cache_hits_total / now.prefix_cache_queries_total) : undefined);
  const high = Math.max(1, ...rates);
  const points = rates.map((rate, i) => `${240 - (rates.length - 1 - i) * (240 / POINTS)},${38 - (rate / high) * 36}`);
  card.querySelector("polyline").setAttribute("points", points.join(" "));
}

/** Prometheus's text format to sums over all labels: {num_requests_running: 3, ...}, without our prefix. */
export function parse(text) {
  const sums = {};
  for (const [, name, value] of text.matchAll(/^altiplano_(\w+)(?:\{.*\})? (\S+)/gm)) {
    sums[name] = (sums[name] ?? 0) + Number(value);
  }
  return sums;
}

// A counter that fell has been restarted: what it shows now is new.
function change(before, now, name) {
  const [old, fresh] = [before[name] ?? 0, now[name] ?? 0];
  return fresh >= old ? fresh - old : fresh;
}

function per(before, now, name) {
  return change(before, now, name) / (now.time - before.time);
}

function percent(share) {
  return share === undefined ? undefined : `${(share * 100).toFixed(1)} %`;
}

function show(card, name, value) {
  card.querySelector(`[data-value=${name}]`).textContent = value ?? "-";
}
