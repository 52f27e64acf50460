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

const bar = (name, one, widest) => `<div><strong>${escapeHtml(name)}</strong> <span class="moe-note">stored ${gigabytes(one.totalBytes)}, met by a token ${gigabytes(one.activeBytes)}, ${fixed(100 * one.share, 1)} %</span>
<div class="moe-double"><div class="moe-all-bar" style="width:${(100 * one.total / widest).toFixed(2)}%"></div><div class="moe-active-bar" style="width:${(100 * one.active / widest).toFixed(2)}%"></div></div></div>`;

/** The components that either model has, one row for both. */
const table = (names, parts, results) => {
  const cells = (counts) => counts.map((count) => `<td>${count ? inBillions(count) : "–"}</td>`).join("");
  const rows = Object.keys(parts[0]).filter((part) => parts.some((own) => own[part][0])).map((part) => `<tr><th scope="row">${part.replaceAll("_", " ")}</th>${parts.map((own) => cells(own[part])).join("")}</tr>`);
  const heads = names.map((name) => `<th scope="colgroup" colspan="2">${escapeHtml(name)}</th>`).join("");
  const all = results.map(({ total, active }) => cells([total, active])).join("");
  return `<div class="moe-scroll"><table class="moe-grid"><thead><tr><td></td>${heads}</tr><tr><th scope="col">10⁹ parameters</th>${names.map(() => '<th scope="col">stored</th><th scope="col">active</th>').join("")}</tr></thead><tbody>${rows.join("")}<tr class="moe-row"><th scope="row">all</th>${all}</tr></tbody></table></div>`;
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
  picture: ({ left: one, right: other }, { left, right }, { models }) => {
    const widest = Math.max(one.total, other.total);
    return `<div class="moe-stores">${bar(left, one, widest)}${bar(right, other, widest)}</div>${table([left, right], [models[left], models[right]], [one, other])}`;
  },
  describe: (result, { left, right }) => [[left, result.left], [right, result.right]].map(([name, one]) => `${name} stores ${inBillions(one.total)} billion parameters in ${gigabytes(one.totalBytes)}, and a token meets ${inBillions(one.active)} in ${gigabytes(one.activeBytes)}`).join("; ") + ".",
};
