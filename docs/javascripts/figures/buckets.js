// Capacity buckets: the assignments arrive one by one, and the buckets fill.
import { capacityPerAssignment, escapeHtml, fixed, range, serve } from "../core.js";

export function compute({ factor, order, step }, { expert, experts }) {
  const capacity = capacityPerAssignment(factor, expert[0].length, expert.length, experts.length);
  const served = serve(expert, experts.length, capacity, order);
  const arrived = served.slice(0, step);
  return { capacity, served, arrived, dropped: arrived.filter((one) => !one.keep) };
}

const chip = (one, words, now) => `<span class="moe-chip${one.keep ? ` moe-on-${one.expert}` : " moe-lost"}${now ? " moe-now" : ""}">${escapeHtml(words[one.token])}${one.slot + 1 > 1 ? "²" : "¹"}</span>`;

export default {
  title: "Capacity buckets",
  defaults: ({ expert }) => ({ factor: 1, order: "choice_major", step: expert.flat().length }),
  valid: ({ order, step, factor }, { expert }) => (order === "choice_major" || order === "token_major") && factor > 0 && step >= 0 && step <= expert.flat().length,
  controls: ({ expert }) => [
    { key: "step", label: "Assignments served", min: 0, max: expert.flat().length, step: 1, show: (n) => `${n} / ${expert.flat().length}` },
    { key: "factor", label: "Capacity factor", min: 0.25, max: 2, step: 0.25, show: (value) => fixed(value, 2) },
    { key: "order", label: "Served first", options: [["choice_major", "all first choices"], ["token_major", "earlier words"]] },
  ],
  compute,
  picture({ capacity, served, arrived, dropped }, { step }, { words, experts }) {
    const last = arrived.at(-1);
    const buckets = experts.map((text, e) => {
      const own = arrived.filter((one) => one.expert === e && one.keep);
      return `<div class="moe-bucket"><strong>${escapeHtml(text)}</strong><span class="moe-note">${own.length} of ${capacity}</span>
${range(capacity).map((i) => (own[i] ? chip(own[i], words, own[i] === last) : '<span class="moe-chip moe-empty">free</span>')).join("")}</div>`;
    });
    const waiting = served.slice(step).map((one) => chip({ ...one, keep: true }, words, false)).join("");
    return `<div class="moe-buckets">${buckets.join("")}</div>
<p class="moe-line-of"><strong>Waiting</strong> ${waiting || "nobody"}</p><p class="moe-line-of"><strong>Dropped</strong> ${dropped.map((one) => chip(one, words, one === last)).join("") || "nobody"}</p>`;
  },
  describe({ capacity, arrived, dropped }, _, { words, experts }) {
    const named = dropped.map((one) => `the ${one.slot ? "second" : "first"} choice of “${words[one.token]}”, ${experts[one.expert]}`);
    return `Capacity ${capacity}. ${arrived.length} served, ${dropped.length} dropped${named.length ? `: ${named.join("; ")}` : ""}.`;
  },
};
