"""Which row is whose: a stable counting sort of the assignments by expert, and the table of tiles that the products walk along.

Everything stays on the device; sizes that only the data can tell (rows of an expert, number of tiles) are bounded on the host.
An assignment that is not kept, or whose id names no expert, is in bucket E, behind all experts.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def bucket_of(EXPERT, KEEP, at, inside, E):
    """Bucket of each assignment: its expert, or E where it is dropped."""
    expert = tl.load(EXPERT + at, mask=inside, other=0)
    kept = tl.load(KEEP + at, mask=inside, other=0) != 0
    return tl.where(kept & (expert >= 0) & (expert < E), expert, E).to(tl.int32)


@triton.jit
def histogram_kernel(EXPERT, KEEP, HISTOGRAM, assignments, E, BUCKETS: tl.constexpr, BLOCK: tl.constexpr):
    """Counts the buckets of one block of assignments.

    Grid: (⌈T·K / BLOCK⌉). A program owns BLOCK neighbouring assignments and one row of HISTOGRAM.
    EXPERT [T·K] int64, KEEP [T·K] uint8 → HISTOGRAM [blocks, BUCKETS] int32.
    Equals: numpy.bincount of each block (integers). Rounds at: nothing. Limits: BUCKETS a power of two > E.
    """
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < assignments
    bucket = bucket_of(EXPERT, KEEP, at, inside, E)
    counts = tl.histogram(bucket, BUCKETS, mask=inside)
    tl.store(HISTOGRAM + block.to(tl.int64) * BUCKETS + tl.arange(0, BUCKETS), counts)


@triton.jit
def write_tiles(first_row, rows, TILES, max_tiles, E, BUCKETS: tl.constexpr, BLOCK_ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """TILES from each bucket's first row and number of rows: entry 0 is (tiles of experts, all tiles), then (bucket, first row) each."""
    bucket = tl.arange(0, BUCKETS)
    tiles = (rows + BLOCK_ROWS - 1) // BLOCK_ROWS
    end = tl.cumsum(tiles, 0)
    start = end - tiles
    count = tl.sum(tiles, 0)
    tl.store(TILES, tl.sum(tl.where(bucket < E, tiles, 0), 0))
    tl.store(TILES + 1, count)
    for base in range(0, max_tiles, CHUNK):
        tile = base + tl.arange(0, CHUNK)
        here = (tile[:, None] >= start[None, :]) & (tile[:, None] < end[None, :])
        owner = tl.sum(tl.where(here, bucket[None, :], 0), 1)
        row = tl.sum(tl.where(here, first_row[None, :] + (tile[:, None] - start[None, :]) * BLOCK_ROWS, 0), 1)
        tl.store(TILES + 2 + 2 * tile, owner, mask=tile < count)
        tl.store(TILES + 3 + 2 * tile, row, mask=tile < count)


@triton.jit
def scan_kernel(
    HISTOGRAM, START, BOUNDS, TILES, OTHER_TILES, blocks, max_tiles, other_max_tiles, E,
    BUCKETS: tl.constexpr, BLOCK_ROWS: tl.constexpr, OTHER_ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Prefix sums over the blocks, the experts' bounds, and a table of tiles for each of one or two heights.

    Grid: (1). A program owns every bucket. HISTOGRAM [blocks, BUCKETS] int32 → START [blocks, BUCKETS] int32, how many of a bucket lie in
    earlier blocks; BOUNDS [E + 1] int32, expert e owns rows BOUNDS[e] … BOUNDS[e + 1] − 1; TILES [max_tiles + 1, 2] int32, see
    `write_tiles`, and OTHER_TILES the same for tiles of OTHER_ROWS rows, or None.
    Equals: numpy.cumsum; BOUNDS is `reference.dispatch.DispatchCache.bounds_P` (integers). Rounds at: nothing.
    Limits: T·K < 2³¹; max_tiles ≥ Σ ⌈rows of a bucket / BLOCK_ROWS⌉.
    """
    bucket = tl.arange(0, BUCKETS)
    rows = tl.zeros((BUCKETS,), tl.int32)
    for base in range(0, blocks, CHUNK):
        block = base + tl.arange(0, CHUNK)
        inside = (block < blocks)[:, None]
        at = block.to(tl.int64)[:, None] * BUCKETS + bucket[None, :]
        counts = tl.load(HISTOGRAM + at, mask=inside, other=0)
        tl.store(START + at, rows[None, :] + tl.cumsum(counts, 0) - counts, mask=inside)
        rows += tl.sum(counts, 0)
    end = tl.cumsum(rows, 0)
    tl.store(BOUNDS, 0)
    tl.store(BOUNDS + 1 + bucket, end, mask=bucket < E)
    write_tiles(end - rows, rows, TILES, max_tiles, E, BUCKETS, BLOCK_ROWS, CHUNK)
    if OTHER_TILES is not None:
        write_tiles(end - rows, rows, OTHER_TILES, other_max_tiles, E, BUCKETS, OTHER_ROWS, CHUNK)


@triton.jit
def scatter_kernel(EXPERT, KEEP, START, BOUNDS, ORDER, PLACE, assignments, E, BUCKETS: tl.constexpr, BLOCK: tl.constexpr):
    """Puts each assignment in its place of expert order.

    Grid: (⌈T·K / BLOCK⌉), that of the histogram. A program owns BLOCK neighbouring assignments; no two write one place.
    EXPERT [T·K] int64, KEEP [T·K] uint8, START and BOUNDS of `scan_kernel` → ORDER [T·K] int32, the assignment in each place;
    PLACE [T·K] int32, its inverse. Places from BOUNDS[E] on hold the dropped assignments.
    Equals: `reference.dispatch.dispatch_forward`'s stable sort (integers). Rounds at: nothing.
    Limits: BLOCK · BUCKETS counters in registers and shared memory.
    """
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < assignments
    bucket = bucket_of(EXPERT, KEEP, at, inside, E)
    own = ((bucket[:, None] == tl.arange(0, BUCKETS)[None, :]) & inside[:, None]).to(tl.int32)
    rank = tl.sum((tl.cumsum(own, axis=0) - own) * own, axis=1)
    start = tl.load(START + block.to(tl.int64) * BUCKETS + bucket, mask=inside, other=0)
    place = tl.load(BOUNDS + bucket, mask=inside, other=0) + start + rank
    tl.store(ORDER + place, at, mask=inside)
    tl.store(PLACE + at, place, mask=inside)


@triton.jit
def restore_kernel(
    ORDER, BOUNDS, PLACE, TILES, OTHER_TILES, assignments, max_tiles, other_max_tiles, E,
    BUCKETS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr, OTHER_ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """What the backward needs again and the forward did not save: the inverse of ORDER, and tiles of the backward's own heights.

    Grid: (⌈T·K / BLOCK⌉ + 1). A program owns BLOCK places of ORDER, which it inverts; the last one owns the tables of tiles.
    ORDER [T·K] int32, BOUNDS [E + 1] int32 → PLACE [T·K] int32, TILES and OTHER_TILES (or None) as in `scan_kernel`, without the
    dropped assignments' tiles.
    Equals: numpy.argsort of ORDER (integers). Rounds at: nothing. Limits: those of `scan_kernel`.
    """
    block = tl.program_id(0)
    if block == tl.num_programs(0) - 1:
        bucket = tl.arange(0, BUCKETS)
        first_row = tl.load(BOUNDS + bucket, mask=bucket < E, other=0)
        end = tl.load(BOUNDS + bucket + 1, mask=bucket < E, other=0)
        write_tiles(first_row, end - first_row, TILES, max_tiles, E, BUCKETS, BLOCK_ROWS, CHUNK)
        if OTHER_TILES is not None:
            write_tiles(first_row, end - first_row, OTHER_TILES, other_max_tiles, E, BUCKETS, OTHER_ROWS, CHUNK)
    else:
        place = block * BLOCK + tl.arange(0, BLOCK)
        inside = place < assignments
        tl.store(PLACE + tl.load(ORDER + place, mask=inside, other=0), place, mask=inside)
