// Gate lab: four routers on the same logits, side by side.
import { NORMALIZERS, SCORES, escapeHtml, fixed, range, sum, topK } from "../core.js";

export const ROUTERS = {
  plain: { label: "softmax, top-K", papers: "Switch, DeepSeekMoE, OLMoE", score: "softmax", normalize: "none" },
  sum: { label: "softmax, top-K, ÷ sum", papers: "GShard, Qwen3", score: "softmax", normalize: "sum" },
  softmax: { label: "top-K, softmax", papers: "Shazeer 2017, Mixtral", score: "identity", normalize: "softmax" },
  sigmoid: { label: "sigmoid, top-K, ÷ sum", papers: "DeepSeek-V3", score: "sigmoid", normalize: "sum" },
};

export function compute({ logits, topK: count }) {
  return Object.fromEntries(Object.entries(ROUTERS).map(([name, router]) => {
    const scores = SCORES[router.score].forward(logits);
    const expert = topK(scores, count);
    const gate = NORMALIZERS[router.normalize].forward(expert.map((e) => scores[e]));
    const full = range(logits.length).map((e) => (expert.includes(e) ? gate[expert.indexOf(e)] : 0));
    return [name, { expert, gate, full, total: sum(gate) }];
  }));
}

const bar = (value, e) => `<div class="moe-track"><div class="moe-bar moe-fill-${e}" style="width:${(100 * value).toFixed(1)}%"></div><span>${value ? fixed(value, 3) : ""}</span></div>`;

export default {
  title: "Gate lab: four orders, one token",
  defaults: ({ logits }) => ({ logits, topK: 2 }),
  valid: ({ topK: count }, { experts }) => count >= 1 && count <= experts.length,
  controls: ({ experts }) => [
    ...experts.map((text, e) => ({
      key: `z${e}`, label: `Logit of “${text}”`, min: -4, max: 4, step: 0.1,
      get: ({ logits }) => logits[e],
      set: (old, value) => ({ ...old, logits: old.logits.map((z, i) => (i === e ? value : z)) }),
      show: (value) => fixed(value, 1),
    })),
    { key: "topK", label: "Experts per token, K", min: 1, max: experts.length, step: 1 },
  ],
  compute,
  picture: (result, _, { experts }) => `<div class="moe-cards">${Object.entries(result).map(([name, { full, total }]) => `<div class="moe-card">
<strong>${ROUTERS[name].label}</strong><span class="moe-note">${ROUTERS[name].papers}</span>
${full.map((value, e) => `<div class="moe-bar-row"><span>${escapeHtml(experts[e])}</span>${bar(value, e)}</div>`).join("")}
<span class="moe-note">the gates sum to ${fixed(total, 3)}</span></div>`).join("")}</div>`,
  describe: (result) => Object.entries(result).map(([name, { gate }]) => `${ROUTERS[name].label}: ${gate.map((g) => fixed(g, 3)).join(", ")}`).join(". ") + ".",
};
