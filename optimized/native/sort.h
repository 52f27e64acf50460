/* A counting sort: assignments to expert order, each expert's in the order of their tokens. */
#ifndef MOEBIUS_SORT_H
#define MOEBIUS_SORT_H
#include "call.h"

INLINE int is_kept(const struct moebius_call *call, long assignment) {
    return call->keep[assignment] && call->expert[assignment] >= 0 && call->expert[assignment] < call->experts;
}

static void sort_by_expert(const struct moebius_call *call) {
    const long count = call->tokens * call->slots;
    int32_t *next = call->bounds + 1; /* while placing, next[e] is expert e's next free place; at the end, where it ends */
    memset(call->bounds, 0, (call->experts + 1) * sizeof *call->bounds);
    for (long a = 0; a < count; a++)
        if (is_kept(call, a)) next[call->expert[a]]++;
    int32_t place = 0;
    for (long e = 0; e < call->experts; e++) {
        int32_t rows = next[e];
        next[e] = place;
        place += rows;
    }
    for (long a = 0; a < count; a++) call->order[is_kept(call, a) ? next[call->expert[a]]++ : place++] = (int32_t)a;
}

/* What the steps read of the order, from the order alone, so that a backward can start from a saved one. */
static void describe_rows(const struct moebius_call *call, struct rows *rows) {
    for (long n = 0; n < rows->count; n++) {
        rows->token[n] = call->order[n] / (int32_t)call->slots;
        rows->gate[n] = call->gate[call->order[n]];
    }
    rows->used_count = 0;
    for (int32_t e = 0; e < call->experts; e++)
        if (call->bounds[e + 1] > call->bounds[e]) rows->used[rows->used_count++] = e;
}

static long most_rows(const struct moebius_call *call) {
    long largest = 0;
    for (long e = 0; e < call->experts; e++) {
        long rows = call->bounds[e + 1] - call->bounds[e];
        if (rows > largest) largest = rows;
    }
    return largest;
}
#endif
