// Wakes the figures of a page. They arrive drawn; this listens to their controls, redraws the picture and keeps the address in step.
import { address, description, html, move, pictureOf, stateOf, values } from "./figure.js";

class MoeFigure extends HTMLElement {
  async connectedCallback() {
    if (this.dataset.awake) return; // instant navigation can attach the same node again
    this.dataset.awake = "loading";
    this.name = this.getAttribute("name");
    this.data = JSON.parse(this.dataset.given);
    this.figure = (await import(`./figures/${this.name}.js`)).default;
    this.state = stateOf(decodeURIComponent(location.hash), this.name, this.figure, this.data);
    const asked = this.state !== null;
    this.state ??= this.figure.defaults(this.data);
    this.body = this.querySelector(".moe-body");
    if (asked) {
      this.body.innerHTML = html(this.name, this.figure, this.data, this.state);
      this.scrollIntoView({ block: "center" });
    }
    this.addEventListener("input", (event) => event.target.dataset.key && this.change(event.target.dataset.key, event.target.value));
    this.addEventListener("click", (event) => this.click(event.target));
    this.dataset.awake = "yes";
  }

  disconnectedCallback() {
    clearTimeout(this.timer);
  }

  click(target) {
    if (target.closest(".moe-reset")) return this.show(this.figure.defaults(this.data), true);
    const set = target.closest("[data-set]")?.dataset.set;
    if (!set) return;
    this.show(move(this.figure, this.data, this.state, ...set.split("=")), true);
    this.querySelector(`[data-set="${set}"]`)?.focus({ preventScroll: true }); // the picture is new, and with it the button that was pressed
  }

  change(key, value) {
    this.show(move(this.figure, this.data, this.state, key, value), false);
  }

  show(state, fromOutside) {
    this.state = state;
    this.querySelector(".moe-picture").innerHTML = pictureOf(this.figure, this.data, state);
    for (const [key, [value, text, max]] of Object.entries(values(this.figure, this.data, state))) {
      const input = this.querySelector(`[data-key="${key}"]`);
      if (max !== undefined) input.max = max;
      if (fromOutside || document.activeElement !== input) input.value = value;
      if (input.type === "range") input.setAttribute("aria-valuetext", text);
      const label = this.querySelector(`[data-value="${key}"]`);
      if (label) label.textContent = text;
    }
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      this.querySelector(".moe-status").textContent = description(this.figure, this.data, state);
      history.replaceState(history.state, "", location.pathname + location.search + address(this.name, this.figure, this.data, state));
    }, 300);
  }
}

if (!customElements.get("moe-figure")) customElements.define("moe-figure", MoeFigure);
