"""The build scripts of docs/tools as modules for the tests."""

from __future__ import annotations

import sys

from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "docs/tools"))

# isort: off
import build
import figures
import layout
import measured
import plots
import pictures
import readme
import render
import sources
import tables

__all__ = ["build", "figures", "layout", "measured", "pictures", "plots", "readme", "render", "sources", "tables"]
