// Draws figures at build time: { name: data } in, { name: HTML } out, both JSON.
import { html } from "../javascripts/figure.js";

let text = "";
for await (const chunk of process.stdin) text += chunk;
const drawn = {};
for (const [name, data] of Object.entries(JSON.parse(text))) {
  const figure = (await import(`../javascripts/figures/${name}.js`)).default;
  drawn[name] = html(name, figure, data);
}
process.stdout.write(JSON.stringify(drawn));
