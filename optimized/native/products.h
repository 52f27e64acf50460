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

/* A panel, and how far one unit of it is from the next: packed ones lie close, and one that is used where it lies does not.
 * `next`: one that was packed long ago, and so must be fetched from memory, is followed by this one; NULL for all others. */
typedef struct { const elem *at; long stride; const elem *next; } TYPE(panel);

INLINE TYPE(panel) TYPE(whole)(const elem *packed, const elem *next) { return (TYPE(panel)){packed, WIDTH * PER_UNIT, next}; }

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

/* A register tile: `rows` rows of A times one panel. rows · STRIPES sums stay in registers for the whole loop; with 6 × 4 of the 32
 * registers of AVX-512 and NEON, or 6 × 2 of 16, the loop computes more than it loads. Each sum runs over k in order, whatever the
 * number of rows beside it, so no result depends on how rows were grouped. `add`: to what c holds. */
INLINE void TYPE(tile)(
    int rows, int slices, const elem *const *a, long step, const elem *panel, long stride, long count, float *c, int add, const elem *ahead) {
    vec sum[TILE_ROWS][STRIPES];
    const long far = stride == WIDTH * PER_UNIT ? 0 : AHEAD * stride; /* what lies close the machine fetches by itself */
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
        for (int j = 0; j < STRIPES; j++) sum[i][j] = (vec){0};
    for (long k = 0, at = 0; k < count; k++, at += step, panel += stride) {
        TYPE(operand) b[STRIPES];
        if (far)
#pragma GCC unroll 8
            for (int j = 0; j < STRIPES; j++) __builtin_prefetch(panel + far + j * LANES * PER_UNIT);
#pragma GCC unroll 8
        for (int j = 0; j < slices; j++) __builtin_prefetch(ahead + (k * slices + j) * (WIDTH * PER_UNIT / SLICES));
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
        for (int j = 0; j < STRIPES; j++, c += LANES) store(c, add ? load(c) + sum[i][j] : sum[i][j]);
}

/* The numbers of rows and of slices must be constants for the sums to live in registers. */
static void TYPE(some_rows)(
    int rows, int slices, const elem *const *a, long step, const elem *panel, long stride, long count, float *c, int add, const elem *ahead) {
#define TILE(R, S) case R * 8 + S: TYPE(tile)(R, S, a, step, panel, stride, count, c, add, ahead); break;
#define TILES(R) TILE(R, 0) TILE(R, 1) TILE(R, 2) TILE(R, 4)
    switch (rows * 8 + slices) { TILES(1) TILES(2) TILES(3) TILES(4) TILES(5) TILES(6) }
#undef TILES
#undef TILE
}

/* c[rows][WIDTH] = A · panel over `count` units, for at most CHUNK rows; unit k of row i is at a[i] + k · step.
 * A part of the panel that stays in the cache serves all rows before the next part is read; and a long sum made of the sums of its
 * parts has a smaller rounding error than one that runs through. The tiles share the fetching of the part that follows, so that the
 * machine multiplies while it reads; a tile without others fetches what it will need itself. */
static void TYPE(product)(const elem *const *a, long step, long rows, TYPE(panel) panel, long count, float *c) {
    const long tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, slice = WIDTH * PER_UNIT / SLICES, packed = panel.stride == WIDTH * PER_UNIT;
    const int each = tiles >= SLICES ? 1 : tiles > 1 ? 2 : 4;
    for (long k = 0; k < count || k == 0; k += DEPTH) {
        const long part = count - k < DEPTH ? count - k : DEPTH;
        const elem *here = panel.at + k * panel.stride, *next = packed && k + part < count ? here + part * panel.stride : panel.next;
        for (long r = 0, t = 0; t < tiles; t++) {
            const int take = (int)((rows - r + tiles - t - 1) / (tiles - t)); /* 7 rows are 4 + 3, not 6 + 1: short tiles waste loads */
            const int slices = (tiles > 1 ? next && t * each < SLICES : panel.next != NULL) ? each : 0;
            const elem *from[TILE_ROWS];
            for (int i = 0; i < take; i++) from[i] = a[r + i] + k * step;
            TYPE(some_rows)(
                take, slices, from, step, here, panel.stride, part, c + r * WIDTH, k > 0,
                !slices ? NULL : tiles > 1 ? next + t * each * part * slice : here + ALONE_AHEAD * WIDTH * PER_UNIT);
            r += take;
        }
    }
}

/* panel[k][j] = source[row k][first + j] for j < columns, 0 up to `wide`: B as it lies in memory, or columns of A for a product over rows.
 * Where units are pairs, rows 2k and 2k + 1 are interleaved, and a last odd row is paired with zeros. */
static void TYPE(pack_rows)(elem *restrict panel, long wide, matrix source, long rows, long first, long columns) {
    for (long k = 0; k < rows; k += PER_UNIT, panel += wide * PER_UNIT) {
        const elem *even = TYPE(row)(source, k) + first;
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

/* panel[k][j] = rows[j][k], 0 for a row that is NULL: B lies in memory as its transpose, as weights do that are stored [out, in].
 * A square is LANES short pieces far apart, which no machine foresees: while one is turned, the pieces that are next in memory are
 * fetched, those of the next LANES rows, or after the last ones those of the next panel, whose rows lie `next` elements on. */
static void TYPE(pack_transposed)(elem *panel, const elem *const rows[WIDTH], long elements, long next) {
    enum { UNIT_BYTES = PER_UNIT * sizeof(elem) };
    const long whole = UNIT_BYTES == 4 ? elements / PER_UNIT / LANES * LANES : 0;
    for (int j = 0; j < WIDTH && whole; j += LANES) {
        const elem *const *following = rows + (j + LANES) % WIDTH;
        const long further = j + LANES < WIDTH ? 0 : next;
        for (long k = 0; k < whole; k += LANES) {
            uvec square[LANES];
            for (int i = 0; i < LANES; i++) {
                square[i] = (uvec){0};
                if (rows[j + i]) memcpy(&square[i], rows[j + i] + k * PER_UNIT, sizeof *square);
                if (following[i]) __builtin_prefetch(following[i] + further + k * PER_UNIT, 0, 2);
            }
            transpose(square);
            for (int i = 0; i < LANES; i++) memcpy(panel + ((k + i) * WIDTH + j) * PER_UNIT, &square[i], sizeof *square);
        }
    }
    for (long k = whole; k < TYPE(units)(elements); k++)
        for (int j = 0; j < WIDTH; j++)
            for (int half = 0; half < PER_UNIT; half++) {
                long at = k * PER_UNIT + half;
                panel[(k * WIDTH + j) * PER_UNIT + half] = rows[j] && at < elements ? rows[j][at] : 0;
            }
}
