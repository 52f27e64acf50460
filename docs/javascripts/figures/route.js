// Route eight tokens: the running example with its logits in the reader's hand.
import { escapeHtml, fixed, range, route } from "../core.js";

const replaceAt = (row, index, value) => row.map((old, i) => (i === index ? value : old));

export const compute = ({ logits, topK: count, factor, order }, { words, experts }) =>
  route(words.map((_, t) => logits.slice(t * experts.length, (t + 1) * experts.length)), count, factor, order);

const ROW = 30;
const X = { word: 78, expert: 230, slot: 236 };

function picture({ expert, gate, keep, load, capacity, served }, { word }, { words, experts }) {
  const rowY = (t) => 22 + t * ROW;
  const expertY = (e) => 36 + e * 60;
  const slots = Math.max(capacity, ...load);
  const step = Math.min(15, 116 / slots);
  const lines = expert.flatMap((row, t) => row.map((e, k) => {
    const kind = keep[t][k] ? `moe-e${e}` : "moe-dropped";
    const dim = t === word ? "" : " moe-dim";
    return `<line class="moe-line ${kind}${dim}" x1="${X.word}" y1="${rowY(t)}" x2="${X.expert}" y2="${expertY(e)}" stroke-width="${keep[t][k] ? (1 + 5 * gate[t][k]).toFixed(1) : 1.5}"/>`;
  }));
  const names = words.map((text, t) => `<text class="${t === word ? "moe-strong" : ""}" x="${X.word - 8}" y="${rowY(t) + 5}" text-anchor="end">${escapeHtml(text)}</text>`);
  const boxes = experts.flatMap((text, e) => {
    const places = range(slots).map((i) => {
      const holder = served.find((one) => one.expert === e && one.position === i);
      const kind = i < capacity ? (holder ? `moe-fill moe-e${e}` : "moe-slot") : holder ? "moe-over" : "moe-none";
      return `<rect class="${kind}" x="${(X.slot + i * step).toFixed(1)}" y="${expertY(e) - 6}" width="${(step - 2).toFixed(1)}" height="13" rx="2"/>`;
    });
    return [`<text class="moe-small" x="${X.slot}" y="${expertY(e) - 12}">${escapeHtml(text)} · load ${load[e]}</text>`, ...places];
  });
  return `<svg viewBox="0 0 360 ${rowY(words.length - 1) + 20}" aria-hidden="true">${lines.join("")}${names.join("")}${boxes.join("")}</svg>
${table({ expert, gate, keep }, word, words, experts)}`;
}

function table({ expert, gate, keep }, word, words, experts) {
  const cells = (t) => experts.map((_, e) => {
    const slot = expert[t].indexOf(e);
    if (slot < 0) return "<td></td>";
    return keep[t][slot] ? `<td class="moe-e${e}">${fixed(gate[t][slot], 3)}</td>` : '<td class="moe-lost">dropped</td>';
  });
  const rows = words.map((text, t) => `<tr${t === word ? ' class="moe-row"' : ""}><th scope="row"><button type="button" data-set="word=${t}">${escapeHtml(text)}</button></th>${cells(t).join("")}</tr>`);
  return `<div class="moe-scroll"><table class="moe-grid"><thead><tr><th scope="col">gates</th>${experts.map((text) => `<th scope="col">${escapeHtml(text)}</th>`).join("")}</tr></thead><tbody>${rows.join("")}</tbody></table></div>`;
}

export default {
  title: "Route eight tokens",
  defaults: ({ logits }) => ({ word: 2, topK: 2, factor: 1, order: "choice_major", logits: logits.flat() }),
  valid: ({ word, topK: count, order }, { words, experts }) => words[word] !== undefined && count >= 1 && count <= experts.length && order in { choice_major: 1, token_major: 1 },
  controls: ({ words, experts }, state) => [
    { key: "word", label: "Word", options: words.map((text, t) => [t, `${t + 1} ${text}`]) },
    { key: "topK", label: "Experts per token, K", min: 1, max: experts.length, step: 1 },
    { key: "factor", label: "Capacity factor", min: 0.25, max: 2, step: 0.25, show: (value) => fixed(value, 2) },
    { key: "order", label: "Served first", options: [["choice_major", "all first choices"], ["token_major", "earlier words"]] },
    ...experts.map((text, e) => ({
      key: `z${e}`, label: `Logit of “${text}”`, min: -3, max: 3, step: 0.1,
      get: ({ logits, word }) => logits[word * experts.length + e],
      set: (old, value) => ({ ...old, logits: replaceAt(old.logits, old.word * experts.length + e, value) }),
      show: (value) => fixed(value, 1),
    })),
  ],
  compute,
  picture,
  describe({ expert, gate, keep, load, capacity }, { word }, { words, experts }) {
    const parts = expert[word].map((e, k) => (keep[word][k] ? `${experts[e]} with gate ${fixed(gate[word][k], 3)}` : `${experts[e]}, which is full and drops it`));
    const dropped = keep.flat().filter((kept) => !kept).length;
    return `“${words[word]}” goes to ${parts.join(", then ")}. Capacity ${capacity}, load ${load.join(", ")}, ${dropped} dropped.`;
  },
};
