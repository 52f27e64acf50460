"""What MkDocs leaves to be done in the built pages: `python docs/tools/finish.py site`, after `mkdocs build`.

Formulas are drawn once and for all: pages then need KaTeX's style and fonts, but none of its 270 KB of JavaScript, and formulas stand there
without scripts too. The fonts of their letters and digits are asked for at once, or lines would move when they arrive. And lines end where
a reader would end them: not between a formula and its comma nor inside an option, inside a long name behind a dot or an underscore, and
in what is calculated behind a sign, but not inside K = 8.
"""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from pathlib import Path

import vendor
from calculations import calculated

TOOLS = Path(__file__).resolve().parent
FORMULA = re.compile(r'<(div|span) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
INLINE = re.compile(r'([(\[“‘]*)(<span class="arithmatex">\\\(.*?\\\)</span>)((?:[^\s<&]|&#?\w+;)*)', re.DOTALL)
"""A formula in a sentence, the brackets and quotes that open right before it, and what follows without a space."""
BASE = '<span class="katex-base">'
"""A part of a formula inside which no line ends."""
LETTER = '<span class="mord mathnormal">'
STYLE = re.compile(r'<link rel="stylesheet" href="([^"]*/katex/)katex\.min\.css">')
FONTS = ("KaTeX_Main-Regular", "KaTeX_Math-Italic")
NAME = re.compile(r"<code>(\w+(?:\.\w+)*)(?=[(<])")
OPTION = re.compile(r"--\w[\w-]*(?=[^<>]*</code>)")
LONG_NAME = 28
"""Characters from which on a name may not fit on a line of a phone; shorter ones go to the next line as a whole."""


def draw(formulas: list[tuple[str, bool]], node: str) -> list[str]:
    """HTML of each (LaTeX, whether displayed). Raises SystemExit with KaTeX's message where LaTeX is wrong."""
    done = subprocess.run([node, TOOLS / "formulas.mjs"], input=json.dumps(formulas), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"KaTeX refuses a formula:\n{done.stderr}")
    drawn = zip(json.loads(done.stdout), formulas, strict=True)
    return [text if displayed else text.replace(f"</span>{BASE}", f"</span><wbr>{BASE}") for text, (_, displayed) in drawn]


def joined(text: str) -> str:
    """The page with each formula and what stands right at it in one piece; a browser may end a line beside any formula otherwise."""
    return INLINE.sub(lambda m: f'<span class="moe-joined">{m[0]}</span>' if m[1] or m[3] else m[0], text)


def breakable(text: str) -> str:
    """The page with long names in code divided behind dots and underscores, and no option; a browser divides them anywhere."""

    def divided(match: re.Match[str]) -> str:
        return match[0] if len(match[1]) < LONG_NAME else "<code>" + re.sub(r"(\.|(?<=[^\W_])_)(?=\w)", r"\1<wbr>", match[1])

    return OPTION.sub(r'<span class="moe-joined">\g<0></span>', NAME.sub(divided, text))


def early(text: str) -> str:
    """The page with KaTeX's letters and digits among what it asks for first; its other fonts hold a sign or two."""

    def asked(match: re.Match[str]) -> str:
        links = (f'<link rel="preload" href="{match[1]}fonts/{font}.woff2" as="font" crossorigin>' for font in FONTS)
        return match[0] + "".join(links)

    return STYLE.sub(asked, text) if LETTER in text else text


def main() -> None:
    """Finish every page below the folder given."""
    pages = {path: path.read_text(encoding="utf-8") for path in sorted(Path(sys.argv[1]).rglob("*.html"))}
    found = sorted({(html.unescape(m[2]).strip(), m[1] == "div") for text in pages.values() for m in FORMULA.finditer(text)})
    drawn = dict(zip(found, draw(found, vendor.tool("node")), strict=True))

    def formula(match: re.Match[str]) -> str:
        return f'<{match[1]} class="arithmatex">{drawn[html.unescape(match[2]).strip(), match[1] == "div"]}</{match[1]}>'

    for path, text in pages.items():
        path.write_text(early(FORMULA.sub(formula, joined(breakable(calculated(text))))), encoding="utf-8")
    print(f"{len(found)} formulas drawn")


if __name__ == "__main__":
    main()
