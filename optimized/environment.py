"""Settings of the process that PyTorch and its OpenMP read when they are first imported: what the commands run with.

A variable that the user has set is left alone.
"""

from __future__ import annotations

import os
import sys

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
SPINS = "GOMP_SPINCOUNT"
# Large tensors on huge pages: a page fault for every 4 KiB costs more than many operations on them.
# OpenMP's threads wait awake for long by default, at the end of every operation of PyTorch. Where another program has taken one of the
# cores, each of these waits lasts until the scheduler gives it back, and a step of training takes many times what it takes on one thread.
# A few thousand turns bridge the gap to the next operation just as well; after them a thread sleeps.
DEFAULTS = {HUGE_PAGES: "1", SPINS: "4000"}


def prepare_process() -> list[str]:
    """Set the defaults, and return the names that came too late: not set as they should be, and PyTorch is imported already."""
    if "torch" in sys.modules:
        return [name for name in DEFAULTS if name not in os.environ]
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    return []
