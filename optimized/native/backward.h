/* The backward pass in one storage type: two phases, between which all threads meet.
 *
 *   hidden    items are (expert, some panels): dh' = dy W_down, of which (h, du) = the activation's gradient for g dh', and ⟨dh', h⟩
 *   the rest  dx_t = Σ_k du W_up, as y in the forward; dW_up = duᵀ x and dW_down = dyᵀ (g h), an item being rows of one expert's
 *             gradient; dg = ⟨dh', h⟩ + ⟨dy, b_down⟩
 *
 * With the gate on the hidden layer no expert's output is needed again, and none is kept.
 */

/* The columns that a panel of a stack of matrices [E, rows, stride] is packed from: half a unit is half a row, or a row of two. */
INLINE TYPE(soon) TYPE(columns_of)(const elem *stack, long rows, long stride, struct place at) {
    if (at.expert < 0) return TYPE(nothing);
    const elem *first = stack + at.expert * rows * stride + at.number * WIDTH;
    return (TYPE(soon)){{first, first + (PER_UNIT == 2 ? stride : WIDTH / 2)}, PER_UNIT * stride};
}

/* Panel `here` of a stack as it lies in memory. Whole columns for a single tile are used where they lie: it would read only once what
 * packing had written. */
static TYPE(panel) TYPE(columns)(
    const struct plan *plan, const elem *stack, long rows, long stride, struct place here, struct place next, elem *room) {
    const long first = here.number * WIDTH, columns = between(0, stride - first, WIDTH);
    const int32_t *bounds = plan->call->bounds + here.expert;
    const matrix b = {stack + here.expert * rows * stride, stride, NULL};
    if (PER_UNIT == 1 && columns == WIDTH && bounds[1] - bounds[0] <= TILE_ROWS) return (TYPE(panel)){b.at + first, stride, 1, TYPE(nothing)};
    TYPE(pack_rows)(room, WIDTH, b, rows, first, columns);
    return TYPE(whole)(room, 0, TYPE(columns_of)(stack, rows, stride, next));
}

/* B of dh' = dy W_down, and of dx = du W_up. */
static TYPE(panel) TYPE(dhidden_panel)(const struct plan *plan, struct place here, struct place next, elem *room) {
    return TYPE(columns)(plan, plan->call->down, plan->shape.d_model, plan->shape.width, here, next, room);
}

static TYPE(panel) TYPE(dx_panel)(const struct plan *plan, struct place here, struct place next, elem *room) {
    return TYPE(columns)(plan, plan->call->up, plan->shape.pre_width, plan->shape.d_model, here, next, room);
}

/* From dh' of one panel: g h and du for the products that follow, and this panel's part of ⟨dh', h⟩. */
static void TYPE(differentiate)(const struct plan *plan, const float *c, long number, long first, long rows) {
    enum { BYTES = WIDTH * sizeof(elem) };
    const struct shape *shape = &plan->shape;
    const long F = shape->width, at = number * WIDTH, columns = F - at < WIDTH ? F - at : WIDTH;
    for (long r = first; r < first + rows; r++, c += WIDTH) {
        const elem *pre = (const elem *)plan->call->pre + r * shape->pre_width + at;
        elem *hidden = (elem *)plan->hidden + r * plan->hidden_stride + at, *dpre = (elem *)plan->dpre + r * plan->dpre_stride + at;
        vec part = {0}, gate = splat(plan->rows.gate[r]);
        if (r + SOON < first + rows) {
            const elem *pre_soon = pre + SOON * shape->pre_width, *dpre_soon = dpre + SOON * plan->dpre_stride;
            expect(hidden + SOON * plan->hidden_stride, BYTES, 1), expect(pre_soon, BYTES, 0), expect(dpre_soon, BYTES, 1);
            if (shape->gated) expect(pre_soon + F, BYTES, 0), expect(dpre_soon + F, BYTES, 1);
        }
        for (long j = 0; j < columns; j += LANES) {
            vec dh = load(c + j), u = shape->gated ? TYPE(get)(pre + F + j, columns - j) : (vec){0};
            struct gradient g = plan->activation->gradient(TYPE(get)(pre + j, columns - j), u, gate * dh);
            part += dh * g.h; /* beyond the last column dh is 0, because the panel is */
            TYPE(put)(hidden + j, gate * g.h, columns - j);
            TYPE(put)(dpre + j, g.da, columns - j);
            if (shape->gated) TYPE(put)(dpre + F + j, g.du, columns - j);
        }
        plan->dots[r * shape->hidden_panels + number] = sum_lanes(part);
    }
}

static void TYPE(hidden_item)(void *given, const struct item *item, int worker) {
    const struct plan *plan = given;
    const TYPE(scratch) room = TYPE(scratch_of)(plan, worker);
    const matrix dy = TYPE(by_token)(plan, plan->dy, 0);
    const int32_t *bounds = plan->call->bounds + item->expert;
    for (long number = item->first; number < item->last; number++) {
        TYPE(panel) panel = TYPE(dhidden_panel)(plan, (struct place){item->expert, number}, next_in_item(plan, item, number), room.panel);
        for (long r = bounds[0]; r < bounds[1]; r += CHUNK) {
            long rows = bounds[1] - r < CHUNK ? bounds[1] - r : CHUNK;
            TYPE(multiply)(dy, r, rows, panel, plan->shape.d_model, room.c);
            TYPE(met)(&panel);
            TYPE(differentiate)(plan, room.c, number, r, rows);
        }
    }
}

static void TYPE(dx_item)(void *given, const struct item *item, int worker) {
    const struct plan *plan = given;
    const TYPE(spreading) dx = {
        {plan->dpre, plan->dpre_stride, NULL}, plan->shape.pre_width, TYPE(dx_panel), NULL, NULL, plan->call->dx,
    };
    TYPE(spread)(plan, item, worker, &dx);
}

/* Where an item's rows of a gradient go, `columns` wide. */
typedef struct { elem *at; long columns; int past; } TYPE(gradient_rows);

/* Sums of one panel to rows first … first + high − 1 of them. */
static void TYPE(put_block)(TYPE(gradient_rows) to, long first, long high, long column, long wide, const float *c) {
    for (long r = 0; r < high; r++)
        for (long j = 0; j < wide; j += LANES) {
            elem *place = to.at + (first + r) * to.columns + column + j;
            if (to.past) TYPE(put_away)(place, load(c + r * WIDTH + j), wide - j);
            else TYPE(put)(place, load(c + r * WIDTH + j), wide - j);
        }
}

/* dW = Aᵀ B over the rows of an expert, `count` rows of it: columns of A become rows of A's block, so that the product above serves
 * here too. Without rows the gradient is exactly 0.
 *
 * With few rows what costs is the writing. As many panels of B as fit into a part of the second-level cache are packed at once, and then
 * a few rows of the gradient at a time are written from one end to the other. */
static void TYPE(weight_rows)(TYPE(gradient_rows) to, matrix a, matrix b, long rows, long first, long count, TYPE(scratch) room) {
    if (rows == 0) {
        memset(to.at, 0, count * to.columns * sizeof *to.at);
        return;
    }
    const long panel = TYPE(padded)(rows) * WIDTH, fitting = PANELS_BYTES / (panel * (long)sizeof(elem));
    const long together = between(1, fitting, (to.columns + WIDTH - 1) / WIDTH) * WIDTH, strip = together > WIDTH ? TILE_ROWS : CHUNK;
    const elem *from[CHUNK];
    for (long i = 0; i < count; i++) from[i] = room.block + i * PER_UNIT;
    TYPE(pack_rows)(room.block, CHUNK, a, rows, first, count);
    for (long start = 0; start < to.columns; start += together) {
        const long stop = between(0, start + together, to.columns);
        for (long at = start; at < stop; at += WIDTH)
            TYPE(pack_rows)(room.panel + (at - start) / WIDTH * panel, WIDTH, b, rows, at, between(0, stop - at, WIDTH));
        for (long i = 0; i < count; i += strip)
            for (long at = start; at < stop; at += WIDTH) {
                const long high = between(0, count - i, strip), wide = between(0, stop - at, WIDTH);
                const int whole = to.past && wide == WIDTH && TYPE(units)(rows) <= DEPTH; /* sums that go to their place at once */
                const TYPE(target) target = {room.c, whole ? to.at + i * to.columns + at : NULL, whole ? to.columns : 0};
                const TYPE(panel) here = TYPE(whole)(room.panel + (at - start) / WIDTH * panel, strip > TILE_ROWS, TYPE(nothing));
                TYPE(product)(from + i, CHUNK * PER_UNIT, high, here, TYPE(units)(rows), target);
                if (!whole) TYPE(put_block)(to, i, high, at, wide, room.c);
            }
    }
    drain();
}

/* db = Σ weight · row over the rows of an expert, for the columns of an item; c is room for their sums. */
static void TYPE(bias_part)(elem *db, matrix a, const float *weight, long rows, const struct item *item, float *c) {
    const long count = item->last - item->first;
    memset(c, 0, (CHUNK + LANES) * sizeof *c);
    for (long r = 0; r < rows; r++)
        for (long j = 0; j < count; j += LANES)
            store(c + j, load(c + j) + splat(weight ? weight[r] : 1.0f) * TYPE(get)(TYPE(row)(a, r) + item->first + j, count - j));
    for (long j = 0; j < count; j += LANES) TYPE(put)(db + item->first + j, load(c + j), count - j);
}

static void TYPE(dup_item)(void *given, const struct item *item, int worker) {
    const struct plan *plan = given;
    const TYPE(scratch) room = TYPE(scratch_of)(plan, worker);
    const long D = plan->shape.d_model, M = plan->shape.pre_width, e = item->expert;
    const long start = plan->call->bounds[e], rows = plan->call->bounds[e + 1] - start;
    const matrix dpre = {(const elem *)plan->dpre + start * plan->dpre_stride, plan->dpre_stride, NULL};
    const TYPE(gradient_rows) dup = {(elem *)plan->call->dup + (e * M + item->first) * D, D, plan->past};
    TYPE(weight_rows)(dup, dpre, TYPE(by_token)(plan, plan->x, start), rows, item->first, item->last - item->first, room);
    if (plan->call->dup_bias) TYPE(bias_part)((elem *)plan->call->dup_bias + e * M, dpre, NULL, rows, item, room.c);
}

static void TYPE(ddown_item)(void *given, const struct item *item, int worker) {
    const struct plan *plan = given;
    const TYPE(scratch) room = TYPE(scratch_of)(plan, worker);
    const long D = plan->shape.d_model, F = plan->shape.width, e = item->expert;
    const long start = plan->call->bounds[e], rows = plan->call->bounds[e + 1] - start;
    const matrix hidden = {(const elem *)plan->hidden + start * plan->hidden_stride, plan->hidden_stride, NULL};
    const matrix dy = TYPE(by_token)(plan, plan->dy, start);
    const TYPE(gradient_rows) ddown = {(elem *)plan->call->ddown + (e * D + item->first) * F, F, plan->past};
    TYPE(weight_rows)(ddown, dy, hidden, rows, item->first, item->last - item->first, room);
    if (plan->call->ddown_bias)
        TYPE(bias_part)((elem *)plan->call->ddown_bias + e * D, dy, plan->rows.gate + start, rows, item, room.c);
}

/* The gates' gradient from the parts that the panels left, in the order of the panels; a dropped assignment's is exactly 0. */
static void TYPE(gate_item)(void *given, const struct item *item, int worker) {
    const struct plan *plan = given;
    const struct moebius_call *call = plan->call;
    const long D = plan->shape.d_model, panels = plan->shape.hidden_panels;
    (void)worker;
    for (long n = plan->rows.count; n < call->tokens * call->slots; n++) call->dgate[call->order[n]] = 0;
    for (long e = item->first; e < item->last; e++) {
        const elem *bias = call->down_bias ? (const elem *)call->down_bias + e * D : NULL;
        for (long r = call->bounds[e]; r < call->bounds[e + 1]; r++) {
            float total = 0;
            for (long number = 0; number < panels; number++) total += plan->dots[r * panels + number];
            vec more = {0};
            const elem *dy = TYPE(row)(TYPE(by_token)(plan, plan->dy, 0), r);
            for (long j = 0; j < D && bias; j += LANES) more += TYPE(get)(dy + j, D - j) * TYPE(get)(bias + j, D - j);
            call->dgate[call->order[r]] = total + sum_lanes(more);
        }
    }
}

static void TYPE(backward)(struct plan *plan) {
    add_expert_items(plan, TYPE(hidden_item), plan->shape.hidden_panels);
    run_items(plan);
    add_column_items(plan, TYPE(dx_item)); /* the longest items first, so that no thread is left with one at the end */
    if (plan->call->dup) {
        add_block_items(plan, TYPE(dup_item), plan->shape.pre_width);
        add_block_items(plan, TYPE(ddown_item), plan->shape.d_model);
    }
    add_item(plan, (struct item){TYPE(gate_item), 0, 0, (int32_t)plan->call->experts, 0, 0});
    run_items(plan);
}

#undef elem
#undef matrix
#undef PER_UNIT
