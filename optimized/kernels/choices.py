"""What autotuning may choose beside the rows of `blocks`, and what was tried and refused, for bf16 and fp16 by family.

`moebius kernels` compiles the first table for every published shape and wants it without a fault; `moebius kernels --rejected` compiles
the second and wants a fault in each row. Times are for a machine with a GPU to measure.
"""

from __future__ import annotations

from collections.abc import Mapping

from .blocks import Blocks

Choices = Mapping[str, tuple[Blocks, ...]]

ALTERNATIVES: dict[str, Choices] = {
    "sm80": {
        "up": (Blocks(64, 64, 64, 4, 4), Blocks(16, 64, 64, 4, 4)),
        "product": (Blocks(128, 128, 32, 4, 4), Blocks(16, 128, 64, 4, 4)),
        "activation": (Blocks(64, 64, 32, 8, 4),),
        "weight": (Blocks(128, 128, 32, 8, 4), Blocks(128, 64, 32, 4, 4)),
    },
    "sm90": {
        "up": (Blocks(64, 128, 64, 8, 3), Blocks(16, 128, 64, 4, 4)),
        "product": (Blocks(128, 256, 64, 8, 3), Blocks(64, 128, 64, 4, 4), Blocks(16, 128, 64, 4, 4)),
        "activation": (Blocks(64, 64, 64, 8, 4),),
        "weight": (Blocks(128, 256, 64, 8, 3),),
    },
    "sm100": {
        "up": (Blocks(64, 128, 64, 8, 3),),
        "product": (Blocks(128, 256, 64, 8, 3),),
        "activation": (Blocks(64, 64, 64, 8, 4),),
        "weight": (Blocks(128, 256, 64, 8, 3),),
    },
    "amd": {
        "up": (Blocks(64, 64, 64, 4, 2),),
        "product": (Blocks(128, 128, 32, 8, 2),),
        "activation": (Blocks(64, 64, 32, 8, 2),),
        "weight": (Blocks(128, 128, 32, 8, 2),),
    },
}
REJECTED: dict[str, Choices] = {
    "sm80": {"up": (Blocks(128, 128, 64, 8, 3),), "activation": (Blocks(128, 64, 64, 8, 3), Blocks(64, 64, 64, 4, 4))},
    "sm90": {
        "up": (Blocks(128, 128, 64, 8, 3), Blocks(128, 128, 64, 8, 4)),
        "activation": (Blocks(64, 128, 64, 8, 3), Blocks(128, 64, 64, 8, 3)),
    },
    "sm100": {
        "up": (Blocks(128, 128, 64, 8, 3), Blocks(128, 128, 64, 8, 4)),
        "activation": (Blocks(64, 128, 64, 8, 3),),
    },
    "amd": {"activation": (Blocks(128, 128, 64, 8, 2),)},
}
