"""Formulas of the built site drawn once and for all: `python docs/tools/formulas.py site`, after `mkdocs build`.

Pages then need KaTeX's style and fonts, but none of its 270 KB of JavaScript, and formulas stand there without scripts too.
"""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from pathlib import Path

import vendor

TOOLS = Path(__file__).resolve().parent
FORMULA = re.compile(r'<(div|span) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def draw(formulas: list[tuple[str, bool]], node: str) -> list[str]:
    """HTML of each (LaTeX, whether displayed). Raises SystemExit with KaTeX's message where LaTeX is wrong."""
    done = subprocess.run([node, TOOLS / "formulas.mjs"], input=json.dumps(formulas), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"KaTeX refuses a formula:\n{done.stderr}")
    return json.loads(done.stdout)


def main() -> None:
    """Draw the formulas of every page below the folder given."""
    pages = {path: path.read_text(encoding="utf-8") for path in sorted(Path(sys.argv[1]).rglob("*.html"))}
    found = sorted({(html.unescape(m[2]).strip(), m[1] == "div") for text in pages.values() for m in FORMULA.finditer(text)})
    drawn = dict(zip(found, draw(found, vendor.tool("node")), strict=True))
    for path, text in pages.items():

        def formula(match: re.Match[str]) -> str:
            return f'<{match[1]} class="arithmatex">{drawn[html.unescape(match[2]).strip(), match[1] == "div"]}</{match[1]}>'

        path.write_text(FORMULA.sub(formula, text), encoding="utf-8")
    print(f"{len(found)} formulas drawn")


if __name__ == "__main__":
    main()
