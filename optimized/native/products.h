/* Matrix products in one storage type. Included once per type, with TYPE(name) giving names of their own and
 *
 *   STORED_BF16   0: elements are fp32, 1: they are bf16 and sums are fp32
 *
 * Every product of the layer, forward and backward, is the same three steps: bring a few columns of B into a panel, multiply rows of
 * A with the panel, and let the caller do something with the sums while they are in the cache.
 *
 * unit    what one step of the inner loop takes from a row: an element, or a pair of bf16 where the machine multiplies pairs
 * panel   WIDTH columns of B, unit by unit: panel[k][column]. It is read from front to back, which is all that a memory likes
 */

#if STORED_BF16 && HAS_BF16_DOT
#define PER_UNIT 2
#else
#define PER_UNIT 1
#endif

#if STORED_BF16
typedef uint16_t TYPE(elem);
#else
typedef float TYPE(elem);
#endif
#define elem TYPE(elem)

/* Rows of a matrix; with an index, those rows in that order. */
typedef struct { const elem *at; long stride; const int32_t *index; } TYPE(matrix);
#define matrix TYPE(matrix)

INLINE const elem *TYPE(row)(matrix m, long row) { return m.at + (m.index ? m.index[row] : row) * m.stride; }

/* What will be read next and is fetched while something else is multiplied: what a panel is, or is packed from, in two halves. Each is one
 * piece of memory, or with a step half a unit of a panel at a time, so many elements from one to the next. A second half that is NULL
 * follows the first; a first one that is NULL: nothing is known. */
typedef struct { const elem *half[2]; long step; } TYPE(soon);

static const TYPE(soon) TYPE(nothing);

/* A panel, and how far one unit of it is from the next: packed ones lie close, and one that is used where it lies does not.
 * `old`: it was not packed just now, and so must be fetched from memory itself. */
typedef struct { const elem *at; long stride; int old; TYPE(soon) next; } TYPE(panel);

INLINE TYPE(panel) TYPE(whole)(const elem *packed, int old, TYPE(soon) next) { return (TYPE(panel)){packed, WIDTH * PER_UNIT, old, next}; }

INLINE long TYPE(units)(long elements) { return (elements + PER_UNIT - 1) / PER_UNIT; }
INLINE long TYPE(padded)(long elements) { return TYPE(units)(elements) * PER_UNIT; }

/* Elements to fp32 and back; the first `count` of a vector where it overhangs the end of a row. */
INLINE vec TYPE(get)(const elem *from, long count) {
#if STORED_BF16
    hvec v = {0};
#else
    vec v = {0};
#endif
    if (count >= LANES) memcpy(&v, from, sizeof v);
    else memcpy(&v, from, count * sizeof *from);
#if STORED_BF16
    return widen(v);
#else
    return v;
#endif
}

INLINE void TYPE(put)(elem *to, vec value, long count) {
#if STORED_BF16
    hvec v = narrow(value);
#else
    vec v = value;
#endif
    if (count >= LANES) memcpy(to, &v, sizeof v);
    else memcpy(to, &v, count * sizeof *to);
}

/* As put, for what is large and not read soon. */
INLINE void TYPE(put_away)(elem *to, vec value, long count) {
#if STORED_BF16
    hvec v = narrow(value);
#else
    vec v = value;
#endif
    if (count >= LANES && (uintptr_t)to % sizeof v == 0) stream(to, &v, sizeof v);
    else memcpy(to, &v, (count < LANES ? count : LANES) * sizeof *to);
}

/* The three operations of the inner loop: a unit of A in every lane, a vector of units of B, and their product added to a sum. */
#if STORED_BF16 && HAS_BF16_DOT
typedef __m512bh TYPE(operand);
INLINE __m512bh TYPE(broadcast)(const elem *a) { int32_t pair; memcpy(&pair, a, 4); return (__m512bh)_mm512_set1_epi32(pair); }
INLINE __m512bh TYPE(fetch)(const elem *b) { return (__m512bh)_mm512_loadu_si512(b); }
INLINE vec TYPE(multiply_add)(vec sum, __m512bh a, __m512bh b) { return (vec)_mm512_dpbf16_ps((__m512)sum, a, b); }
#else
typedef vec TYPE(operand);
INLINE vec TYPE(broadcast)(const elem *a) {
#if STORED_BF16
    return (vec)((uvec){0} + ((uint32_t)*a << 16));
#else
    return splat(*a);
#endif
}
INLINE vec TYPE(fetch)(const elem *b) { return TYPE(get)(b, LANES); }
INLINE vec TYPE(multiply_add)(vec sum, vec a, vec b) { return sum + a * b; }
#endif

/* Where the sums of a product go: to `c`, rows of WIDTH; or, with `out`, to rows `apart` elements from each other, for good. */
typedef struct { float *c; elem *out; long apart; } TYPE(target);

/* What a register tile multiplies. Unit k of row i is at a[i] + k · step, and unit k of the panel at panel + k · stride. With each unit a
 * few lines at ahead + k · ahead_step are fetched. Sums begin with what `from` holds, NULL: with 0. `add`: to what the target holds. */
typedef struct {
    const elem *a[TILE_ROWS], *panel, *ahead;
    const float *from;
    long step, stride, ahead_step, count;
    TYPE(target) to;
    int add;
} TYPE(tile);

/* `rows` rows of A times one panel. rows · STRIPES sums stay in registers for the whole loop; with 6 × 4 of the 32 registers of AVX-512
 * and NEON, or 6 × 2 of 16, the loop computes more than it loads. Each sum runs over k in order, whatever the number of rows beside it,
 * so no result depends on how rows were grouped. `lines` are fetched into the second-level cache: the first has no room for them, and
 * few places to wait in. */
INLINE void TYPE(multiply_tile)(int rows, int lines, const TYPE(tile) *tile) {
    vec sum[TILE_ROWS][STRIPES];
    const elem *panel = tile->panel, *ahead = tile->ahead, *a[TILE_ROWS];
    float *c = tile->to.c;
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
        a[i] = tile->a[i];
#pragma GCC unroll 8
        for (int j = 0; j < STRIPES; j++) sum[i][j] = tile->from ? load(tile->from + (i * STRIPES + j) * LANES) : (vec){0};
    }
    for (long k = 0, at = 0; k < tile->count; k++, at += tile->step, panel += tile->stride, ahead += tile->ahead_step) {
        TYPE(operand) b[STRIPES];
#pragma GCC unroll 8
        for (int j = 0; j < lines; j++) __builtin_prefetch(ahead + j * (WIDTH * PER_UNIT / SLICES), 0, 2);
#pragma GCC unroll 8
        for (int j = 0; j < STRIPES; j++) b[j] = TYPE(fetch)(panel + j * LANES * PER_UNIT);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            TYPE(operand) x = TYPE(broadcast)(a[i] + at);
#pragma GCC unroll 8
            for (int j = 0; j < STRIPES; j++) sum[i][j] = TYPE(multiply_add)(sum[i][j], x, b[j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
        for (int j = 0; j < STRIPES; j++, c += LANES)
            if (tile->to.out) TYPE(put_away)(tile->to.out + i * tile->to.apart + j * LANES, sum[i][j], LANES);
            else store(c, tile->add ? load(c) + sum[i][j] : sum[i][j]);
}

/* The numbers of rows and of lines must be constants for the sums to live in registers. */
static void TYPE(some_rows)(int rows, int lines, const TYPE(tile) *tile) {
#define TILE(R, L) case R * 8 + L: TYPE(multiply_tile)(R, L, tile); break;
#define TILES(R) TILE(R, 0) TILE(R, 1) TILE(R, 2) TILE(R, 4)
    switch (rows * 8 + lines) { TILES(1) TILES(2) TILES(3) TILES(4) TILES(5) TILES(6) }
#undef TILES
#undef TILE
}

/* What is fetched while units k … k + part − 1 of a panel are multiplied: of an old one the part that follows, after its last part and of
 * a new one what comes next. */
INLINE TYPE(soon) TYPE(during)(TYPE(panel) panel, long k, long part, long count) {
    const long half = WIDTH * PER_UNIT / 2;
    TYPE(soon) next = panel.next;
    if (panel.old && k + part < count) next = (TYPE(soon)){{panel.at + (k + part) * panel.stride, NULL}, 0};
    for (int i = 0; i < 2 && !panel.old; i++)
        if (next.half[i]) next.half[i] += k * (next.step ? next.step : half);
    if (next.half[0] && !next.half[1]) next.half[1] = next.half[0] + part * half;
    return next;
}

/* A tile without others fetches what it will need itself, of a packed panel too: the machine foresees that, but not far enough. */
INLINE int TYPE(fetch_alone)(TYPE(panel) panel, TYPE(tile) *tile) {
    tile->ahead = tile->panel + AHEAD * panel.stride, tile->ahead_step = panel.stride;
    return panel.old ? SLICES : 0;
}

/* Several tiles share the fetching of the four slices of what is next: tile t takes the next `lines`. */
INLINE int TYPE(fetch_together)(TYPE(soon) next, long t, int lines, long part, TYPE(tile) *tile) {
    const long first = t * lines, slice = WIDTH * PER_UNIT / SLICES;
    if (first >= SLICES || !next.half[first / 2]) return 0;
    tile->ahead = next.half[first / 2] + first % 2 * (next.step ? slice : part * slice);
    tile->ahead_step = next.step ? next.step : lines * slice;
    return lines;
}

/* All rows times units k … k + part − 1 of a panel, as `tile` says for its first row. */
static void TYPE(multiply_part)(const elem *const *a, long rows, TYPE(panel) panel, long k, long part, long count, TYPE(tile) tile) {
    const long tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    const TYPE(soon) next = TYPE(during)(panel, k, part, count);
    tile.panel = panel.at + k * panel.stride, tile.stride = panel.stride, tile.count = part;
    for (long r = 0, t = 0; t < tiles; t++) {
        const int take = (int)((rows - r + tiles - t - 1) / (tiles - t)); /* 7 rows are 4 + 3, not 6 + 1: one row has too few sums */
        for (int i = 0; i < take; i++) tile.a[i] = a[r + i] + k * tile.step;
        const int lines = tiles == 1 ? TYPE(fetch_alone)(panel, &tile) : TYPE(fetch_together)(next, t, tiles >= SLICES ? 1 : 2, part, &tile);
        TYPE(some_rows)(take, lines, &tile);
        tile.to.c += take * WIDTH, tile.to.out += take * tile.to.apart, r += take;
        if (tile.from) tile.from += take * WIDTH;
    }
}

/* A · panel over `count` units, for at most CHUNK rows; unit k of row i is at a[i] + k · step. A target that is `out` needs count ≤ DEPTH.
 * A part of the panel that stays in the cache serves all rows before the next part is read, and meanwhile what follows is fetched, so
 * that the machine multiplies while it reads. A few tiles are done so soon that only small parts leave the first-level cache room for
 * what arrives; with many, going on with sums costs more than that. Sums run through DEPTH units, in parts or not, and a longer sum is
 * made of such, which has a smaller rounding error than one that runs through. */
static void TYPE(product)(const elem *const *a, long step, long rows, TYPE(panel) panel, long count, TYPE(target) to) {
    float unfinished[FEW_ROWS * WIDTH];
    const int few = panel.old && !to.out && rows > TILE_ROWS && rows <= FEW_ROWS; /* what goes to its place for good goes there once */
    long k = 0;
    do {
        const long start = k, stop = count - k < DEPTH ? count : k + DEPTH;
        float *sums = start ? unfinished : to.c;
        do {
            const long part = few && stop - k > FEW_DEPTH ? FEW_DEPTH : stop - k;
            const int last = k + part == stop;
            TYPE(tile) tile = {.from = k > start ? sums : NULL, .step = step, .to = to, .add = last && start};
            if (!last) tile.to.c = sums;
            TYPE(multiply_part)(a, rows, panel, k, part, count, tile);
            k += part;
        } while (k < stop);
    } while (k < count);
}

/* panel[k][j] = source[row k][first + j] for j < columns, 0 up to `wide`: B as it lies in memory, or columns of A for a product over rows.
 * Where units are pairs, rows 2k and 2k + 1 are interleaved, and a last odd row is paired with zeros. Rows are short pieces far apart,
 * so those that come soon are fetched. */
static void TYPE(pack_rows)(elem *restrict panel, long wide, matrix source, long rows, long first, long columns) {
    for (long k = 0; k < rows; k += PER_UNIT, panel += wide * PER_UNIT) {
        const elem *even = TYPE(row)(source, k) + first;
        for (long soon = k + PACK_AHEAD * PER_UNIT, i = soon; i < soon + PER_UNIT && i < rows; i++)
            for (long j = 0; j < columns; j += 64 / (long)sizeof *even) __builtin_prefetch(TYPE(row)(source, i) + first + j, 0, 2);
#if PER_UNIT == 2
        const elem *odd = k + 1 < rows ? TYPE(row)(source, k + 1) + first : NULL;
        if (odd)
            for (long j = 0; j < columns; j++) panel[2 * j] = even[j], panel[2 * j + 1] = odd[j];
        else
            for (long j = 0; j < columns; j++) panel[2 * j] = even[j], panel[2 * j + 1] = 0;
#else
        memcpy(panel, even, columns * sizeof *panel);
#endif
        if (columns < wide) memset(panel + columns * PER_UNIT, 0, (wide - columns) * PER_UNIT * sizeof *panel);
    }
}

/* Units k … k + LANES − 1 of LANES rows, turned. While that is done, the same pieces of the rows that follow are fetched, which lie
 * `further` elements on. `all`: none of the rows is NULL. */
INLINE void TYPE(pack_square)(elem *panel, const elem *const *rows, const elem *const *following, long k, long further, int all) {
    uvec square[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        if (!all) square[i] = (uvec){0};
        if (all || rows[i]) memcpy(&square[i], rows[i] + k * PER_UNIT, sizeof *square);
        if (all) __builtin_prefetch(following[i] + further + k * PER_UNIT, 0, 2);
    }
    transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) memcpy(panel + (k + i) * WIDTH * PER_UNIT, &square[i], sizeof *square);
}

/* panel[k][j] = rows[j][k], 0 for a row that is NULL: B lies in memory as its transpose, as weights do that are stored [out, in].
 * A square is LANES short pieces far apart, which no machine foresees; after the last rows of this panel come those of the next, whose
 * rows lie `next` elements on. */
static void TYPE(pack_transposed)(elem *panel, const elem *const rows[WIDTH], long elements, long next) {
    enum { UNIT_BYTES = PER_UNIT * sizeof(elem) };
    const long whole = UNIT_BYTES == 4 ? elements / PER_UNIT / LANES * LANES : 0;
    for (int j = 0; j < WIDTH && whole; j += LANES) {
        const elem *const *following = rows + (j + LANES) % WIDTH;
        const long further = j + LANES < WIDTH ? 0 : next;
        int all = 1;
        for (int i = 0; i < LANES; i++) all &= rows[j + i] && following[i];
        for (long k = 0; k < whole; k += LANES)
            if (all) TYPE(pack_square)(panel + j * PER_UNIT, rows + j, following, k, further, 1);
            else TYPE(pack_square)(panel + j * PER_UNIT, rows + j, following, k, further, 0);
    }
    for (long k = whole; k < TYPE(units)(elements); k++)
        for (int j = 0; j < WIDTH; j++)
            for (int half = 0; half < PER_UNIT; half++) {
                long at = k * PER_UNIT + half;
                panel[(k * WIDTH + j) * PER_UNIT + half] = rows[j] && at < elements ? rows[j][at] : 0;
            }
}
