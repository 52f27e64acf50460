/* Activations: a row of the table for each, and nothing else in these files names one.
 *
 * value      h of the two pre-activations a and u of a column; u is 0 where the activation is not gated
 * gradient   h, and da, du for a cotangent dh of h
 * Equations: (act-relu), (act-relu2), (act-gelu), (act-swiglu), (act-geglu), (act-clamped-swiglu) of the reference.
 */
#ifndef MOEBIUS_ACTIVATIONS_H
#define MOEBIUS_ACTIVATIONS_H
#include "simd.h"

struct gradient { vec h, da, du; };

struct activation {
    const char *name;
    int gated; /* the first matrix has 2F rows, gate rows first */
    vec (*value)(vec a, vec u);
    struct gradient (*gradient)(vec a, vec u, vec dh);
};

/* σ(a) = 1 / (1 + falling), falling = e^(−a). Then 1 − σ = falling · σ, which keeps its digits where σ is nearly 1. */
INLINE vec sigmoid(vec falling) { return 1.0f / (1.0f + falling); }

static vec relu_value(vec a, vec u) {
    (void)u;
    return choose(a < 0.0f, splat(0.0f), a); /* NaN < 0 is false: it passes */
}

static struct gradient relu_gradient(vec a, vec u, vec dh) {
    return (struct gradient){relu_value(a, u), choose(a > 0.0f, dh, splat(0.0f)), u};
}

static vec relu2_value(vec a, vec u) {
    vec r = relu_value(a, u);
    return r * r;
}

static struct gradient relu2_gradient(vec a, vec u, vec dh) {
    vec r = relu_value(a, u);
    return (struct gradient){r * r, dh * (r + r), u};
}

static vec swiglu_value(vec a, vec u) { return a * sigmoid(exponential(-a)) * u; }

static struct gradient swiglu_gradient(vec a, vec u, vec dh) {
    vec falling = exponential(-a), s = sigmoid(falling), silu = a * s;
    return (struct gradient){silu * u, dh * u * (s + silu * (falling * s)), dh * silu};
}

/* Φ(−v) e^(v²/2) for v ≥ 0 is smooth and falls slowly, so a polynomial in t = 1 / (1 + v/4) meets it to 2e-8 relative. The coefficients
 * are our own minimax fit on 0 ≤ v ≤ 14; beyond, e^(−v²/2) is 0 in fp32. */
INLINE vec normal_tail(vec v, vec density) {
    vec t = 1.0f / (1.0f + 0.25f * v);
    vec p = splat(0.0339494451f);
    p = p * t - 0.196191344f;
    p = p * t + 0.395032803f;
    p = p * t - 0.333509218f;
    p = p * t + 0.304518796f;
    p = p * t - 0.0204006048f;
    p = p * t + 0.121573503f;
    p = p * t + 0.0948190828f;
    p = p * t + 0.100229137f;
    p = p * t - 2.1607214e-05f;
    return p * density;
}

INLINE vec normal_cdf(vec a, vec density) {
    vec tail = normal_tail(choose(a < 0.0f, -a, a), density);
    return choose(a < 0.0f, tail, 1.0f - tail);
}

static vec gelu_value(vec a, vec u) {
    (void)u;
    return a * normal_cdf(a, exponential(-0.5f * a * a));
}

static struct gradient gelu_gradient(vec a, vec u, vec dh) {
    vec density = exponential(-0.5f * a * a), cdf = normal_cdf(a, density);
    return (struct gradient){a * cdf, dh * (cdf + a * density * 0.398942280f), u};
}

static vec geglu_value(vec a, vec u) { return gelu_value(a, u) * u; }

static struct gradient geglu_gradient(vec a, vec u, vec dh) {
    struct gradient g = gelu_gradient(a, u, dh * u);
    return (struct gradient){g.h * u, g.da, dh * g.h};
}

static const float clamp = 7.0f, steepness = 1.702f;

INLINE vec clamp_above(vec v) { return choose(v > clamp, splat(clamp), v); }
INLINE vec clamp_both(vec v) { return choose(v < -clamp, splat(-clamp), clamp_above(v)); }

static vec clamped_swiglu_value(vec a, vec u) {
    a = clamp_above(a);
    return a * sigmoid(exponential(-steepness * a)) * (clamp_both(u) + 1.0f);
}

static struct gradient clamped_swiglu_gradient(vec a, vec u, vec dh) {
    vec low = clamp_above(a), more = clamp_both(u) + 1.0f;
    vec falling = exponential(-steepness * low), s = sigmoid(falling), silu = low * s;
    vec da = dh * more * (s + steepness * silu * (falling * s)), du = dh * silu;
    da = choose(a > clamp, splat(0.0f), da);
    return (struct gradient){silu * more, da, choose((u > clamp) | (u < -clamp), splat(0.0f), du)};
}

static const struct activation activations[] = {
    {"relu", 0, relu_value, relu_gradient},
    {"gelu", 0, gelu_value, gelu_gradient},
    {"swiglu", 1, swiglu_value, swiglu_gradient},
    {"relu2", 0, relu2_value, relu2_gradient},
    {"geglu", 1, geglu_value, geglu_gradient},
    {"clamped_swiglu", 1, clamped_swiglu_value, clamped_swiglu_gradient},
};
enum { ACTIVATION_COUNT = sizeof activations / sizeof *activations };
#endif
