"""From the loop to the fused kernel, one rung a file, all with one signature: each is what the one before lacks.

For reading and for counting, not for use: `optimized.MoE` runs the last rung, and on a CPU the native kernel.
"""

from __future__ import annotations

from .rungs import RUNGS, Rung

__all__ = ["RUNGS", "Rung"]
