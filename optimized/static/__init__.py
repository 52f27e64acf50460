"""What can be known about the kernels without a GPU: `moebius kernels`.

The real launchers run on tensors without memory, every specialisation that they ask for is compiled for each target and read back:
registers, spills, shared memory, matrix instructions, asynchronous copies. Bytes and FLOPs are counted in Triton's interpreter. None of
this is a time: the kernels are statically verified, not benchmarked.
"""

from __future__ import annotations
