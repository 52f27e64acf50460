// Who crosses to whom: words on their ranks, experts on theirs, and the bytes of the four all-to-alls.
import { assignments, escapeHtml, fixed, range, route, sum } from "../core.js";

/** Of `count` things in blocks of equal size, the rank that holds each. */
const blocks = (count, ranks) => range(count).map((i) => Math.floor((i * ranks) / count));

const matrix = (ranks, value) => range(ranks).map((i) => range(ranks).map((j) => value(i, j)));
const total = (rows) => sum(rows.map(sum));

export function compute({ ranks, topK: count, dModel, itemsize }, { logits, factor, gateBytes, codeBytes }) {
  const { expert, keep, capacity } = route(logits, count, factor);
  const home = blocks(logits.length, ranks);
  const owner = blocks(logits[0].length, ranks);
  const kept = assignments(expert).filter(({ token, slot }) => keep[token][slot]);
  // A line is a token and a rank that holds some of its experts: at home, or a crossing.
  const lines = range(logits.length).flatMap((token) => range(ranks).map((to) => ({
    token, from: home[token], to, experts: kept.filter((one) => one.token === token && owner[one.expert] === to).map((one) => one.expert),
  }))).filter((line) => line.experts.length);
  const crossing = lines.filter(({ from, to }) => from !== to);
  const between = (i, j) => crossing.filter(({ from, to }) => from === i && to === j);
  const [Q, A] = [(i, j) => between(i, j).length, (i, j) => sum(between(i, j).map((line) => line.experts.length))];
  const row = dModel * itemsize;
  return {
    capacity, home, owner, lines, kept: kept.length, dropped: expert.flat().length - kept.length,
    crossings: matrix(ranks, Q), copies: matrix(ranks, A),
    dispatch: matrix(ranks, (i, j) => Q(i, j) * row + A(i, j) * (gateBytes + codeBytes)),
    combine: matrix(ranks, (i, j) => Q(j, i) * row),
    combine_gradient: matrix(ranks, (i, j) => Q(i, j) * row),
    dispatch_gradient: matrix(ranks, (i, j) => Q(j, i) * row + A(j, i) * gateBytes),
    apart: total(matrix(ranks, A)) * (row + gateBytes + codeBytes),
  };
}

const WAYS = {
  dispatch: "dispatch: rows, gates, experts' ids",
  combine: "combine: rows",
  combine_gradient: "backward of combine: rows",
  dispatch_gradient: "backward of dispatch: rows, gates' gradients",
};
const BACK = { combine: true, dispatch_gradient: true };
const bytes = (count) => count.toLocaleString("en");

const X = { word: 104, left: 112, right: 236, expert: 246 };
const [STEP, GAP] = [23, 10];

/** Heights of things in blocks, a gap between two ranks. */
const heights = (rank, step, top) => rank.map((r, i) => top + i * step + r * GAP);

const frame = (r, own, x, width, half, label) => `<rect class="moe-outline moe-e${r}" x="${x}" y="${(own[0] - half).toFixed(1)}" width="${width}" height="${(own.at(-1) - own[0] + 2 * half).toFixed(1)}" rx="4"/><text class="moe-small" x="${x + 5}" y="${(own[0] - half + 13).toFixed(1)}">${label}</text>`;

function drawing({ home, owner, lines }, { ranks, way }, { words, experts }) {
  const wordY = heights(home, STEP, 20);
  const end = wordY.at(-1) + 12;
  const step = (end - 8 - (ranks - 1) * GAP) / experts.length;
  const expertY = heights(owner, step, 8 + step / 2);
  const frames = range(ranks).flatMap((r) => [
    frame(r, wordY.filter((_, t) => home[t] === r), 8, 104, 11.5, `rank ${r}`),
    frame(r, expertY.filter((_, e) => owner[e] === r), X.right, 116, step / 2, `rank ${r}`),
  ]);
  const middle = (line) => sum(line.experts.map((e) => expertY[e])) / line.experts.length;
  const drawn = lines.map((line) => {
    const kind = line.from === line.to ? "moe-home" : `moe-e${BACK[way] ? line.to : line.from}`;
    return `<line class="moe-line ${kind}" x1="${X.left}" y1="${wordY[line.token].toFixed(1)}" x2="${X.right}" y2="${middle(line).toFixed(1)}" stroke-width="${(1.5 * line.experts.length).toFixed(1)}"/>`;
  });
  const names = words.map((text, t) => `<text x="${X.word}" y="${(wordY[t] + 4).toFixed(1)}" text-anchor="end">${escapeHtml(text)}</text>`);
  const places = experts.map((text, e) => `<text x="${X.right + 108}" y="${(expertY[e] + 4).toFixed(1)}" text-anchor="end">${escapeHtml(text)}</text>`);
  return `<svg viewBox="0 0 360 ${Math.ceil(end + 4)}" aria-hidden="true">${frames.join("")}${drawn.join("")}${names.join("")}${places.join("")}</svg>
<p class="moe-note">solid: crosses, in the colour of the rank that sends; twice as thick for two experts; dashed: at home</p>`;
}

function table(result, { ranks, way }) {
  const rows = range(ranks).map((i) => `<tr><th scope="row">rank ${i} sends</th>${range(ranks).map((j) => {
    const count = BACK[way] ? result.crossings[j][i] : result.crossings[i][j];
    return i === j ? "<td>–</td>" : `<td>${bytes(result[way][i][j])}<span class="moe-note">${count} ${count === 1 ? "row" : "rows"}</span></td>`;
  }).join("")}</tr>`);
  return `<div class="moe-scroll"><table class="moe-grid"><thead><tr><th scope="col">bytes</th>${range(ranks).map((j) => `<th scope="col">to ${j}</th>`).join("")}</tr></thead><tbody>${rows.join("")}</tbody></table></div>`;
}

export default {
  title: "Who crosses to whom",
  defaults: ({ dModel, topK }) => ({ ranks: 2, topK, way: "dispatch", dModel, itemsize: 4 }),
  valid: ({ ranks, topK: count, way, dModel, itemsize }, { experts }) => [1, 2, 4].includes(ranks) && count >= 1 && count <= experts.length && way in WAYS && dModel > 0 && itemsize > 0,
  controls: ({ experts, dModel }) => [
    { key: "ranks", label: "Ranks, R", options: [1, 2, 4].map((n) => [n, String(n)]) },
    { key: "topK", label: "Experts per token, K", min: 1, max: experts.length, step: 1 },
    { key: "way", label: "All-to-all", options: Object.entries(WAYS) },
    { key: "dModel", label: "Model width, D", options: [[dModel, `${dModel}, as here`], [2048, "2048"], [7168, "7168"]] },
    { key: "itemsize", label: "Rows travel in", options: [[4, "fp32"], [2, "bf16"], [1, "fp8"]] },
  ],
  compute,
  picture: (result, state, data) => `${drawing(result, state, data)}${table(result, state)}`,
  describe({ kept, dropped, crossings, copies, apart, ...result }, { ranks, way }) {
    const [lines, away] = [total(crossings), total(copies)];
    const start = `${kept} kept assignments, ${dropped} dropped; ${away} of them are away from home and cross in ${lines} rows.`;
    if (!lines) return `${start} Nothing is sent.`;
    const saved = 100 * (1 - total(result.dispatch) / apart);
    return `${start} ${WAYS[way]}: ${bytes(total(result[way]))} bytes over ${ranks} ranks. A row for each assignment instead of each rank would make the dispatch ${bytes(apart)} bytes; this is ${fixed(saved, 0)} % less.`;
  },
};
