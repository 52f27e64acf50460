// LaTeX to HTML and MathML by KaTeX: [[latex, display], …] in, [html, …] out, both JSON.
import katex from "katex";

let text = "";
for await (const chunk of process.stdin) text += chunk;
const drawn = JSON.parse(text).map(([latex, displayMode]) => katex.renderToString(latex, { displayMode, strict: "error", throwOnError: true }));
process.stdout.write(JSON.stringify(drawn));
