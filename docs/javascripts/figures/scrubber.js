// Specialization scrubber: a committed training run, checkpoint by checkpoint; which experts the bytes of a domain go to, and what that tells.
import { escapeHtml, fixed, maxViolation, mean, range } from "../core.js";

const LABELS = ["domain", "byte", "position"];
const layerOf = ({ run, layer, checkpoint }, { runs }) => runs[run].checkpoints[checkpoint].layers[layer];

/** How much more of an expert's work a domain is than an even mix: 1 where the expert does not tell domains apart, 0 where it has no work. */
const lifts = (share) => {
  const overall = mean(share);
  return share.map((row) => row.map((s, e) => (overall[e] > 0 ? s / overall[e] : 0)));
};

const best = (lift, e) => range(lift.length).reduce((top, v) => (lift[v][e] > lift[top][e] ? v : top), 0);

export function compute(state, data) {
  const { share, told } = layerOf(state, data);
  const lift = lifts(share);
  const all = data.runs[state.run].checkpoints.map((_, checkpoint) => layerOf({ ...state, checkpoint }, data).told);
  return {
    share, lift, violation: maxViolation(mean(share)),
    favourite: range(share[0].length).map((e) => best(lift, e)),
    curve: all.map((row) => row.map(([information, chance]) => information - chance)),
    band: all.map(([[, chance, high]]) => high - chance),
    p: told.map(([, , , p]) => p),
  };
}

function chart({ curve, band }, { checkpoint }, steps) {
  const top = Math.max(0.1, ...curve.flat(), ...band);
  const x = (i) => 34 + (272 * i) / Math.max(1, steps.length - 1);
  const y = (v) => 150 - (128 * Math.max(v, 0)) / top;
  const path = (row) => row.map((v, i) => `${i ? "L" : "M"}${x(i).toFixed(1)} ${y(v).toFixed(1)}`).join("");
  const lines = LABELS.map((_, k) => `<path class="moe-curve moe-e${k}" d="${path(curve.map((row) => row[k]))}"/>`);
  const last = curve.at(-1);
  // Labels at the line's end, pushed apart so that none covers another.
  const places = range(LABELS.length).sort((a, b) => y(last[a]) - y(last[b]));
  const heights = [];
  places.forEach((k, i) => { heights[k] = Math.max(y(last[k]) + 4, i ? heights[places[i - 1]] + 13 : 0); });
  const over = Math.max(0, Math.max(...heights) - 156);
  const names = LABELS.map((_, k) => `<text class="moe-small moe-fill moe-e${k}" x="${x(steps.length - 1) + 6}" y="${(heights[k] - over).toFixed(1)}">${LABELS[k]}</text>`);
  const ticks = [0, top / 2, top].map((v) => `<line class="moe-axis" x1="34" x2="${x(steps.length - 1)}" y1="${y(v).toFixed(1)}" y2="${y(v).toFixed(1)}"/><text class="moe-small" x="28" y="${(y(v) + 4).toFixed(1)}" text-anchor="end">${fixed(v, 2)}</text>`);
  const under = steps.map((step, i) => `<text class="moe-small${i === checkpoint ? " moe-strong" : ""}" x="${x(i).toFixed(1)}" y="168" text-anchor="middle">${step}</text>`);
  return `<svg viewBox="0 0 372 190" aria-hidden="true">${ticks.join("")}<line class="moe-slot" x1="${x(checkpoint).toFixed(1)}" x2="${x(checkpoint).toFixed(1)}" y1="16" y2="154"/>
<path class="moe-curve moe-e0" stroke-dasharray="2 4" d="${path(band)}"/>${lines.join("")}${names.join("")}${under.join("")}<text class="moe-small" x="34" y="11">bits that the expert tells about a label, beyond chance</text><text class="moe-small" x="34" y="185">training step; dotted: what chance reaches for the domain</text></svg>`;
}

const percent = (share) => `${Math.round(100 * share)}`;

export default {
  title: "Who goes where, while it learns",
  defaults: ({ runs }) => ({ checkpoint: runs[0].checkpoints.length - 1, layer: runs[0].checkpoints[0].layers.length - 1, run: 0 }),
  valid: ({ run, layer, checkpoint }, { runs }) => runs[run]?.checkpoints[checkpoint]?.layers[layer] !== undefined,
  controls: ({ runs }) => [
    { key: "checkpoint", label: "Training step", min: 0, max: runs[0].checkpoints.length - 1, step: 1, show: (i) => String(runs[0].checkpoints[i].step) },
    { key: "layer", label: "Layer", options: runs[0].checkpoints[0].layers.map((_, layer) => [layer, layer ? `${layer} (upper)` : `${layer} (lower)`]) },
    { key: "run", label: "Seed", options: runs.map(({ seed }, i) => [i, String(seed)]) },
  ],
  compute,
  picture({ share, lift, favourite, ...rest }, state, { domains, runs }) {
    const most = Math.max(...share.flat());
    const head = range(share[0].length).map((e) => `<th scope="col">${e + 1}</th>`).join("");
    const rows = share.map((row, v) => `<tr><th scope="row">${escapeHtml(domains[v])}</th>${row
      .map((s, e) => `<td style="background:color-mix(in srgb,var(--moe-0) ${((28 * s) / most).toFixed(1)}%,transparent)${favourite[e] === v && lift[v][e] > 1.5 ? ";font-weight:700" : ""}">${percent(s)}</td>`).join("")}</tr>`);
    const steps = runs[state.run].checkpoints.map(({ step }) => step);
    return `<div class="moe-scroll"><table class="moe-grid"><thead><tr><th scope="col">% to expert</th>${head}</tr></thead><tbody>${rows.join("")}</tbody></table></div>
<p class="moe-note">the share of a domain's assignments that each expert gets; bold: more than half as much again as in all text</p>${chart(rest, state, steps)}`;
  },
  describe({ lift, curve, p, violation }, state, { domains, runs }) {
    const { step } = runs[state.run].checkpoints[state.checkpoint];
    const told = LABELS.map((label, k) => `${fixed(curve[state.checkpoint][k], 3)} about the ${label} (p = ${fixed(p[k], 3)})`).join(", ");
    const own = domains.map((domain, v) => {
      const experts = range(lift[v].length).filter((e) => lift[v][e] > 1.5).map((e) => e + 1);
      return `${domain}: ${experts.length ? experts.join(", ") : "none"}`;
    });
    return `Step ${step}. Bits beyond chance: ${told}. Experts with more than half as much again of a domain: ${own.join("; ")}. MaxVio ${fixed(violation)}.`;
  },
};
