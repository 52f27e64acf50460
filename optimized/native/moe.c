/* A Mixture-of-Experts layer's experts on a CPU: sort, gather, both matrices with the activation between them, and combine, in one
 * call; forward and backward, fp32 and bf16. The equations are those of the reference, and its names.
 *
 *   simd.h         vectors of whatever the machine has         threads.h   the team that shares out the work
 *   activations.h  a table                                     sort.h      assignments to expert order
 *   products.h     panels and register tiles                   forward.h, backward.h   the phases
 */
#include <stdlib.h>
#include <sys/mman.h>

#include "activations.h"
#include "simd.h"
#include "threads.h"
#include "call.h"
#include "sort.h"

enum {
    ABI = 1,                 /* raised when struct moebius_call changes */
    WIDTH = LANES * STRIPES, /* columns of a panel */
    TILE_ROWS = 6,
    CHUNK = 192,             /* rows that are multiplied before the epilogue looks at them: their sums stay in the first-level cache */
    DEPTH = 256,             /* units of a panel that are used at once, by many rows; */
    FEW_DEPTH = 64,          /* by few, */
    FEW_ROWS = 3 * TILE_ROWS, /* which are up to so many, and more than a tile has */
    SLICES = 4,              /* a part of a panel is fetched ahead in so many pieces */
    ITEMS_PER_THREAD = 4,
    KEPT_BYTES = 256 << 20,  /* a workspace up to this size is kept for the next call: new pages cost more than the work on them */
    HUGE_PAGE = 2 << 20,
    SAMPLES = 16,
    AHEAD = 32,                 /* units of a panel that a tile without others fetches before it uses them */
    PACK_AHEAD = 16,            /* units that are fetched before they are packed */
    SOON = 6,                   /* rows that are fetched before an epilogue is at them */
    PAST_BYTES = 8 << 20,       /* a stack of gradients from this size on is written past the caches */
    PANELS_BYTES = 256 << 10,   /* so much of B is packed at once for a gradient's rows: a part of the second-level cache */
};

/* Sizes that both passes need. */
struct shape {
    int gated;
    long d_model, width, pre_width;          /* D, F, M */
    long half;                               /* columns of the hidden layer that one panel of W_up makes */
    long up_panels, d_panels, hidden_panels; /* panels that make h, panels over D, panels over F */
};

/* One call at work: what was asked, and the workspace it was given. */
struct plan {
    const struct moebius_call *call;
    const struct activation *activation;
    struct shape shape;
    struct rows rows;
    int threads;
    const void *x, *dy;                      /* by token, at token_stride: the call's, or copies whose rows hold whole units */
    long token_stride;
    void *hidden, *dpre;                     /* by row: h (backward: g h) and du */
    long hidden_stride, dpre_stride;
    float *dots;                             /* [N, hidden_panels] parts of ⟨dh', h⟩ */
    float *sums;                             /* [T, D rounded up to whole panels] fp32 */
    long sums_stride;
    char *scratch;                           /* one piece for each worker */
    long scratch_bytes, panel_elements;
    int past;                                /* gradients too large for any cache are written past them */
    struct item *items;
    long item_count;
};

/* The rows of an expert whose tokens lie in a range are neighbours, because they are sorted by token. */
static long first_row_of(const struct plan *plan, long from, long to, long token) {
    while (from < to) {
        long middle = (from + to) / 2;
        if (plan->rows.token[middle] < token) from = middle + 1;
        else to = middle;
    }
    return from;
}

/* Panel `number` of an expert's matrix. An expert below 0: there is none. */
struct place { long expert, number; };

static const struct place nowhere = {-1, 0};

/* The i-th expert that has rows. */
static struct place place_of_used(const struct plan *plan, long i, long number) {
    return i < plan->rows.used_count ? (struct place){plan->rows.used[i], number} : nowhere;
}

/* What a thread reads after a panel of an expert's item. After its last panel that is a guess: threads take items in turn, so the other
 * ones get the experts between. */
static struct place next_in_item(const struct plan *plan, const struct item *item, long number) {
    const int32_t *bounds = plan->call->bounds;
    const long experts = plan->call->experts;
    if (number + 1 < item->last) return (struct place){item->expert, number + 1};
    long e = item->expert;
    for (int turn = 0; turn < plan->threads && e < experts; turn++)
        do e++;
        while (e < experts && bounds[e] == bounds[e + 1]);
    return e < experts ? (struct place){e, 0} : nowhere;
}

static void add_item(struct plan *plan, struct item item) { plan->items[plan->item_count++] = item; }

/* Columns 0 … columns − 1 in `parts` parts that differ by one at most. */
static int32_t part_start(long columns, long part, long parts) { return (int32_t)(columns * part / parts); }

static long between(long low, long value, long high) { return value < low ? low : value > high ? high : value; }

/* An expert's panels in as many items as its share of the rows asks for: one expert that has all rows still keeps all threads busy. */
static void add_expert_items(struct plan *plan, void (*run)(void *, const struct item *, int), long panels) {
    const long wanted = plan->threads == 1 ? 0 : plan->threads * ITEMS_PER_THREAD;
    for (long i = 0; i < plan->rows.used_count; i++) {
        const int32_t e = plan->rows.used[i];
        const long rows = plan->call->bounds[e + 1] - plan->call->bounds[e];
        const long parts = between(1, wanted * rows / plan->rows.count + (wanted > 0), panels);
        for (long p = 0; p < parts; p++)
            add_item(plan, (struct item){run, e, part_start(panels, p, parts), part_start(panels, p + 1, parts), 0, 0});
    }
}

/* All columns of a result per token, and where there are fewer panels than threads, its tokens too. */
static void add_column_items(struct plan *plan, void (*run)(void *, const struct item *, int)) {
    const long panels = plan->shape.d_panels, wanted = plan->threads == 1 ? 1 : 2 * plan->threads;
    const long parts = between(1, wanted, panels), ranges = between(1, (wanted + parts - 1) / parts, between(1, plan->call->tokens, wanted));
    for (long p = 0; p < parts; p++)
        for (long t = 0; t < ranges; t++)
            add_item(plan, (struct item){run, 0, part_start(panels, p, parts), part_start(panels, p + 1, parts),
                                         part_start(plan->call->tokens, t, ranges), part_start(plan->call->tokens, t + 1, ranges)});
}

/* Every expert's gradient in blocks of at most CHUNK rows of the matrix. */
static void add_block_items(struct plan *plan, void (*run)(void *, const struct item *, int), long matrix_rows) {
    for (int32_t e = 0; e < plan->call->experts; e++)
        for (long first = 0; first < matrix_rows; first += CHUNK)
            add_item(plan, (struct item){run, e, (int32_t)first, (int32_t)between(0, first + CHUNK, matrix_rows), 0, 0});
}

static void run_item(void *given, long number, int worker) {
    struct plan *plan = given;
    plan->items[number].run(plan, &plan->items[number], worker);
}

static void run_items(struct plan *plan) {
    share_out(run_item, plan, plan->item_count, plan->threads);
    plan->item_count = 0;
}

#define TYPE(name) name##_fp32
#define STORED_BF16 0
#include "products.h"
#include "forward.h"
#include "backward.h"
#undef TYPE
#undef STORED_BF16

#define TYPE(name) name##_bf16
#define STORED_BF16 1
#include "products.h"
#include "forward.h"
#include "backward.h"

static struct shape shape_of(const struct moebius_call *call) {
    const int gated = activations[call->activation].gated;
    const long D = call->d_model, F = call->width, half = gated ? WIDTH / 2 : WIDTH;
    return (struct shape){
        gated, D, F, gated ? 2 * F : F, half, (F + half - 1) / half, (D + WIDTH - 1) / WIDTH, (F + WIDTH - 1) / WIDTH,
    };
}

/* Pieces of one allocation, each on a cache line of its own. With a base of NULL this only adds up. */
static void *piece(char **base, long *used, long bytes) {
    void *at = *base ? *base + *used : NULL;
    *used += (bytes + 63) / 64 * 64;
    return at;
}

static long most_items(const struct plan *plan) {
    const struct shape *shape = &plan->shape;
    const long blocks = (shape->pre_width + CHUNK - 1) / CHUNK + (shape->d_model + CHUNK - 1) / CHUNK;
    const long split = 2 * (long)plan->threads * ITEMS_PER_THREAD + plan->rows.used_count;
    return split + plan->call->experts * blocks + 4 * plan->threads * plan->threads + 16;
}

/* Lay the workspace out from `base` and return its size. */
static long lay_out(struct plan *plan, char *base) {
    const struct moebius_call *call = plan->call;
    const struct shape *shape = &plan->shape;
    const long N = plan->rows.count, T = call->tokens, D = shape->d_model, size = call->bf16 ? 2 : 4;
    const long unit = call->bf16 && HAS_BF16_DOT ? 2 : 1, deepest = between(D, plan->rows.largest, 1L << 40);
    long used = 0;
    plan->rows.token = piece(&base, &used, N * sizeof(int32_t));
    plan->rows.gate = piece(&base, &used, N * sizeof(float));
    plan->rows.used = piece(&base, &used, call->experts * sizeof(int32_t));
    plan->items = piece(&base, &used, most_items(plan) * sizeof(struct item));
    plan->hidden_stride = (shape->width + unit - 1) / unit * unit;
    plan->dpre_stride = (shape->pre_width + unit - 1) / unit * unit;
    plan->past = call->experts * D * shape->width * size >= PAST_BYTES;
    plan->hidden = piece(&base, &used, N * plan->hidden_stride * size);
    plan->dpre = piece(&base, &used, call->dy ? N * plan->dpre_stride * size : 0);
    plan->dots = piece(&base, &used, call->dy ? N * shape->hidden_panels * sizeof(float) : 0);
    plan->sums_stride = shape->d_panels * WIDTH;
    plan->sums = piece(&base, &used, T * plan->sums_stride * sizeof(float));
    plan->token_stride = (D + unit - 1) / unit * unit;
    plan->x = plan->token_stride == D ? call->x : piece(&base, &used, T * plan->token_stride * size);
    plan->dy = plan->token_stride == D || !call->dy ? call->dy : piece(&base, &used, T * plan->token_stride * size);
    plan->panel_elements = (between(deepest, shape->pre_width, 1L << 40) + unit) * WIDTH + PANELS_BYTES / size;
    const long block = call->dy ? (plan->rows.largest + unit) * CHUNK : 0;
    plan->scratch_bytes = (CHUNK * WIDTH * 4 + (plan->panel_elements + block) * size + 4095) / 4096 * 4096;
    plan->scratch = piece(&base, &used, plan->scratch_bytes * plan->threads);
    return used;
}

/* Rows whose last unit is only half theirs get a copy that ends in a 0. */
static void pad_rows(const void *to, const void *from, long rows, long bytes, long stride) {
    if (to == from) return;
    for (long r = 0; r < rows; r++) {
        memcpy((char *)to + r * stride, (const char *)from + r * bytes, bytes);
        memset((char *)to + r * stride + bytes, 0, stride - bytes);
    }
}

static void pad_operands(struct plan *plan) {
    const struct moebius_call *call = plan->call;
    const long size = call->bf16 ? 2 : 4, bytes = plan->shape.d_model * size, stride = plan->token_stride * size;
    pad_rows(plan->x, call->x, call->tokens, bytes, stride);
    if (call->dy) pad_rows(plan->dy, call->dy, call->tokens, bytes, stride);
    if (plan->hidden_stride != plan->shape.width) memset(plan->hidden, 0, plan->rows.count * plan->hidden_stride * size);
    if (plan->dpre_stride != plan->shape.pre_width && call->dy) memset(plan->dpre, 0, plan->rows.count * plan->dpre_stride * size);
}

static void advise_huge_pages(const void *at, long bytes) {
#ifdef MADV_HUGEPAGE
    char *first = (char *)(((uintptr_t)at + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE), *last = (char *)at + bytes;
    if (last > first) madvise(first, (last - first) / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE); /* advice: it does not matter whether it is taken */
#else
    (void)at, (void)bytes;
#endif
}

static void *new_workspace(long bytes) {
    const long unit = bytes < HUGE_PAGE ? 64 : HUGE_PAGE, whole = (bytes + unit - 1) / unit * unit;
    void *made = aligned_alloc(unit, whole ? whole : unit);
    if (made) advise_huge_pages(made, whole);
    return made;
}

static struct { void *at; long bytes; } kept; /* guarded by team.busy */

/* The kept workspace, larger if need be. NULL: no memory. */
static void *kept_workspace(long bytes) {
    if (bytes > kept.bytes) {
        free(kept.at);
        kept.at = new_workspace(bytes);
        kept.bytes = kept.at ? bytes : 0;
    }
    return kept.at;
}

void moebius_release(void) {
    pthread_mutex_lock(&team.busy);
    free(kept.at);
    kept.at = NULL, kept.bytes = 0;
    pthread_mutex_unlock(&team.busy);
}

enum { DONE = 0, NO_MEMORY = 1, NOT_OURS = 2 };

static int carry_out(struct plan *plan, void (*pass)(struct plan *), int alone) {
    const long bytes = lay_out(plan, NULL);
    void *base = alone ? new_workspace(bytes) : kept_workspace(bytes);
    if (!base) return NO_MEMORY;
    lay_out(plan, base);
    describe_rows(plan->call, &plan->rows);
    pad_operands(plan);
    pass(plan);
    if (alone) free(base);
    else if (kept.bytes > KEPT_BYTES) free(kept.at), kept.at = NULL, kept.bytes = 0;
    return DONE;
}

/* One call has the team. A call from another thread at the same time works alone, with memory of its own, and its results are the same. */
static int with_team(const struct moebius_call *call, void (*pass)(struct plan *)) {
    if (call->activation < 0 || call->activation >= ACTIVATION_COUNT) return NOT_OURS;
    const int alone = pthread_mutex_trylock(&team.busy) != 0;
    struct plan plan = {
        .call = call, .activation = &activations[call->activation], .shape = shape_of(call),
        .rows.count = call->bounds[call->experts], .rows.largest = most_rows(call),
        .threads = alone ? 1 : (int)between(1, call->threads, MOST_THREADS),
    };
    const int result = carry_out(&plan, pass, alone);
    if (!alone) pthread_mutex_unlock(&team.busy);
    return result;
}

/* Nobody computes the places of dropped assignments, and what is saved must not hold what memory happened to hold. */
static void clear_dropped(const struct moebius_call *call) {
    const long N = call->bounds[call->experts], M = shape_of(call).pre_width, size = call->bf16 ? 2 : 4;
    if (call->pre) memset((char *)call->pre + N * M * size, 0, (call->tokens * call->slots - N) * M * size);
}

int moebius_forward(const struct moebius_call *call) {
    sort_by_expert(call);
    clear_dropped(call);
    return with_team(call, call->bf16 ? forward_bf16 : forward_fp32);
}

int moebius_backward(const struct moebius_call *call) { return with_team(call, call->bf16 ? backward_bf16 : backward_fp32); }

/* Some of the 8-byte words of a tensor, spread evenly, in one number. */
uint64_t moebius_sample(const char *at, int64_t bytes) {
    uint64_t sum = (uint64_t)bytes;
    for (int64_t i = 0; i < SAMPLES && bytes >= 8; i++) {
        uint64_t word;
        memcpy(&word, at + (bytes / 8 - 1) * i / (SAMPLES - 1) * 8, 8);
        sum = (sum ^ word) * 0x9e3779b97f4a7c15u;
        sum ^= sum >> 29;
    }
    return sum;
}

static void pack_everything(struct plan *plan) {
    for (int32_t e = 0; e < plan->call->experts; e++)
        add_item(plan, (struct item){plan->call->bf16 ? pack_item_bf16 : pack_item_fp32, e, 0, 0, 0, 0});
    run_items(plan);
}

void moebius_packed_elements(const struct moebius_call *call, int64_t sizes[2]) {
    const struct shape shape = shape_of(call);
    const long up = call->bf16 ? up_panel_elements_bf16(&shape) : up_panel_elements_fp32(&shape);
    const long down = call->bf16 ? down_panel_elements_bf16(&shape) : down_panel_elements_fp32(&shape);
    sizes[0] = call->experts * shape.up_panels * up;
    sizes[1] = call->experts * shape.d_panels * down;
}

/* Fill packed_up and packed_down, whose sizes moebius_packed_elements gives, from up and down. */
int moebius_pack(const struct moebius_call *call) {
    int64_t sizes[2];
    moebius_packed_elements(call, sizes);
    advise_huge_pages(call->packed_up, sizes[0] * (call->bf16 ? 2 : 4));
    advise_huge_pages(call->packed_down, sizes[1] * (call->bf16 ? 2 : 4));
    return with_team(call, pack_everything);
}

/* For the loader: is this the library that it believes to have built? */
int64_t moebius_abi(void) { return ABI * 100000 + (int64_t)sizeof(struct moebius_call); }
const char *moebius_instruction_set(void) { return HAS_BF16_DOT ? INSTRUCTION_SET "+bf16" : INSTRUCTION_SET; }
const char *moebius_activation(int64_t number) { return number >= 0 && number < ACTIVATION_COUNT ? activations[number].name : NULL; }
