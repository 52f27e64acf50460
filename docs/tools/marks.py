"""Names, shapes and symbols in the running text of a docstring, marked for the page.

A docstring is plain text, so that an editor shows it well. On a page `x_TD`, `[T, K]` and `config.balance` are set as code, and the index
of a symbol (z_te, Σ_d, FFN_e) is set low. What is none of these stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Set

APART = re.compile(r"(`[^`]*`)")
"""Code within text: it is marked already."""
NO_BREAK = "\N{NO-BREAK SPACE}"

TOKEN = re.compile(
    r"""
    (?P<value>"[^"\s]+")                                           # "top_k"
  | (?P<shape>(?<!\w)\[(?!\d+,[ ]\d+\])[A-Z0-9…][\w·/+−…', -]*\])    # [T, K], but not the interval [0, 1]
  | (?P<error>\b[A-Z]\w+Error\b)
  | (?P<base>(?<![^\W\d_])[^\W\d_]{1,6}[\u0300-\u036f]?'*|(?<=\)))   # z_te, x̂_td, f'_g, x_{i + 1}, log(…)_e
    _(?P<index>\{[^{}]*\}|\([^()]*\)|(?:[a-z]'*){1,6}(?:\|[a-z])?(?![a-zA-Z0-9_']))
  | (?P<name>(?<![\w.'])(?:[A-Za-z]\w*\.)*[A-Za-z]\w*(?!\w|[\u0300-\u036f']*_))
    (?P<place>(?:\[[^\]\s][^\]]*\]|\([^()\s][^()]*\)|=\d+)?)           # bounds_P[e], x.flatten(0, -2), CHECK=1
  | \^(?P<power>\([^()]*\)|\w*\([^()]*\)|\w+)                        # D^(−1/2), α^sign(…), x^T
    """,
    re.VERBOSE,
)


def is_name(word: str, names: Set[str]) -> bool:
    """Whether a word is the name of something in Python and could not be a word of the sentence."""
    head, _, last = word.rpartition(".")
    if head:
        return len(last) > 1 and word.islower()
    return "_" in word or (word in names and word.isupper() and len(word) > 3)


def mark(text: str, names: Set[str] = frozenset(), *, values: bool = False) -> str:
    """The text with its marks, as Markdown.

    `names`: what the packages call their functions, fields and arguments; `values`: a quoted word is a value, and not a word in doubt.
    """

    def marked(found: re.Match[str]) -> str:
        whole = found[0]
        if found["value"] and not values and not re.search(r"\w[_.]\w", whole):
            return whole
        if found["index"]:
            low = mark(found["index"].strip("{}"), names)
            return f"`{whole}`" if whole in names else f"{found['base']}<sub>{low}</sub>"
        if found["power"]:
            power = found["power"]
            return f"<sup>{mark(power[1:-1] if power[0] == '(' else power, names)}</sup>"
        if found["name"] and not is_name(found["name"], names):
            return found["name"] + (mark(found["place"], names) if found["place"] else "")
        return f"`{whole.replace(' ', NO_BREAK) if found['shape'] else whole}`"

    return "".join(part if part.startswith("`") else TOKEN.sub(marked, part) for part in APART.split(text))
