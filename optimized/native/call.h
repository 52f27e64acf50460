/* What one call gets and what it works with. The letters are those of the reference: T tokens, K choices, E experts, D model width,
 * F expert width, M = 2F where the activation is gated and else F, N kept assignments. */
#ifndef MOEBIUS_CALL_H
#define MOEBIUS_CALL_H
#include <stdint.h>

/* The loader's Python mirrors this field by field. Weights and their gradients lie as transformers stores them. */
struct moebius_call {
    int64_t tokens, slots, experts, d_model, width;
    int64_t bf16, activation, threads; /* activation: a row of the table */
    const void *x;                     /* [T, D] */
    const int64_t *expert;             /* [T, K]; an id outside 0 … E − 1 is a dropped assignment */
    const float *gate;                 /* [T, K] */
    const uint8_t *keep;               /* [T, K] */
    const void *up, *down;             /* [E, M, D], [E, D, F] */
    const void *up_bias, *down_bias;   /* [E, M], [E, D], or NULL */
    const void *packed_up, *packed_down; /* what moebius_pack wrote, or NULL */
    int32_t *order;                    /* [T · K]: assignments in expert order, the dropped ones last */
    int32_t *bounds;                   /* [E + 1]: expert e owns places bounds[e] … bounds[e + 1] − 1 */
    void *pre;                         /* [T · K, M]: before the activation, in expert order; NULL where no gradient is wanted */
    void *y;                           /* [T, D] */
    const void *dy;                    /* from here on for the backward: [T, D] */
    void *dx;                          /* [T, D] */
    float *dgate;                      /* [T, K] */
    void *dup, *ddown;                 /* like the weights, or NULL where they are not wanted */
    void *dup_bias, *ddown_bias;
};

/* Expert order, which every step shares. */
struct rows {
    long count, largest;      /* N; the most rows of one expert */
    int32_t *token;           /* [N] */
    float *gate;              /* [N] */
    int32_t *used;            /* the experts that have rows */
    long used_count;
};

/* An item of work: columns first … last − 1 of something, for one expert or for all of them. */
struct item {
    void (*run)(void *plan, const struct item *item, int worker);
    int32_t expert;
    int32_t first, last;
    int32_t token_first, token_last;
};
#endif
