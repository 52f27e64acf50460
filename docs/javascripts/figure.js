// What all figures share, without a page: their HTML as a string, and their state as the part of an address after "?".
//
// A figure is { title, hint, defaults(data), controls(data, state), compute(state, data), picture(result, state, data), describe(result, state, data) }.
// A control is { key, label, get(state), set(state, value), show(value) } with `options` (a choice) or `min, max, step` (a slider).
import { escapeHtml } from "./core.js";

const idOf = (name) => `figure-${name}`;
const read = (control, state) => (control.get ? control.get(state) : state[control.key]);
const shown = (control, value) => (control.show ? control.show(value) : String(value));

const slider = (control, id, value) => `<div class="moe-control">
<label for="${id}">${escapeHtml(control.label)}</label><span class="moe-value" data-value="${control.key}">${escapeHtml(shown(control, value))}</span>
<input type="range" id="${id}" data-key="${control.key}" min="${control.min}" max="${control.max}" step="${control.step}" value="${value}" aria-valuetext="${escapeHtml(shown(control, value))}"></div>`;

const LONG = 17; // what a select of one column shows of an option

const choice = (control, id, value) => `<div class="moe-control${control.options.some(([, label]) => label.length > LONG) ? " moe-long" : ""}">
<label for="${id}">${escapeHtml(control.label)}</label>
<select id="${id}" data-key="${control.key}">${control.options
  .map(([option, label]) => `<option value="${escapeHtml(option)}"${String(option) === String(value) ? " selected" : ""}>${escapeHtml(label)}</option>`)
  .join("")}</select></div>`;

const controlHtml = (name, control, state) =>
  (control.options ? choice : slider)(control, `${idOf(name)}-${control.key}`, read(control, state));

/** The whole figure as HTML: controls, picture, and one sentence that says what the picture shows. */
export function html(name, figure, data, state = figure.defaults(data)) {
  const result = figure.compute(state, data);
  const controls = figure.controls(data, state).map((control) => controlHtml(name, control, state)).join("\n");
  return `<div class="moe-head"><strong>${escapeHtml(figure.title)}</strong> <button type="button" class="moe-reset">Reset</button></div>
<div class="moe-controls">${controls}</div>
<div class="moe-picture">${figure.picture(result, state, data)}</div>
<p class="moe-status" role="status">${escapeHtml(figure.describe(result, state, data))}</p>`;
}

export const pictureOf = (figure, data, state) => figure.picture(figure.compute(state, data), state, data);

export const description = (figure, data, state) => figure.describe(figure.compute(state, data), state, data);

/** Each control's value, how it reads and, of a slider, how far it goes: that may hang on another control. By key. */
export const values = (figure, data, state) =>
  Object.fromEntries(figure.controls(data, state).map((control) => [control.key, [read(control, state), shown(control, read(control, state)), control.max]]));

/** The state after a control was moved. */
export function move(figure, data, state, key, text) {
  const control = figure.controls(data, state).find((one) => one.key === key);
  const value = control.options && Number.isNaN(Number(text)) ? text : Number(text);
  return control.set ? control.set(state, value) : { ...state, [key]: value };
}

/** "#figure-route?topK=1": only what differs from the figure as it opens. */
export function address(name, figure, data, state) {
  const start = figure.defaults(data);
  const parts = Object.keys(start)
    .filter((key) => String(state[key]) !== String(start[key]))
    .map((key) => `${key}=${[].concat(state[key]).join("_")}`);
  return parts.length ? `#${idOf(name)}?${parts.join("&")}` : "";
}

/** The state that an address asks for; null where it is not about this figure. What does not fit is ignored. */
export function stateOf(hash, name, figure, data) {
  if (!hash.startsWith(`#${idOf(name)}?`)) return null;
  const state = figure.defaults(data);
  for (const part of hash.slice(idOf(name).length + 2).split("&")) {
    const [key, text = ""] = part.split("=");
    if (Array.isArray(state[key])) {
      const numbers = text.split("_").map(Number);
      if (numbers.length === state[key].length && numbers.every(Number.isFinite)) state[key] = numbers;
    } else if (typeof state[key] === "number") {
      if (text !== "" && Number.isFinite(Number(text))) state[key] = Number(text);
    } else if (typeof state[key] === "string" && /^[a-z0-9_.-]+$/.test(text)) {
      state[key] = text;
    }
  }
  return figure.valid?.(state, data) === false ? null : state;
}
