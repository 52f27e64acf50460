// The reference's arithmetic for figures: pure functions over arrays, compared with Python's results by the tests.

export const softmax = (row) => {
  const peak = Math.max(...row);
  const exp = row.map((z) => Math.exp(z - peak));
  const total = sum(exp);
  return exp.map((v) => v / total);
};

export const sigmoid = (row) => row.map((z) => 1 / (1 + Math.exp(-z)));

export const sum = (row) => row.reduce((a, b) => a + b, 0);

export const range = (n) => Array.from({ length: n }, (_, i) => i);

/** Ids of the `count` highest values, best first, ties to the lowest id. */
export const topK = (row, count) => range(row.length).sort((a, b) => row[b] - row[a] || a - b).slice(0, count);

/** Gates of the chosen scores that sum to 1. */
export const bySum = (chosen) => {
  const total = sum(chosen);
  return chosen.map((s) => s / total);
};

const dot = (a, b) => sum(a.map((v, i) => v * b[i]));

const softmaxBackward = (dout, out) => {
  const mean = dot(dout, out);
  return out.map((s, e) => s * (dout[e] - mean));
};

/** Score functions: logits → scores, and (dscores, scores) → dlogits. */
export const SCORES = {
  softmax: { forward: softmax, backward: softmaxBackward },
  sigmoid: { forward: sigmoid, backward: (dscores, scores) => scores.map((s, e) => dscores[e] * s * (1 - s)) },
  identity: { forward: (row) => row, backward: (dscores) => dscores },
};

/** Normalizers: chosen scores → gates, and (dgate, gate, chosen scores) → dchosen. */
export const NORMALIZERS = {
  none: { forward: (chosen) => chosen, backward: (dgate) => dgate },
  sum: {
    forward: bySum,
    backward: (dgate, gate, chosen) => {
      const [mean, total] = [dot(dgate, gate), sum(chosen)];
      return dgate.map((d) => (d - mean) / total);
    },
  },
  softmax: { forward: softmax, backward: softmaxBackward },
};

export const capacityPerAssignment = (factor, topK, tokens, experts) => Math.ceil((factor * topK * tokens) / experts - 1e-9);

/** Assignments [token, slot] in the order in which they are served. */
export const ORDERS = {
  choice_major: (tokens, slots) => range(slots).flatMap((slot) => range(tokens).map((token) => [token, slot])),
  token_major: (tokens, slots) => range(tokens).flatMap((token) => range(slots).map((slot) => [token, slot])),
};

/** Who is served in which order, with the place in the expert's queue and whether it lies within the capacity. */
export const serve = (expert, experts, capacity, order) => {
  const queue = new Array(experts).fill(0);
  return ORDERS[order](expert.length, expert[0]?.length ?? 0).map(([token, slot]) => {
    const e = expert[token][slot];
    const position = queue[e]++;
    return { token, slot, expert: e, position, keep: position < capacity };
  });
};

export const countLoad = (expert, experts) => {
  const load = new Array(experts).fill(0);
  for (const row of expert) for (const e of row) load[e] += 1;
  return load;
};

/** Softmax, top-K, gates by sum, and who finds room; without a factor there is as much as the busiest expert needs. */
export const route = (logits, count, factor, order = "choice_major") => {
  const [T, E] = [logits.length, logits[0].length];
  const scores = logits.map(softmax);
  const expert = scores.map((row) => topK(row, count));
  const load = countLoad(expert, E);
  const capacity = factor ? capacityPerAssignment(factor, count, T, E) : Math.max(...load);
  const served = serve(expert, E, capacity, order);
  const keep = expert.map((row) => row.map(() => false));
  for (const one of served) keep[one.token][one.slot] = one.keep;
  const gate = scores.map((row, t) => bySum(expert[t].map((e) => row[e])).map((g, k) => (keep[t][k] ? g : 0)));
  return { scores, expert, gate, keep, load, capacity, served };
};

/** Every assignment in token order. */
export const assignments = (expert) => expert.flatMap((row, token) => row.map((e, slot) => ({ token, slot, expert: e })));

export const mean = (rows) => rows[0].map((_, e) => sum(rows.map((row) => row[e])) / rows.length);

export const maxViolation = (load) => {
  const average = sum(load) / load.length;
  return average > 0 ? Math.max(...load) / average - 1 : 0;
};

/** As a page prints it; what is rounded to 0 has no sign. */
export const fixed = (value, digits = 2) => value.toFixed(digits).replace(/^-(?=[0.]*$)/, "").replace("-", "−");

export const escapeHtml = (text) => String(text).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
