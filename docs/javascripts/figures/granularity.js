// Fine-grained experts: one layer cut into more, narrower experts at the same parameters and the same computation.
import { fixed, range, sum } from "../core.js";

/** log10 of n over k. */
export const logChoose = (n, k) => sum(range(k).map((i) => Math.log10((n - i) / (i + 1))));

export function compute({ logCut, shared, tokens }, { experts, topK, width, dModel }) {
  const cut = 2 ** logCut;
  const narrow = width / cut;
  const routed = experts * cut - shared;
  const chosen = topK * cut - shared;
  const ffn = 3 * dModel * narrow;
  return {
    routed,
    chosen,
    narrow,
    logCombinations: logChoose(routed, chosen),
    total: (routed + shared) * ffn + routed * dModel,
    active: (chosen + shared) * ffn + routed * dModel,
    router: routed * dModel,
    rowBytes: chosen * dModel * 2,
    tokensPerExpert: (tokens * chosen) / routed,
  };
}

const millions = (count) => fixed(count / 1e6, 1);

/** Ten to this power as a sentence says it: 120, or about 10¹⁴. */
const spoken = (power) => (power < 6 ? Math.round(10 ** power).toLocaleString("en") : `about 10${[...fixed(power, 0)].map((digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]).join("")}`);
const written = (power) => (power < 6 ? spoken(power) : `≈ 10<sup>${fixed(power, 0)}</sup>`);

const drawing = ({ routed, chosen }, { shared }) => {
  const all = routed + shared;
  const columns = Math.min(all, 32);
  const rows = Math.ceil(all / columns);
  const step = 360 / columns;
  const height = rows > 1 ? step : 28;
  const box = (i) => {
    const kind = i < shared ? "moe-fill moe-e1" : i < shared + chosen ? "moe-fill moe-e0" : "moe-slot";
    return `<rect class="${kind}" x="${((i % columns) * step + 1).toFixed(2)}" y="${(Math.floor(i / columns) * height + 1).toFixed(2)}" width="${(step - 2).toFixed(2)}" height="${(height - 2).toFixed(2)}" rx="1.5"/>`;
  };
  return `<svg viewBox="0 0 360 ${Math.max(30, Math.ceil(rows * height))}" aria-hidden="true">${range(all).map(box).join("")}</svg>
<p class="moe-note"><span class="moe-e0">■</span> chosen by one token${shared ? ' · <span class="moe-e1">■</span> shared, met by every token' : ""} · □ not met</p>`;
};

export default {
  title: "The same layer, cut finer",
  defaults: () => ({ logCut: 0, shared: 0, tokens: 1024 }),
  valid: ({ logCut, shared }, { topK }) => [0, 1, 2, 3].includes(logCut) && shared >= 0 && shared < topK * 2 ** logCut,
  controls: ({ topK }, { logCut }) => [
    { key: "logCut", label: "Each expert cut into", min: 0, max: 3, step: 1, show: (value) => String(2 ** value), set: (old, value) => ({ ...old, logCut: value, shared: Math.min(old.shared, topK * 2 ** value - 1) }) },
    { key: "shared", label: "Of them shared", min: 0, max: Math.min(4, topK * 2 ** logCut - 1), step: 1 },
    { key: "tokens", label: "Tokens in the batch", options: [[16, "16"], [128, "128"], [1024, "1024"], [4096, "4096"]] },
  ],
  compute,
  picture: (result, state) => {
    const rows = [
      ["routed experts, chosen", `${result.routed}, ${result.chosen}`],
      ["width of one", result.narrow],
      ["combinations a token can choose", written(result.logCombinations)],
      ["parameters stored, 10⁶", millions(result.total)],
      ["parameters met by a token, 10⁶", millions(result.active)],
      ["of them the router, 10⁶", fixed(result.router / 1e6, 2)],
      ["rows sent for one token, KB", fixed(result.rowBytes / 1e3, 0)],
      ["tokens for one expert on average", fixed(result.tokensPerExpert, 1)],
    ];
    return `${drawing(result, state)}<div class="moe-scroll"><table class="moe-grid"><tbody>${rows.map(([name, value]) => `<tr><th scope="row">${name}</th><td>${value}</td></tr>`).join("")}</tbody></table></div>`;
  },
  describe: (result, { shared, tokens }) => `${result.chosen} of ${result.routed} experts of width ${result.narrow}${shared ? ` and ${shared} shared` : ""}: ${spoken(result.logCombinations)} combinations; a token meets ${millions(result.active)} of ${millions(result.total)} million parameters. Of ${tokens} tokens an expert gets ${fixed(result.tokensPerExpert, 1)} on average.`,
};
