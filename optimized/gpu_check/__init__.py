"""Everything that only a GPU can tell, in one command: `make gpu-check`, or `python -m optimized.gpu_check`.

It takes the Python, PyTorch and Triton that are there, installs nothing and needs no network. It runs in parts, each in a process of its
own that ends within eight minutes; every result is written the moment it is known, and a second call goes on where the first stopped.
"""

from __future__ import annotations
