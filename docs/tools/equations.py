"""On which page each equation stands."""

from __future__ import annotations

import re

from reference.notation import EQUATIONS

NAMED = re.compile(r"`(" + "|".join(re.escape(name) for name in EQUATIONS if "-" in name) + r")`")
"""An equation's id in a sentence; one without a hyphen may be the name of something else."""

EQUATION_PAGES = {
    "scores": ("Equations: scores", ("scores", "noise")),
    "gating": ("Equations: top-k and gates", ("gating",)),
    "choices": ("Equations: other choices", ("choices",)),
    "capacity": ("Equations: capacity", ("capacity",)),
    "dispatch": ("Equations: dispatch", ("dispatch", "layer", "routing")),
    "experts": ("Equations: experts", ("experts", "zero_computation", "expert_dropout", "shared")),
    "mixtures": ("Equations: dense and soft mixtures", ("soft", "beginnings")),
    "load": (
        "Equations: load and control",
        (
            "load",
            "importance",
            "max-violation",
            "load-cv",
            "load-entropy",
            "drop-by-position",
            "bias-sign",
            "bias-centered-sign",
            "bias-proportional",
            "penalty-update",
        ),
    ),
    "balance": ("Equations: balance", ("balancing", "penalty")),
    "costs": ("Equations: costs", ("cost",)),
    "measures": ("Equations: measures", ()),
}
"""Page → (title, equations or modules of equations that it lists, unless a page before it does); the last one takes the rest. One page of
all would be too heavy."""


def equation_home(identifier: str) -> str:
    """The page that lists the equation."""
    module = EQUATIONS[identifier].function.split(".")[1]
    page = next((page for page, (_, listed) in EQUATION_PAGES.items() if identifier in listed or module in listed), "measures")
    return f"reference/equations/{page}.md"


def linked(text: str) -> str:
    """Markdown in which the ids of equations lead to where they stand."""
    return NAMED.sub(r"[\g<0>][eq-\1]", text)
