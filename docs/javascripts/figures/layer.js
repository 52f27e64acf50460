// One word through the layer, step by step: every number between x and y.
import { bySum, capacityPerAssignment, escapeHtml, fixed, range, serve, softmax, sum, topK } from "../core.js";

const dot = (a, b) => sum(a.map((v, i) => v * b[i]));

export function compute({ word, company }, { inputs, router, up, down, topK: count, factor }) {
  const batch = company === "alone" ? [inputs[word]] : inputs;
  const own = company === "alone" ? 0 : word;
  const E = router.length;
  const logits = batch.map((x) => router.map((row) => dot(x, row)));
  const scores = logits.map(softmax);
  const expert = scores.map((row) => topK(row, count));
  const gate = bySum(expert[own].map((e) => scores[own][e]));
  const capacity = capacityPerAssignment(factor, count, batch.length, E);
  const places = serve(expert, E, capacity, "choice_major").filter(({ token }) => token === own).sort((a, b) => a.slot - b.slot);
  const x = batch[own];
  const hidden = expert[own].map((e) => up[e].map((row) => Math.max(0, dot(x, row))));
  const out = expert[own].map((e, k) => down[e].map((row) => dot(hidden[k], row)));
  const kept = gate.map((g, k) => (places[k].keep ? g : 0));
  const y = x.map((_, d) => sum(kept.map((g, k) => g * out[k][d])));
  return { x, logits: logits[own], scores: scores[own], expert: expert[own], gate, capacity, positions: places.map(({ position }) => position), kept, hidden, out, y };
}

const numbers = (row, places = 2) => `(${row.map((v) => fixed(v, places)).join(", ")})`;
const grid = (head, rows) => `<div class="moe-scroll"><table class="moe-grid"><thead><tr>${head.map((text) => `<th scope="col">${escapeHtml(text)}</th>`).join("")}</tr></thead><tbody>${rows.map(([name, ...cells]) => `<tr><th scope="row">${escapeHtml(name)}</th>${cells.map(([text, kind = ""]) => `<td class="${kind}">${text}</td>`).join("")}</tr>`).join("")}</tbody></table></div>`;
const byExpert = (names, row, { expert }, places) => row.map((v, e) => [fixed(v, places), expert.includes(e) ? `moe-e${e}` : ""]);

const STEPS = [
  { name: "the word", shape: "x [D]", draw: ({ x }, { features }) => grid(["", ...features], [["x", ...x.map((v) => [fixed(v, 1)])]]), tell: ({ x }) => `It is the vector ${numbers(x, 1)}.` },
  { name: "logits", shape: "x Wᵀ [E]", draw: (r, { experts }) => grid(["", ...experts], [["logit", ...byExpert(experts, r.logits, r, 1)]]), tell: ({ logits }) => `The router's rows times the vector: ${numbers(logits, 1)}.` },
  { name: "scores", shape: "softmax [E]", draw: (r, { experts }) => grid(["", ...experts], [["logit", ...byExpert(experts, r.logits, r, 1)], ["score", ...byExpert(experts, r.scores, r, 3)]]), tell: ({ scores }) => `Softmax makes them positive with sum 1: ${numbers(scores, 3)}.` },
  { name: "choice and gates", shape: "expert, gate [K]", draw: (r, { experts }) => grid(["", "score", "gate"], r.expert.map((e, k) => [`${k + 1}. ${experts[e]}`, [fixed(r.scores[e], 3)], [fixed(r.gate[k], 3), `moe-e${e}`]])), tell: ({ expert, gate }, { experts }) => `The highest are ${expert.map((e) => experts[e]).join(" and ")}; divided by their sum they are the gates ${numbers(gate, 3)}.` },
  { name: "places", shape: "keep [K]", draw: (r, { experts }) => grid(["", "place asked for", `capacity ${r.capacity}`], r.expert.map((e, k) => [experts[e], [r.positions[k] + 1], [r.kept[k] ? "kept" : "dropped", r.kept[k] ? `moe-e${e}` : "moe-lost"]])), tell: ({ expert, kept, capacity }, { experts }) => `Each expert has ${capacity} ${capacity === 1 ? "place" : "places"}. ${expert.map((e, k) => `${experts[e]}: ${kept[k] ? "kept" : "dropped"}`).join("; ")}.` },
  { name: "experts", shape: "out [K, D]", draw: (r, { experts, features }) => grid(["", "hidden", ...features], r.expert.map((e, k) => [experts[e], [r.kept[k] ? numbers(r.hidden[k], 1) : "–"], ...r.out[k].map((v) => (r.kept[k] ? [fixed(v, 2), `moe-e${e}`] : ["–", "moe-lost"]))])), tell: ({ expert, hidden, kept }, { experts }) => expert.map((e, k) => (kept[k] ? `${experts[e]} has the hidden units ${numbers(hidden[k], 1)}` : `${experts[e]} computes nothing for it`)).join("; ") + "." },
  { name: "output", shape: "y [D]", draw: (r, { experts, features }) => grid(["", "gate", ...features], [...r.expert.map((e, k) => [experts[e], [fixed(r.kept[k], 3)], ...r.out[k].map((v) => (r.kept[k] ? [fixed(r.kept[k] * v, 3), `moe-e${e}`] : ["–", "moe-lost"]))]), ["y", [""], ...r.y.map((v) => [fixed(v, 3)])]]), tell: ({ y }) => `Weighted with its gates and added up: ${numbers(y, 3)}.` },
];

export default {
  title: "One word through the layer",
  defaults: () => ({ word: 2, company: "batch", step: 0 }),
  valid: ({ word, company, step }, { words }) => words[word] !== undefined && company in { batch: 1, alone: 1 } && STEPS[step] !== undefined,
  controls: ({ words }) => [
    { key: "word", label: "Word", options: words.map((text, t) => [t, `${t + 1} ${text}`]) },
    { key: "company", label: "In the batch", options: [["batch", "all eight words, as in training"], ["alone", "this word alone, as in generation"]] },
    { key: "step", label: "Step", min: 0, max: STEPS.length - 1, step: 1, show: (value) => `${value + 1} of ${STEPS.length}` },
  ],
  compute,
  picture: (result, { step }, data) => {
    const trail = range(STEPS.length).map((i) => `<li><button type="button" data-set="step=${i}" class="moe-chip${i === step ? " moe-now" : i > step ? " moe-empty" : ""}"${i === step ? ' aria-current="step"' : ""}>${STEPS[i].name} <span class="moe-small">${STEPS[i].shape}</span></button></li>`);
    return `<ol class="moe-trail">${trail.join("")}</ol>${STEPS[step].draw(result, data)}`;
  },
  describe: (result, { word, step }, data) => `“${data.words[word]}”, step ${step + 1}, ${STEPS[step].name}. ${STEPS[step].tell(result, data)}`,
};
