// Each figure's compute() against what Python computed for the same states. GOLDEN names the file that Python wrote.
import assert from "node:assert";
import fs from "node:fs";
import test from "node:test";

import { address, html, move, stateOf } from "../../docs/javascripts/figure.js";

const same = (found, expected, where) => {
  if (Array.isArray(expected)) {
    assert.equal(found.length, expected.length, where);
    expected.forEach((value, i) => same(found[i], value, `${where}[${i}]`));
  } else if (expected !== null && typeof expected === "object") {
    for (const [key, value] of Object.entries(expected)) same(found[key], value, `${where}.${key}`);
  } else if (typeof expected === "number" && !Number.isInteger(expected)) {
    assert.ok(Math.abs(found - expected) <= 1e-12 * Math.max(1, Math.abs(expected)), `${where}: ${found} instead of ${expected}`);
  } else {
    assert.ok(found === expected || (typeof expected === "number" && Math.abs(found - expected) <= 1e-12), `${where}: ${found} instead of ${expected}`);
  }
};

for (const [name, { data, cases }] of Object.entries(JSON.parse(fs.readFileSync(process.env.GOLDEN, "utf8")))) {
  const figure = (await import(`../../docs/javascripts/figures/${name}.js`)).default;

  test(`${name}: ${cases.length} states equal Python's`, () => {
    assert.ok(cases.length > 3);
    for (const { state, expected } of cases) same(figure.compute(state, data), expected, JSON.stringify(state));
  });

  test(`${name}: every state can be drawn and told`, () => {
    for (const { state } of cases) {
      const drawn = html(name, figure, data, { ...figure.defaults(data), ...state });
      assert.ok(!/NaN|undefined|Infinity/.test(drawn), drawn.match(/.{40}(NaN|undefined|Infinity).{40}/)?.[0]);
      assert.ok(!/−0(\.0+)?(?![.\d])/.test(drawn), drawn.match(/.{40}−0(\.0+)?(?![.\d])/)?.[0]);
    }
  });

  test(`${name}: an address brings back what was set, and refuses what does not fit`, () => {
    const start = figure.defaults(data);
    for (const control of figure.controls(data, start)) {
      const value = control.options ? control.options.at(-1)[0] : control.max;
      const moved = move(figure, data, start, control.key, String(value));
      assert.deepEqual(stateOf(address(name, figure, data, moved) || `#figure-${name}?`, name, figure, data), moved, control.key);
    }
    assert.equal(stateOf("#another-heading", name, figure, data), null);
    assert.deepEqual(stateOf(`#figure-${name}?nothing=1&x`, name, figure, data), start);
  });
}
