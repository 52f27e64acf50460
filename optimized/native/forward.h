/* The forward pass in one storage type: two phases, between which all threads meet.
 *
 *   up     items are (expert, some panels): h = act(x W_upᵀ + b_up), the activation at the end of each panel
 *   down   items are (some columns of y): y_t = Σ_k g_tk (h W_downᵀ + b_down), expert after expert into the same fp32 sums
 *
 * An element of h or y has one item that writes it, so no thread waits for another and the order of no sum is left to chance.
 */

/* Where a worker packs, and where it keeps the sums of the rows it is at. */
typedef struct { elem *panel, *block; float *c; } TYPE(scratch);

INLINE TYPE(scratch) TYPE(scratch_of)(const struct plan *plan, int worker) {
    char *at = plan->scratch + worker * plan->scratch_bytes;
    elem *panel = (elem *)(at + CHUNK * WIDTH * sizeof(float));
    return (TYPE(scratch)){panel, panel + plan->panel_elements, (float *)at};
}

INLINE matrix TYPE(by_token)(const struct plan *plan, const void *tokens, long first) {
    return (matrix){tokens, plan->token_stride, plan->rows.token + first};
}

/* Rows `first` … `first + rows − 1` of A times a panel, into c. */
INLINE void TYPE(multiply)(matrix a, long first, long rows, TYPE(panel) panel, long elements, float *c) {
    const elem *from[CHUNK];
    for (long r = 0; r < rows; r++) from[r] = TYPE(row)(a, first + r);
    TYPE(product)(from, PER_UNIT, rows, panel, TYPE(units)(elements), (TYPE(target)){.c = c});
}

/* A panel that rows have been multiplied with is in the cache, and so is what it was to fetch. */
INLINE void TYPE(met)(TYPE(panel) *panel) { panel->old = 0, panel->next = TYPE(nothing); }

/* The rows of W_up that make columns first … first + half − 1 of the hidden layer: gate rows in the left half of the panel, up rows in
 * the right half, so that the activation finds both in one panel. */
static void TYPE(pack_up)(elem *panel, const elem *up, const struct shape *shape, long number) {
    const elem *from[WIDTH] = {0};
    for (long j = 0; j < shape->half && number * shape->half + j < shape->width; j++) {
        from[j] = up + (number * shape->half + j) * shape->d_model;
        if (shape->gated) from[shape->half + j] = from[j] + shape->width * shape->d_model;
    }
    TYPE(pack_transposed)(panel, from, shape->d_model, shape->half * shape->d_model);
}

static void TYPE(pack_down)(elem *panel, const elem *down, const struct shape *shape, long number) {
    const elem *from[WIDTH] = {0};
    for (long j = 0; j < WIDTH && number * WIDTH + j < shape->d_model; j++) from[j] = down + (number * WIDTH + j) * shape->width;
    TYPE(pack_transposed)(panel, from, shape->width, WIDTH * shape->width);
}

INLINE long TYPE(up_panel_elements)(const struct shape *shape) { return TYPE(padded)(shape->d_model) * WIDTH; }
INLINE long TYPE(down_panel_elements)(const struct shape *shape) { return TYPE(padded)(shape->width) * WIDTH; }

/* Panels `here` and `next` of packed weights with `panels` for each expert, of so many elements. */
INLINE TYPE(panel) TYPE(packed_panel)(const void *packed, struct place here, struct place next, long panels, long elements) {
    const elem *at = packed, *after = next.expert < 0 ? NULL : at + (next.expert * panels + next.number) * elements;
    return TYPE(whole)(at + (here.expert * panels + here.number) * elements, 1, (TYPE(soon)){{after, NULL}, 0});
}

/* The rows of W_up, and of W_down, that panel `at` is packed from. */
INLINE TYPE(soon) TYPE(up_rows)(const struct plan *plan, struct place at) {
    const struct shape *shape = &plan->shape;
    if (at.expert < 0) return TYPE(nothing);
    const elem *first = (const elem *)plan->call->up + (at.expert * shape->pre_width + at.number * shape->half) * shape->d_model;
    return (TYPE(soon)){{first, first + (shape->gated ? shape->width : WIDTH / 2) * shape->d_model}, 0};
}

INLINE TYPE(soon) TYPE(down_rows)(const struct plan *plan, struct place at) {
    const struct shape *shape = &plan->shape;
    if (at.expert < 0) return TYPE(nothing);
    return (TYPE(soon)){{(const elem *)plan->call->down + (at.expert * shape->d_model + at.number * WIDTH) * shape->width, NULL}, 0};
}

static TYPE(panel) TYPE(up_panel)(const struct plan *plan, struct place here, struct place next, elem *room) {
    const struct shape *shape = &plan->shape;
    if (plan->call->packed_up) return TYPE(packed_panel)(plan->call->packed_up, here, next, shape->up_panels, TYPE(up_panel_elements)(shape));
    TYPE(pack_up)(room, (const elem *)plan->call->up + here.expert * shape->pre_width * shape->d_model, shape, here.number);
    return TYPE(whole)(room, 0, TYPE(up_rows)(plan, next));
}

static TYPE(panel) TYPE(down_panel)(const struct plan *plan, struct place here, struct place next, elem *room) {
    const struct shape *shape = &plan->shape;
    if (plan->call->packed_down) return TYPE(packed_panel)(plan->call->packed_down, here, next, shape->d_panels, TYPE(down_panel_elements)(shape));
    TYPE(pack_down)(room, (const elem *)plan->call->down + here.expert * shape->d_model * shape->width, shape, here.number);
    return TYPE(whole)(room, 0, TYPE(down_rows)(plan, next));
}

INLINE vec TYPE(bias_at)(const elem *bias, long at, long count) { return bias ? TYPE(get)(bias + at, count) : (vec){0}; }

/* Sums of one panel to the hidden layer, and to `pre` where a backward will want it. */
static void TYPE(activate)(const struct plan *plan, const float *c, long expert, long number, long first, long rows) {
    const struct shape *shape = &plan->shape;
    const long F = shape->width, at = number * shape->half, columns = F - at < shape->half ? F - at : shape->half, bytes = columns * sizeof(elem);
    const elem *bias = plan->call->up_bias ? (const elem *)plan->call->up_bias + expert * shape->pre_width + at : NULL;
    for (long r = first; r < first + rows; r++, c += WIDTH) {
        elem *hidden = (elem *)plan->hidden + r * plan->hidden_stride + at;
        elem *pre = plan->call->pre ? (elem *)plan->call->pre + r * shape->pre_width + at : NULL;
        if (r + SOON < first + rows) {
            expect(hidden + SOON * plan->hidden_stride, bytes, 1);
            if (pre) expect(pre + SOON * shape->pre_width, bytes, 1);
            if (pre && shape->gated) expect(pre + SOON * shape->pre_width + F, bytes, 1);
        }
        for (long j = 0; j < columns; j += LANES) {
            vec a = load(c + j) + TYPE(bias_at)(bias, j, columns - j);
            vec u = shape->gated ? load(c + shape->half + j) + TYPE(bias_at)(bias, F + j, columns - j) : (vec){0};
            TYPE(put)(hidden + j, plan->activation->value(a, u), columns - j);
            if (pre) TYPE(put)(pre + j, a, columns - j);
            if (pre && shape->gated) TYPE(put)(pre + F + j, u, columns - j);
        }
    }
}

static void TYPE(up_item)(void *given, const struct item *item, int worker) {
    const struct plan *plan = given;
    const TYPE(scratch) room = TYPE(scratch_of)(plan, worker);
    const matrix x = TYPE(by_token)(plan, plan->x, 0);
    const int32_t *bounds = plan->call->bounds + item->expert;
    for (long number = item->first; number < item->last; number++) {
        TYPE(panel) panel = TYPE(up_panel)(plan, (struct place){item->expert, number}, next_in_item(plan, item, number), room.panel);
        for (long r = bounds[0]; r < bounds[1]; r += CHUNK) {
            long rows = bounds[1] - r < CHUNK ? bounds[1] - r : CHUNK;
            TYPE(multiply)(x, r, rows, panel, plan->shape.d_model, room.c);
            TYPE(met)(&panel);
            TYPE(activate)(plan, room.c, item->expert, number, r, rows);
        }
    }
}

/* One product of all rows that ends in sums per token: y, and dx in the backward. */
typedef struct {
    matrix a;
    long elements;                                                             /* of a row of a */
    TYPE(panel) (*panel)(const struct plan *, struct place here, struct place next, elem *room);
    const float *gate;                                                         /* NULL: 1 */
    const elem *bias;                                                          /* [E, D] or NULL */
    elem *out;                                                                 /* [T, D] */
} TYPE(spreading);

static void TYPE(add_rows)(const struct plan *plan, const TYPE(spreading) *from, const float *c, long expert, long number, long first, long rows) {
    const long D = plan->shape.d_model, at = number * WIDTH, columns = D - at < WIDTH ? D - at : WIDTH;
    const elem *bias = from->bias ? from->bias + expert * D + at : NULL;
    for (long r = first; r < first + rows; r++, c += WIDTH) {
        float *sum = plan->sums + plan->rows.token[r] * plan->sums_stride + at;
        vec gate = splat(from->gate ? from->gate[r] : 1.0f);
        if (r + SOON < first + rows) expect(plan->sums + plan->rows.token[r + SOON] * plan->sums_stride + at, WIDTH * sizeof *sum, 1);
        for (long j = 0; j < columns; j += LANES)
            store(sum + j, load(sum + j) + gate * (load(c + j) + TYPE(bias_at)(bias, j, columns - j)));
    }
}

static void TYPE(spread)(const struct plan *plan, const struct item *item, int worker, const TYPE(spreading) *from) {
    const TYPE(scratch) room = TYPE(scratch_of)(plan, worker);
    const long D = plan->shape.d_model, begin = item->first * WIDTH, end = item->last * WIDTH < D ? item->last * WIDTH : D;
    for (long t = item->token_first; t < item->token_last; t++)
        memset(plan->sums + t * plan->sums_stride + begin, 0, (item->last - item->first) * WIDTH * sizeof(float));
    for (long i = 0; i < plan->rows.used_count; i++) {
        const long e = plan->rows.used[i];
        const long stop = first_row_of(plan, plan->call->bounds[e], plan->call->bounds[e + 1], item->token_last);
        const long start = first_row_of(plan, plan->call->bounds[e], stop, item->token_first);
        for (long number = item->first; number < item->last && start < stop; number++) {
            const struct place next = number + 1 < item->last ? (struct place){e, number + 1} : place_of_used(plan, i + 1, item->first);
            TYPE(panel) panel = from->panel(plan, (struct place){e, number}, next, room.panel);
            for (long r = start; r < stop; r += CHUNK) {
                long rows = stop - r < CHUNK ? stop - r : CHUNK;
                TYPE(multiply)(from->a, r, rows, panel, from->elements, room.c);
                TYPE(met)(&panel);
                TYPE(add_rows)(plan, from, room.c, e, number, r, rows);
            }
        }
    }
    for (long t = item->token_first; t < item->token_last; t++)
        for (long j = begin; j < end; j += LANES)
            TYPE(put)(from->out + t * D + j, load(plan->sums + t * plan->sums_stride + j), end - j);
}

static void TYPE(down_item)(void *given, const struct item *item, int worker) {
    const struct plan *plan = given;
    const TYPE(spreading) down = {
        {plan->hidden, plan->hidden_stride, NULL}, plan->shape.width, TYPE(down_panel),
        plan->rows.gate, plan->call->down_bias, plan->call->y,
    };
    TYPE(spread)(plan, item, worker, &down);
}

static void TYPE(forward)(struct plan *plan) {
    add_expert_items(plan, TYPE(up_item), plan->shape.up_panels);
    run_items(plan);
    add_column_items(plan, TYPE(down_item));
    run_items(plan);
}

/* An item packs one expert; the buffers hold its panels one after another. */
static void TYPE(pack_item)(void *given, const struct item *item, int worker) {
    const struct plan *plan = given;
    const struct shape *shape = &plan->shape;
    const long e = item->expert, D = shape->d_model, F = shape->width;
    elem *up = (elem *)plan->call->packed_up + e * shape->up_panels * TYPE(up_panel_elements)(shape);
    elem *down = (elem *)plan->call->packed_down + e * shape->d_panels * TYPE(down_panel_elements)(shape);
    (void)worker;
    for (long number = 0; number < shape->up_panels; number++)
        TYPE(pack_up)(up + number * TYPE(up_panel_elements)(shape), (const elem *)plan->call->up + e * shape->pre_width * D, shape, number);
    for (long number = 0; number < shape->d_panels; number++)
        TYPE(pack_down)(down + number * TYPE(down_panel_elements)(shape), (const elem *)plan->call->down + e * D * F, shape, number);
}
