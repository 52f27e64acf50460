"""The build scripts of docs/tools as modules for the tests."""

from __future__ import annotations

import sys

from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "docs/tools"))

# isort: off
import build
import calculations
import components
import docstrings
import equations
import figures
import finish
import generated
import kernels
import layout
import measured
import native
import notebook_pages
import plots
import pictures
import readme
import render
import routed
import sources
import tables

__all__ = [
    "build", "calculations", "components", "docstrings", "equations", "figures", "finish", "generated", "kernels", "layout", "measured",
    "native", "notebook_pages", "pictures", "plots", "readme", "render", "routed", "sources", "tables",
]  # fmt: skip
