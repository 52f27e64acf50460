// Cost calculator: what two published models store, and what of it one token meets.
import { escapeHtml, fixed, sum } from "../core.js";

const side = (parts, bytes) => {
  const total = sum(Object.values(parts).map(([stored]) => stored));
  const active = sum(Object.values(parts).map(([, met]) => met));
  return { total, active, share: active / total, totalBytes: total * bytes, activeBytes: active * bytes };
};

export const compute = ({ left, right, bytes }, { models }) => ({ left: side(models[left], bytes), right: side(models[right], bytes) });

const inBillions = (count) => (count >= 1e8 ? fixed(count / 1e9, 1) : (count / 1e9).toPrecision(2));
const gigabytes = (count) => `${count >= 1e10 ? fixed(count / 1e9, 0) : fixed(count / 1e9, 1)} GB`;

const card = (name, parts, result, widest) => {
  const rows = Object.entries(parts).filter(([, [stored]]) => stored).map(([part, [stored, met]]) => `<tr><th scope="row">${part.replaceAll("_", " ")}</th><td>${inBillions(stored)}</td><td>${inBillions(met)}</td></tr>`);
  return `<div class="moe-card"><strong>${escapeHtml(name)}</strong>
<div class="moe-double"><div class="moe-all-bar" style="width:${(100 * result.total / widest).toFixed(2)}%"></div><div class="moe-active-bar" style="width:${(100 * result.active / widest).toFixed(2)}%"></div></div>
<span class="moe-note">stored ${gigabytes(result.totalBytes)}, met by a token ${gigabytes(result.activeBytes)}, ${fixed(100 * result.share, 1)} %</span>
<div class="moe-scroll"><table class="moe-grid"><thead><tr><th scope="col">10⁹ parameters</th><th scope="col">stored</th><th scope="col">active</th></tr></thead><tbody>${rows.join("")}<tr class="moe-row"><th scope="row">all</th><td>${inBillions(result.total)}</td><td>${inBillions(result.active)}</td></tr></tbody></table></div></div>`;
};

export default {
  title: "What is stored, and what a token meets",
  defaults: () => ({ left: "dense", right: "mixtral-8x7b", bytes: 2 }),
  valid: ({ left, right, bytes }, { models }) => left in models && right in models && bytes > 0,
  controls: ({ models }) => [
    { key: "left", label: "Model", options: Object.keys(models).map((name) => [name, name]) },
    { key: "right", label: "Compared with", options: Object.keys(models).map((name) => [name, name]) },
    { key: "bytes", label: "Bytes per parameter", options: [[4, "4 (fp32)"], [2, "2 (bf16)"], [1, "1 (fp8)"], [0.5, "½ (4 bit)"]] },
  ],
  compute,
  picture: (result, { left, right }, { models }) => {
    const widest = Math.max(result.left.total, result.right.total);
    return `<div class="moe-cards moe-wide">${card(left, models[left], result.left, widest)}${card(right, models[right], result.right, widest)}</div>`;
  },
  describe: (result, { left, right }) => [[left, result.left], [right, result.right]].map(([name, one]) => `${name} stores ${inBillions(one.total)} and a token meets ${inBillions(one.active)} billion parameters`).join("; ") + ".",
};
