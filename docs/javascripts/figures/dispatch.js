// Dispatch and combine: tokens left, rows in expert order, tokens right; and what the same costs with padded slots.
import { assignments, escapeHtml, fixed, range, route } from "../core.js";

export function compute({ pull, factor }, { logits, pulled, topK: count }) {
  const { expert, gate, keep, load, capacity } = route(logits.map((row) => row.map((z, e) => (e === pulled ? z + pull : z))), count, factor);
  const all = assignments(expert);
  const list = all.filter(({ token, slot }) => keep[token][slot]);
  const rows = range(load.length).flatMap((e) => list.filter((one) => one.expert === e)); // a stable sort
  const bounds = range(load.length + 1).map((e) => rows.filter((one) => one.expert < e).length);
  const slots = load.length * capacity;
  return {
    list, rows, bounds, load, capacity, slots,
    token: rows.map((row) => row.token), slot: rows.map((row) => row.slot), gate: rows.map(({ token, slot }) => gate[token][slot]),
    dropped: all.filter(({ token, slot }) => !keep[token][slot]),
    integers: 2 * rows.length + bounds.length, padding: slots - rows.length, entries: all.length * slots,
  };
}

const [LIST, , EXPERTS, COMBINE] = range(4);
const STEPS = ["the list", "sort", "experts", "combine"];
const VIEWS = { sort: "the sort", einsum: "the einsum" };
const X = { tokens: 48, left: 118, right: 242, after: 312 };
const [ROW, HEAD, TOP] = [16, 17, 4];

/** Boxes from top to bottom: each is an expert's name, a row, or an empty slot. */
function boxes({ list, rows, bounds, capacity }, { step, view }, experts) {
  if (step === LIST) return [{ name: "token by token", size: HEAD }, ...list.map((row) => ({ row, size: ROW }))];
  return experts.flatMap((text, e) => {
    const own = rows.slice(bounds[e], bounds[e + 1]);
    const places = view === "einsum" ? capacity : own.length;
    const where = view === "einsum" ? `${own.length} of ${capacity} slots` : own.length ? `rows ${bounds[e]} to ${bounds[e + 1] - 1}` : `no rows, bounds ${bounds[e]}, ${bounds[e]}`;
    return [{ name: `${text}: ${where}`, size: HEAD }, ...range(places).map((i) => ({ row: own[i], expert: e, size: ROW }))];
  });
}

const copy = ({ token, slot }, words) => `${escapeHtml(words[token])}${slot ? "²" : "¹"}`;

function box({ name, row, expert }, y, { step }, words) {
  if (name) return `<text class="moe-small" x="${X.left}" y="${y + 13}">${escapeHtml(name)}</text>`;
  const kind = row ? `moe-e${row.expert} ${step >= EXPERTS ? "moe-fill" : "moe-outline"}` : `moe-e${expert} moe-outline moe-blank`;
  const text = row ? copy(row, words) : step >= EXPERTS ? "0, multiplied too" : "0";
  return `<rect class="${kind}" x="${X.left}" y="${y + 1}" width="${X.right - X.left}" height="${ROW - 2}" rx="2"/><text class="moe-small${row && step >= EXPERTS ? " moe-on" : ""}" x="${(X.left + X.right) / 2}" y="${y + 12}" text-anchor="middle">${text}</text>`;
}

function drawing(result, state, { words, experts }) {
  const all = boxes(result, state, experts);
  const tops = [];
  all.reduce((y, { size }, i) => { tops[i] = y; return y + size; }, TOP);
  const most = state.view === "einsum" ? result.slots : result.rows.length;
  const height = TOP + most * ROW + experts.length * HEAD;
  const wordY = (t) => TOP + HEAD + (t * (height - TOP - 2 * HEAD)) / (words.length - 1);
  const dim = (token, passed) => ((state.word < 0 ? passed : token !== state.word) ? " moe-dim" : "");
  const lines = all.flatMap(({ row }, i) => {
    if (!row) return [];
    const [y, own] = [tops[i] + ROW / 2, `moe-line moe-e${row.expert}`];
    const gate = result.gate[result.rows.indexOf(row)];
    const there = `<line class="${own}${dim(row.token, state.step === COMBINE)}" x1="${X.tokens}" y1="${wordY(row.token).toFixed(1)}" x2="${X.left}" y2="${y}" stroke-width="1.5"/>`;
    const back = `<line class="${own}${dim(row.token, false)}" x1="${X.right}" y1="${y}" x2="${X.after}" y2="${wordY(row.token).toFixed(1)}" stroke-width="${(0.5 + 5 * gate).toFixed(1)}"/>`;
    return state.step === COMBINE ? [there, back] : [there];
  });
  const names = words.flatMap((text, t) => {
    const [kind, y] = [t === state.word ? "moe-strong" : "", (wordY(t) + 4).toFixed(1)];
    const before = `<text class="${kind}" x="${X.tokens - 4}" y="${y}" text-anchor="end">${escapeHtml(text)}</text>`;
    return state.step === COMBINE ? [before, `<text class="${kind}" x="${X.after + 4}" y="${y}">${escapeHtml(text)}</text>`] : [before];
  });
  return `<svg viewBox="0 0 360 ${height + 4}" aria-hidden="true">${lines.join("")}${all.map((one, i) => box(one, tops[i], state, words)).join("")}${names.join("")}</svg>`;
}

function table({ rows, bounds, capacity, slots, padding, integers, entries }) {
  const lines = [
    ["rows that experts multiply", rows.length, slots],
    ["of them padding", 0, padding],
    ["an expert's rows begin at", bounds.slice(0, -1).join(", "), range(bounds.length - 1).map((e) => e * capacity).join(", ")],
    ["numbers that say whose a row is", integers, entries],
  ];
  return `<div class="moe-scroll"><table class="moe-grid"><thead><tr><th scope="col"></th>${Object.values(VIEWS).map((text) => `<th scope="col">${text}</th>`).join("")}</tr></thead><tbody>${lines.map(([text, ...cells]) => `<tr><th scope="row">${text}</th>${cells.map((cell) => `<td>${cell}</td>`).join("")}</tr>`).join("")}</tbody></table></div>`;
}

const sizes = ({ bounds }) => range(bounds.length - 1).map((e) => bounds[e + 1] - bounds[e]).join(", ");

const TOLD = [
  { sort: ({ rows }) => `${rows.length} kept assignments, token by token.`, einsum: ({ rows }) => `${rows.length} kept assignments, token by token.` },
  { sort: ({ bounds }) => `Sorted by expert; the bounds are ${bounds.join(", ")}.`, einsum: ({ capacity, slots, padding }) => `${capacity} slots for each expert, ${padding} of ${slots} empty.` },
  { sort: (result) => `The experts multiply ${sizes(result)} rows.`, einsum: ({ capacity, padding }) => `Every expert multiplies ${capacity} rows; ${padding} of all are zeros.` },
  { sort: () => "Each word adds up its rows, weighted with their gates.", einsum: () => "Each word adds up its rows, weighted with their gates; empty slots have none." },
];

/** Where a row stands in what is drawn. */
const PLACES = {
  list: ({ list, rows }, n) => `entry ${list.indexOf(rows[n])}`,
  sort: (_, n) => `row ${n}`,
  einsum: ({ rows, bounds }, n, experts) => `slot ${n - bounds[rows[n].expert]} of ${experts[rows[n].expert]}`,
};

function followed(result, { step, view, word }, { words, experts }) {
  const own = range(result.rows.length).filter((n) => result.token[n] === word);
  if (!own.length) return ` “${words[word]}” has no row, so it gets 0.`;
  const place = PLACES[step === LIST ? "list" : view];
  return ` “${words[word]}” is ${own.map((n) => `${place(result, n, experts)} with gate ${fixed(result.gate[n], 3)}`).join(" and ")}.`;
}

const CAPACITIES = [[0, "none: nobody is dropped"], [0.5, "factor ½"], [1, "factor 1"], [1.5, "factor 1.5"], [2, "factor 2"]];

export default {
  title: "There and back: a permutation",
  defaults: () => ({ step: COMBINE, view: "sort", word: -1, pull: 0, factor: 1 }),
  valid: ({ step, view, word, pull, factor }, { words }) => STEPS[step] !== undefined && view in VIEWS && (word === -1 || words[word] !== undefined) && Math.abs(pull) <= 4 && CAPACITIES.some(([one]) => one === factor),
  controls: ({ words, experts, pulled }) => [
    { key: "step", label: "Step", min: 0, max: STEPS.length - 1, step: 1, show: (value) => `${value + 1} of ${STEPS.length}: ${STEPS[value]}` },
    { key: "pull", label: `Pull to “${experts[pulled]}”`, min: -4, max: 4, step: 1, show: (value) => fixed(value, 0) },
    { key: "factor", label: "Capacity", options: CAPACITIES },
    { key: "view", label: "Seen as", options: Object.entries(VIEWS) },
    { key: "word", label: "Follow", options: [[-1, "all words"], ...words.map((text, t) => [t, `${t + 1} ${text}`])] },
  ],
  compute,
  picture: (result, state, data) => `${drawing(result, state, data)}
<p class="moe-line-of"><strong>Dropped</strong> ${result.dropped.map((one) => `<span class="moe-chip moe-lost">${copy(one, data.words)}</span>`).join("") || "nobody"}</p>${table(result)}`,
  describe(result, state, data) {
    const { rows, slots, padding, integers, entries, dropped } = result;
    const lost = dropped.map((one) => `“${data.words[one.token]}” for ${data.experts[one.expert]}`).join(", ");
    return `${TOLD[state.step][state.view](result)}${state.word < 0 ? "" : followed(result, state, data)} Sort: ${rows.length} rows, ${integers} integers. Einsum: ${slots} rows, ${padding} of them padding, ${entries} entries.${lost ? ` Dropped: ${lost}.` : ""}`;
  },
};
