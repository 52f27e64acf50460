// Bias controller: after every step each expert's bias moves by ±rate against its load.
import { countLoad, fixed, maxViolation, range, sigmoid, sum, topK } from "../core.js";

const TOP_K = 2;

export function compute({ logRate, skew, steps, shift }, { batches, preference }) {
  const rate = 10 ** logRate;
  const E = preference.length;
  const bias = new Array(E).fill(0);
  const loads = [];
  for (const step of range(steps)) {
    const turned = shift === "half" && step >= steps / 2;
    const wanted = turned ? [...preference].reverse() : preference;
    const scores = batches[step % batches.length].map((row) => sigmoid(row.map((z, e) => z + skew * wanted[e])));
    const load = countLoad(scores.map((row) => topK(row.map((s, e) => s + bias[e]), TOP_K)), E);
    const average = sum(load) / E;
    load.forEach((n, e) => { bias[e] += rate * Math.sign(average - n); });
    loads.push(load);
  }
  return { bias, loads, violation: loads.map(maxViolation) };
}

/** Mean of each value and the `width − 1` before it. */
const smooth = (row, width) => row.map((_, i) => {
  const part = row.slice(Math.max(0, i - width + 1), i + 1);
  return sum(part) / part.length;
});

export default {
  title: "A controller instead of a loss",
  defaults: () => ({ logRate: -2, skew: 1, steps: 160, shift: "no" }),
  valid: ({ steps, shift, logRate }) => steps >= 1 && steps <= 400 && logRate <= 0 && (shift === "no" || shift === "half"),
  controls: () => [
    { key: "logRate", label: "Step of the bias, γ", min: -3.5, max: -0.5, step: 0.25, show: (value) => (10 ** value).toPrecision(2) },
    { key: "skew", label: "How uneven the router is", min: 0, max: 2, step: 0.25, show: (value) => fixed(value, 2) },
    { key: "steps", label: "Training steps", min: 20, max: 400, step: 20 },
    { key: "shift", label: "The data", options: [["no", "stay as they are"], ["half", "turn around half way"]] },
  ],
  compute,
  picture({ bias, loads, violation }, { steps }) {
    const line = smooth(violation, 4);
    const top = Math.max(3, ...line);
    const x = (i) => 34 + (316 * i) / Math.max(1, steps - 1);
    const y = (v) => 150 - (130 * v) / top;
    const path = line.map((v, i) => `${i ? "L" : "M"}${x(i).toFixed(1)} ${y(v).toFixed(1)}`).join("");
    const ticks = range(Math.floor(top) + 1).map((v) => `<line class="moe-axis" x1="34" x2="350" y1="${y(v)}" y2="${y(v)}"/><text class="moe-small" x="28" y="${y(v) + 4}" text-anchor="end">${v}</text>`);
    const most = Math.max(...loads.at(-1));
    const columns = loads.at(-1).map((n, e) => `<div class="moe-column"><span>${n}</span><div class="moe-stack"><div class="moe-kept-bar" style="height:${((80 * n) / most).toFixed(1)}px"></div></div><span>${e + 1}</span><span class="moe-note">${fixed(bias[e])}</span></div>`);
    return `<svg viewBox="0 0 360 176" aria-hidden="true">${ticks.join("")}<path class="moe-curve moe-e0" d="${path}"/><text class="moe-small" x="34" y="14">MaxVio, mean of four steps</text><text class="moe-small" x="350" y="170" text-anchor="end">step ${steps}</text></svg>
<div class="moe-columns">${columns.join("")}</div><p class="moe-note">load of ${bias.length} experts at the last step; under each expert its bias</p>`;
  },
  describe({ violation, loads }, { steps }) {
    const end = violation.slice(-16);
    return `MaxVio is ${fixed(violation[0])} at the first step and ${fixed(sum(end) / end.length)} on average over the last ${end.length} of ${steps}. The last load is ${loads.at(-1).join(", ")}.`;
  },
};
