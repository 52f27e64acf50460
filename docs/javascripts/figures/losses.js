// Load and loss: how much a router costs that collapses step by step, by the right loss and by five that shipped.
import { capacityPerAssignment, countLoad, fixed, mean, range, serve, softmax, sum, topK } from "../core.js";

const product = (f, P) => f.length * sum(f.map((share, e) => share * P[e]));

/** The logits when every token is pulled towards the first two experts. */
export const pulled = (logits, pull) => logits.map((row) => row.map((z, e) => (e < 2 ? z + pull : z)));

const VARIANTS = {
  right: { label: "E Σ f P", note: "assignments over T·K, P over all scores", value: ({ load, P, T, K }) => product(load.map((n) => n / (T * K)), P) },
  perToken: { label: "not divided by K", note: "even load costs K", value: ({ load, P, T }) => product(load.map((n) => n / T), P) },
  afterDrop: { label: "counted after the drop", note: "a full expert looks no busier than its capacity", value: ({ keptLoad, P, T, K }) => product(keptLoad.map((n) => n / (T * K)), P) },
  chosenOnly: { label: "P over the chosen only", note: "experts that nobody chose get no gradient", value: ({ load, chosen, T, K }) => product(load.map((n) => n / (T * K)), chosen) },
  twice: { label: "softmax twice", note: "the penalty is almost gone", value: ({ load, P2, T, K }) => product(load.map((n) => n / (T * K)), P2) },
  survivors: {
    label: "divided by the survivors", note: "grows because tokens are dropped",
    value: ({ keptLoad, P, T, survivors }) => product(keptLoad.map((n) => n / sum(keptLoad)), P.map((p) => (p * T) / survivors)),
  },
};

export function compute({ pull, topK: count, factor }, { logits }) {
  const rows = pulled(logits, pull);
  const [T, E] = [rows.length, rows[0].length];
  const scores = rows.map(softmax);
  const expert = scores.map((row) => topK(row, count));
  const kept = serve(expert, E, capacityPerAssignment(factor, count, T, E), "choice_major").filter((one) => one.keep);
  const keptLoad = new Array(E).fill(0);
  for (const one of kept) keptLoad[one.expert] += 1;
  const facts = {
    T, K: count, load: countLoad(expert, E), keptLoad, P: mean(scores), P2: mean(scores.map(softmax)),
    chosen: mean(scores.map((row, t) => row.map((s, e) => (expert[t].includes(e) ? s : 0)))),
    survivors: new Set(kept.map((one) => one.token)).size,
  };
  const losses = Object.fromEntries(Object.entries(VARIANTS).map(([name, { value }]) => [name, value(facts)]));
  return { load: facts.load, keptLoad, importance: facts.P, losses, dropped: T * count - kept.length };
}

export default {
  title: "Load and loss",
  defaults: () => ({ pull: 0, topK: 2, factor: 1 }),
  valid: ({ topK: count, factor }) => count >= 1 && count <= 4 && factor > 0,
  controls: () => [
    { key: "pull", label: "Pull to experts 1 and 2", min: 0, max: 6, step: 0.25, show: (value) => fixed(value, 2) },
    { key: "topK", label: "Experts per token, K", min: 1, max: 4, step: 1 },
    { key: "factor", label: "Capacity factor", min: 0.5, max: 4, step: 0.25, show: (value) => fixed(value, 2) },
  ],
  compute,
  picture({ load, keptLoad, importance, losses }, _, { logits }) {
    const top = Math.max(...load, 1);
    const bars = range(load.length).map((e) => `<div class="moe-column"><span>${load[e]}</span><div class="moe-stack"><div class="moe-over-bar" style="height:${(80 * (load[e] - keptLoad[e]) / top).toFixed(1)}px"></div><div class="moe-kept-bar" style="height:${(80 * keptLoad[e] / top).toFixed(1)}px"></div></div><span>${e + 1}</span><span class="moe-note">${fixed(importance[e], 2)}</span></div>`);
    const widest = Math.max(...Object.values(losses), 4);
    const rows = Object.entries(losses).map(([name, value]) => `<div class="moe-loss${name === "right" ? " moe-right" : ""}"><span>${VARIANTS[name].label}<span class="moe-note">${VARIANTS[name].note}</span></span><div class="moe-track"><div class="moe-bar" style="width:${(100 * value / widest).toFixed(1)}%"></div><span>${fixed(value, 3)}</span></div></div>`);
    return `<div class="moe-columns">${bars.join("")}</div><p class="moe-note">load of ${logits[0].length} experts from ${logits.length} tokens, dropped assignments hatched; under each expert its mean score P</p>${rows.join("")}`;
  },
  describe: ({ load, losses, dropped }) => `Load ${load.join(", ")}; ${dropped} dropped. The loss is ${fixed(losses.right, 3)}; ` + Object.entries(losses).slice(1).map(([name, value]) => `${VARIANTS[name].label} ${fixed(value, 3)}`).join(", ") + ".",
};
