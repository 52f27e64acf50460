// Tolerance lamp: which wrong answers a test would let through.
import { fixed, sum } from "../core.js";

const EPS = 2 ** -7; // bfloat16
const rms = (row) => Math.sqrt(sum(row.map((v) => v * v)) / row.length);
const largest = (row) => Math.max(...row.map(Math.abs));
const minus = (a, b) => a.map((v, i) => v - b[i]);
const swapped = (row, width) => [...row.slice(width, 2 * width), ...row.slice(0, width), ...row.slice(2 * width)];

const CANDIDATES = {
  honest: "computed in bfloat16",
  zero: "all zeros",
  negated: "the wrong sign",
  scaled: "4 % too large",
  swapped: "two rows swapped",
};

export function compute({ logSize, logAtol, rtol }, { truth, eager, honest, width }) {
  const size = 10 ** logSize;
  const scaled = (row, by = size) => row.map((v) => v * by);
  const y = scaled(truth);
  const candidates = { honest: scaled(honest), zero: scaled(y, 0), negated: scaled(y, -1), scaled: scaled(y, 1.04), swapped: swapped(y, width) };
  const error = minus(scaled(eager), y);
  const bound = { rms: 2 * rms(error) + (EPS / 4) * rms(y), max: y.map((v) => 2 * largest(error) + 4 * EPS * Math.max(rms(y), Math.abs(v))) };
  return Object.fromEntries(Object.entries(candidates).map(([name, candidate]) => {
    const wrong = minus(candidate, y);
    const allclose = wrong.every((v, i) => Math.abs(v) <= 10 ** logAtol + rtol * Math.abs(y[i]));
    return [name, { allclose, policy: rms(wrong) <= bound.rms && wrong.every((v, i) => Math.abs(v) <= bound.max[i]) }];
  }));
}

const lamp = (passes, honest) => `<td class="${passes === honest ? "moe-e2" : "moe-lost"}">${passes ? "passes" : "fails"}</td>`;

export default {
  title: "Would a zero pass?",
  defaults: () => ({ logSize: -3, logAtol: -2, rtol: 0.02 }),
  controls: () => [
    { key: "logSize", label: "Size of the outputs", min: -6, max: 1, step: 0.5, show: (value) => (10 ** value).toPrecision(2) },
    { key: "logAtol", label: "atol", min: -6, max: 0, step: 0.5, show: (value) => (10 ** value).toPrecision(2) },
    { key: "rtol", label: "rtol", min: 0, max: 0.1, step: 0.01, show: (value) => fixed(value, 2) },
  ],
  compute,
  picture: (result) => `<div class="moe-scroll"><table class="moe-grid"><thead><tr><th scope="col">the candidate</th><th scope="col">fixed atol, rtol</th><th scope="col">this site's policy</th></tr></thead><tbody>${Object.entries(result)
    .map(([name, one]) => `<tr><th scope="row">${CANDIDATES[name]}</th>${lamp(one.allclose, name === "honest")}${lamp(one.policy, name === "honest")}</tr>`).join("")}</tbody></table></div>`,
  describe(result) {
    const through = Object.keys(result).filter((name) => name !== "honest" && result[name].allclose).map((name) => CANDIDATES[name]);
    const one = through.length === 1;
    const others = !through.length ? ", and no wrong one passes" : result.honest.allclose ? `, and so ${one ? "does" : "do"} ${through.join(", ")}` : `, but ${through.join(", ")} ${one ? "passes" : "pass"}`;
    return `With this fixed tolerance the honest answer ${result.honest.allclose ? "passes" : "fails"}${others}. The policy accepts only the honest one.`;
  },
};
