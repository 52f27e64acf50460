// From the gates back to the logits: what one token teaches the router, column by column.
import { NORMALIZERS, SCORES, escapeHtml, fixed, range, topK } from "../core.js";
import { ROUTERS } from "./gates.js";

export function compute({ word, topK: count, router, dgate: given }, { logits, experts }) {
  const { score, normalize } = ROUTERS[router];
  const scores = SCORES[score].forward(logits[word]);
  const expert = topK(scores, count);
  const chosen = expert.map((e) => scores[e]);
  const gate = NORMALIZERS[normalize].forward(chosen);
  const dgate = given.slice(0, count);
  const dscores = new Array(experts.length).fill(0);
  NORMALIZERS[normalize].backward(dgate, gate, chosen).forEach((d, k) => { dscores[expert[k]] = d; });
  return { scores, expert, gate, dgate, dscores, dlogits: SCORES[score].backward(dscores, scores) };
}

const COLUMNS = ["dgate", "dscores", "dlogits"];

/** The longest bar of each column over all settings, so that no bar is rescaled while a reader compares. The map is linear: corners suffice. */
function widest(data) {
  const most = Object.fromEntries(COLUMNS.map((name) => [name, 0]));
  for (const router of Object.keys(ROUTERS)) for (const word of range(data.words.length)) for (const count of [1, 2]) for (const dgate of [[1, 1], [1, -1]]) {
    const result = compute({ word, topK: count, router, dgate }, data);
    for (const name of COLUMNS) most[name] = Math.max(most[name], ...result[name].map(Math.abs));
  }
  return most;
}

/** What rounding leaves of a difference that is 0. */
const nothing = (value) => Math.abs(value) < 1e-12;
const said = (value) => (nothing(value) ? "0" : fixed(value, 3));

function signed(value, most) {
  const width = nothing(value) ? 0 : (50 * Math.abs(value)) / most;
  return `${said(value)}<div class="moe-signed"><div class="moe-bar" style="margin-left:${(value < 0 ? 50 - width : 50).toFixed(1)}%;width:${width.toFixed(1)}%"></div></div>`;
}

/** Where gradient descent moves a logit: against its gradient. */
const DESCENT = [["up", (d) => d < 0], ["down", (d) => d > 0]];
const descent = (d) => (nothing(d) ? "–" : DESCENT.find(([, holds]) => holds(d))[0]);

/** Why no logit learns anything. */
const idle = ({ dgate }) => {
  if (dgate.every(nothing)) return "the loss does not depend on these gates";
  return dgate.length === 1 ? "the only gate is 1 whatever the logits are" : "the gates sum to 1 whatever the logits are, and both experts would change the loss alike";
};

const slope = (k, ordinal) => ({
  key: `dg${k + 1}`, label: `${ordinal} dgate`, min: -1, max: 1, step: 0.1,
  get: ({ dgate }) => dgate[k],
  set: (old, value) => ({ ...old, dgate: old.dgate.map((d, i) => (i === k ? value : d)) }),
});

export default {
  title: "From the gates back to the logits",
  defaults: () => ({ word: 1, topK: 2, router: "sum", dgate: [-1, 0] }),
  valid: ({ word, topK: count, router, dgate }, { words }) => words[word] !== undefined && (count === 1 || count === 2) && router in ROUTERS && dgate.every((d) => Math.abs(d) <= 1),
  controls: (data, state) => {
    const { expert } = compute(state, data);
    const named = (k) => (value) => (k < expert.length ? `${data.experts[expert[k]]} ${fixed(value, 1)}` : "none");
    return [
      { key: "word", label: "Word", options: data.words.map((text, t) => [t, `${t + 1} ${text}`]) },
      { key: "router", label: "Router", options: Object.entries(ROUTERS).map(([name, { label }]) => [name, label]) },
      { key: "topK", label: "Experts per token, K", min: 1, max: 2, step: 1 },
      { ...slope(0, "First"), show: named(0) },
      { ...slope(1, "Second"), show: named(1) },
    ];
  },
  compute,
  picture({ expert, gate, dgate, dscores, dlogits }, _, data) {
    const most = widest(data);
    const rows = data.experts.map((text, e) => {
      const slot = expert.indexOf(e);
      const kind = slot < 0 ? "" : `moe-e${e}`;
      const cells = [slot < 0 ? "–" : signed(dgate[slot], most.dgate), signed(dscores[e], most.dscores), signed(dlogits[e], most.dlogits), descent(dlogits[e])];
      return `<tr><th scope="row" class="${kind}">${escapeHtml(text)}<span class="moe-note">${slot < 0 ? "not chosen" : `gate ${fixed(gate[slot], 3)}`}</span></th>${cells.map((cell) => `<td class="${kind}">${cell}</td>`).join("")}</tr>`;
    });
    const head = ["", "dgate", "dscore", "dlogit", "step"];
    return `<div class="moe-scroll"><table class="moe-grid moe-slopes"><thead><tr>${head.map((text) => `<th scope="col">${text}</th>`).join("")}</tr></thead><tbody>${rows.join("")}</tbody></table></div>
<p class="moe-note">a full bar: the largest value of the column over all settings; step: where gradient descent moves the logit</p>`;
  },
  describe({ expert, gate, dlogits, ...rest }, { word, topK: count, router }, { words, experts }) {
    const gates = expert.map((e, k) => `${experts[e]} with gate ${fixed(gate[k], 3)}`).join(", ");
    const start = `“${words[word]}”, ${ROUTERS[router].label}, K = ${count}: ${gates}.`;
    if (dlogits.every(nothing)) return `${start} Every logit gets 0: ${idle(rest)}. The task teaches the router nothing.`;
    const moved = DESCENT.map(([where, holds]) => [where, range(experts.length).filter((e) => !nothing(dlogits[e]) && holds(dlogits[e])).map((e) => experts[e])]).filter(([, names]) => names.length);
    return `${start} The gradient of the logits is ${experts.map((text, e) => `${text} ${said(dlogits[e])}`).join(", ")}. Gradient descent moves ${moved.map(([where, names]) => `${names.join(" and ")} ${where}`).join(", ")}.`;
  },
};
