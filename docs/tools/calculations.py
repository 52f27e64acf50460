"""Where lines of a built page end in what its sentences calculate, "K = 8" or "T · K / E": behind a sign, and in nothing short."""

from __future__ import annotations

import re

NO_BREAK = "\N{NO-BREAK SPACE}"
KEPT = (
    r"<(?P<whole>pre|code|script|style|svg|select|moe-figure)\b.*?</(?P=whole)>"
    r'|<(?P<formula>div|span) class="arithmatex">.*?</(?P=formula)>'
    r"""|<(?!/?su[bp]>)(?:[^<>"']|"[^"]*"|'[^']*')*>"""
)
"""What is no running text: tags, and some elements with all that is in them."""
ARTICLE = re.compile(r"<article\b.*</article>", re.DOTALL)
ENDED = "".join(f"|(?<=</{tag}>)" for tag in ("code", "span", "a", "em", "strong", "sub", "sup"))
SIGN = re.compile(rf"{KEPT}|(?:(?<=[^\s>]){ENDED})[ \n]+(?=(?:[=·×/+−–→≤≥≈]|&[lg]t;)[ \n])|(?:(?<=>)|(?<=· ))(?P<times>×)[ \n]+", re.DOTALL)
"""A space before a sign in a sentence; or a "times" before which nothing stands, with the space behind it."""
ATOM = r"(?:[^\W\d_]\w{0,2}|\d(?:[\d.,]*\d)?)"
SIDE = (
    rf"(?<![\w&#.'/·()\[⌈⌊√−-])[(\[⌈⌊√−]{{0,3}}{ATOM}(?:[/·]{ATOM})?(?:<su[bp]>[^<>]{{1,8}}</su[bp]>)*"
    r"['⁰¹²³⁴-⁹ᵀ%)\]⌉⌋]{0,4}(?![\w(\[⌈⌊-]|[.,'/·]\w)"
)
"""A number, or a symbol of at most three letters, with its index and brackets."""
PRODUCT, CALCULATION = (
    re.compile(rf"{KEPT}|{SIDE}(?:[ \n\u00a0]+(?:{signs})[ \n\u00a0]+{SIDE})+", re.DOTALL) for signs in ("[·×/]", "[=·×/+−≤≥≈]|&[lg]t;")
)
ROOM = 16
"""Characters of a calculation up to which it stays on one line."""


def calculated(text: str) -> str:
    """The page with no line that begins with a sign, and with short calculations whole; of a longer one, with its short products whole."""

    def at_sign(match: re.Match[str]) -> str:
        return match[0] if match[0].startswith("<") else (match["times"] or "") + NO_BREAK

    def whole(match: re.Match[str]) -> str:
        shown = re.sub(r"<[^>]*>", "", match[0])
        return match[0] if match[0].startswith("<") or len(shown) > ROOM else re.sub(r"[ \n]+", NO_BREAK, match[0])

    def article(match: re.Match[str]) -> str:
        return CALCULATION.sub(whole, PRODUCT.sub(whole, SIGN.sub(at_sign, match[0])))

    return ARTICLE.sub(article, text)
