// The ladder: what a rung launches, multiplies, moves and saves beside the rung before it, counted on layers with even and uneven loads.
import { escapeHtml, fixed, sum } from "../core.js";

const layerOf = ({ load, experts }, { layers }) => layers[`${load}-${experts}`];

export function compute(state, data) {
  const { rows, [state.part]: rungs } = layerOf(state, data);
  const [before, now] = [rungs[Math.max(state.rung - 2, 0)], rungs[state.rung - 1]];
  const wanted = sum(rows);
  const fewest = Math.min(...rungs.map(({ costs }) => costs[1]));
  const named = ({ launched }) => launched.map(([name, times]) => [data.names[name], times]);
  const launched = named(now);
  return {
    rows, launched, before: before.costs, now: now.costs,
    changes: now.costs.map((cost, i) => Math.sign(cost - before.costs[i])),
    // Each row costs the same FLOPs, so what is above the fewest is for rows that nobody asked for.
    padding: Math.round((wanted * now.costs[1]) / fewest) - wanted,
    gone: named(before).map(([name]) => name).filter((name) => !launched.some(([other]) => other === name)),
    apart: now.products >= rows.length,
  };
}

const COSTS = [
  { name: "launches", show: String },
  { name: "10⁶ FLOPs", show: (count) => fixed(count / 1e6, 1) },
  { name: "MB moved", show: (count) => fixed(count / 1e6, 2) },
  { name: "MB saved", more: " for the backward", show: (count) => fixed(count / 1e6, 2) },
];
const VERDICTS = {
  "-1": ["moe-e2", (before, now) => `↓ falls, ÷ ${fixed(before / now, 1)}`],
  0: ["", () => "= stays"],
  1: ["moe-lost", (before, now) => `↑ rises, × ${fixed(now / before, 1)}`],
};
const PARTS = { forward: "Forward", backward: "Backward" };
const LOADS = { even: "even", skewed: "skewed", one_takes_all: "one expert in every choice" };

const CHART = { width: 120, height: 58, foot: 14 };

/** A cost of the rungs climbed so far; the scale is that of all layers, so that a change of layer is seen. */
function chart(i, { rung, ...state }, data) {
  const most = Math.max(...Object.values(data.layers).flatMap((layer) => layer[state.part].map(({ costs }) => costs[i])));
  const rungs = layerOf(state, data)[state.part];
  const step = CHART.width / rungs.length;
  const bars = rungs.map(({ costs }, n) => {
    const middle = (n + 0.5) * step;
    const number = `<text class="moe-small${n + 1 === rung ? " moe-strong" : ""}" x="${middle}" y="${CHART.height + CHART.foot - 2}" text-anchor="middle">${n + 1}</text>`;
    if (n >= rung) return `<text class="moe-small" x="${middle}" y="${CHART.height - 4}" text-anchor="middle">?</text>${number}`;
    const height = Math.max(1.5, (CHART.height * costs[i]) / most);
    return `<rect class="moe-e0 ${n + 1 === rung ? "moe-fill" : "moe-outline"}" x="${(middle - 0.36 * step).toFixed(1)}" y="${(CHART.height - height).toFixed(1)}" width="${(0.72 * step).toFixed(1)}" height="${height.toFixed(1)}"/>${number}`;
  });
  return `<svg viewBox="0 -2 ${CHART.width} ${CHART.height + CHART.foot + 2}" aria-hidden="true">${bars.join("")}</svg>`;
}

const card = ({ before, now, changes }, state, data) => ({ name, show }, i) => {
  const [kind, verdict] = VERDICTS[changes[i]];
  const first = state.rung === 1;
  return `<div class="moe-card"><strong>${name}</strong>
<div>${first ? "" : `${show(before[i])} → `}<strong>${show(now[i])}</strong></div>
<div class="${first ? "" : kind}">${first ? "the first rung" : verdict(before[i], now[i])}</div>${chart(i, state, data)}</div>`;
};

const BOX = { width: 360, height: 80 };
const HATCH = '<pattern id="moe-hatch" class="moe-lost" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><path d="M0 0V5" stroke="currentcolor" stroke-width="3"/></pattern>';

/** What is multiplied: a column for each expert, its rows filled, padding hatched; a frame is one product. */
function boxes({ rows, padding, apart }, data) {
  const tallest = Math.max(...Object.values(data.layers).flatMap((layer) => layer.rows));
  const step = BOX.width / rows.length;
  const tall = (count) => (BOX.height * count) / tallest;
  const top = Math.max(...rows);
  const column = (count, e) => {
    const [x, width] = [(e * step + (apart ? 2 : 0)).toFixed(1), step - (apart ? 4 : 0)];
    const place = (y, height, kind) => `<rect class="${kind}" x="${x}" y="${y.toFixed(1)}" width="${width.toFixed(1)}" height="${height.toFixed(1)}"/>`;
    const own = place(BOX.height - tall(count), tall(count), "moe-rows");
    return padding ? place(BOX.height - tall(top), tall(top - count), "moe-padding") + own : own;
  };
  const outline = (from, to, height) => `M${from.toFixed(1)} ${BOX.height}V${(BOX.height - tall(height)).toFixed(1)}H${to.toFixed(1)}V${BOX.height}`;
  const steps = rows.map((count, e) => `V${(BOX.height - tall(count)).toFixed(1)}H${((e + 1) * step).toFixed(1)}`);
  const frames = apart
    ? rows.map((count, e) => `${outline(e * step + 2, (e + 1) * step - 2, count)}Z`).join("")
    : padding ? `${outline(0, BOX.width, top)}Z` : `M0 ${BOX.height}${steps.join("")}V${BOX.height}Z`;
  return `<svg class="moe-boxes" viewBox="-2 -2 ${BOX.width + 4} ${BOX.height + 4}" aria-hidden="true">${HATCH}${rows.map(column).join("")}<path class="moe-frame" d="${frames}"/></svg>
<p class="moe-note">the rows of ${rows.length} experts; a frame is what one product multiplies${padding ? "; hatched: zeros" : ""}</p>`;
}

const chips = (names, kind) => names.map((text) => `<span class="moe-chip ${kind}">${escapeHtml(text)}</span>`).join(" ");
const times = ([name, count]) => (count > 1 ? `${count} × ${name}` : name);

const told = ({ before, now, changes }) => {
  const moves = { "-1": "fall from", 1: "rise from" };
  return COSTS.map(({ name, more = "", show }, i) => (changes[i] ? `${name}${more} ${moves[changes[i]]} ${show(before[i])} to ${show(now[i])}` : `${name}${more} stay at ${show(now[i])}`)).join("; ");
};

export default {
  title: "Which cost falls, and which stays",
  defaults: ({ opening }) => ({ rung: 2, part: "forward", experts: opening.experts, load: opening.load }),
  valid: ({ rung, part, ...state }, data) => data.rungs[rung - 1] !== undefined && part in PARTS && layerOf(state, data) !== undefined,
  controls: ({ rungs, layers }) => [
    { key: "rung", label: "Rung", min: 1, max: rungs.length, step: 1, show: (n) => `${n} of ${rungs.length}: ${rungs[n - 1].name}` },
    { key: "part", label: "Pass", options: Object.entries(PARTS) },
    { key: "experts", label: "Experts, E", options: [...new Set(Object.values(layers).map(({ rows }) => rows.length))].sort((a, b) => a - b).map((count) => [count, String(count)]) },
    { key: "load", label: "Load", options: Object.entries(LOADS) },
  ],
  compute,
  picture: (result, state, data) => `${boxes(result, data)}<div class="moe-rungs">${COSTS.map(card(result, state, data)).join("")}</div>
<p class="moe-line-of moe-many"><strong>Launched</strong> ${chips(result.launched.map(times), "")}</p>
${result.gone.length ? `<p class="moe-line-of moe-many"><strong>No longer</strong> ${chips(result.gone, "moe-empty")}</p>` : ""}`,
  describe(result, { rung, part, experts, load }, { rungs }) {
    const { name, saves } = rungs[rung - 1];
    const costs = rung > 1 ? `After “${rungs[rung - 2].name}”: ${told(result)}.` : `The first rung: ${COSTS.map(({ name: cost, show }, i) => `${show(result.now[i])} ${cost}`).join(", ")}.`;
    const padded = result.padding ? ` ${result.padding} rows of zeros are multiplied beside the ${sum(result.rows)} that were asked for.` : "";
    return `Rung ${rung} of ${rungs.length}, ${name}, saves ${saves}. ${PARTS[part]} pass, ${experts} experts, load ${LOADS[load]}. ${costs}${padded}`;
  },
};
