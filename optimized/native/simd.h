/* Vectors of fp32 for whatever machine the compiler targets, in the vector extensions that GCC and Clang share.
 *
 * LANES    numbers in a vector
 * STRIPES  vectors side by side in a register tile: as many as the register file holds, see products.h
 *
 * MOEBIUS_PLAIN asks for vectors of four without any instruction set in mind: it is what an unknown machine gets.
 */
#ifndef MOEBIUS_SIMD_H
#define MOEBIUS_SIMD_H
#include <stdint.h>
#include <string.h>

#if defined(MOEBIUS_PLAIN)
#define INSTRUCTION_SET "plain"
#define LANES 4
#define STRIPES 2
#elif defined(__AVX512F__)
#define INSTRUCTION_SET "avx512"
#define LANES 16
#define STRIPES 4
#elif defined(__AVX2__) && defined(__FMA__)
#define INSTRUCTION_SET "avx2"
#define LANES 8
#define STRIPES 2
#elif defined(__aarch64__)
#define INSTRUCTION_SET "neon"
#define LANES 4
#define STRIPES 4
#else
#define INSTRUCTION_SET "plain"
#define LANES 4
#define STRIPES 2
#endif

#if defined(__AVX512BF16__) && !defined(MOEBIUS_PLAIN) && !defined(MOEBIUS_NO_DOT)
#define HAS_BF16_DOT 1
#else
#define HAS_BF16_DOT 0
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));

INLINE vec splat(float value) { return value - (vec){0}; }

/* memcpy is how C spells an unaligned load; it compiles to one instruction. */
INLINE vec load(const float *from) { vec v; memcpy(&v, from, sizeof v); return v; }
INLINE void store(float *to, vec v) { memcpy(to, &v, sizeof v); }

/* A store past the caches: memory then neither reads a line before it is written nor keeps it. 16, 32 or 64 bytes, and aligned to them;
 * where a machine has no such store, or fewer bytes, an ordinary one. `drain` comes before anybody else reads. */
#if defined(__x86_64__) && !defined(MOEBIUS_PLAIN)
INLINE void stream(void *to, const void *from, long bytes) {
#if defined(__AVX512F__)
    if (bytes == 64) { _mm512_stream_si512(to, _mm512_loadu_si512(from)); return; }
#endif
#if defined(__AVX__)
    if (bytes == 32) { _mm256_stream_si256(to, _mm256_loadu_si256(from)); return; }
#endif
    if (bytes == 16) _mm_stream_si128(to, _mm_loadu_si128(from));
    else memcpy(to, from, bytes);
}
INLINE void drain(void) { _mm_sfence(); }
#else
INLINE void stream(void *to, const void *from, long bytes) { memcpy(to, from, bytes); }
INLINE void drain(void) {}
#endif

/* Ask for some cache lines before they are needed: for reading, or for writing. */
INLINE void expect(const void *at, long bytes, int writing) {
#pragma GCC unroll 8
    for (long i = 0; i < bytes; i += 64)
        if (writing) __builtin_prefetch((const char *)at + i, 1, 3);
        else __builtin_prefetch((const char *)at + i, 0, 3);
}

/* where yes has all bits set: a, else b. C has no ?: for vectors. */
INLINE vec choose(ivec yes, vec a, vec b) { return (vec)((yes & (ivec)a) | (~yes & (ivec)b)); }

INLINE float sum_lanes(vec v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

/* bf16 is the upper half of fp32. Rounding is to nearest, ties to even; a NaN stays one, whatever its lower half held. */
INLINE vec widen(hvec half) { return (vec)(__builtin_convertvector(half, uvec) << 16); }
INLINE hvec narrow(vec v) {
#if HAS_BF16_DOT
    return (hvec)_mm512_cvtneps_pbh((__m512)v); /* as the products of pairs, it takes a subnormal for 0 */
#endif
    uvec bits = (uvec)v, rounded = bits + 0x7fff + ((bits >> 16) & 1);
    rounded = (uvec)choose(v != v, (vec)((bits | 0x400000)), (vec)rounded);
    return __builtin_convertvector(rounded >> 16, hvec);
}

/* e^x to about one unit in the last place: 2^n from the exponent bits times a polynomial on |r| ≤ ln(2) / 2.
 * Comparisons with a NaN are false, so a NaN passes the limits and comes out as one. */
INLINE vec exponential(vec x) {
    x = choose(x > splat(88.0f), splat(88.0f), x);
    x = choose(x < splat(-87.0f), splat(-87.0f), x);
    const vec shift = splat(12582912.0f); /* 1.5 · 2^23: adding it rounds to an integer */
    vec n = (x * 1.44269504f + shift) - shift;
    vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f; /* ln 2 in two parts, the first exact in few bits */
    vec p = splat(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    return p * (vec)((__builtin_convertvector(n, ivec) + 127) << 23);
}

/* Transpose a square of LANES × LANES 32-bit numbers: first within blocks of four lanes, by single lanes and by pairs, which every
 * machine shuffles fastest; then the blocks of four themselves. */
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (uvec){__VA_ARGS__})
#endif
#if LANES == 16
#define EACH_BLOCK(a, b, c, d) a, b, c, d, a + 4, b + 4, c + 4, d + 4, a + 8, b + 8, c + 8, d + 8, a + 12, b + 12, c + 12, d + 12
#define EVEN_BLOCKS 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27
#define ODD_BLOCKS 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31
#elif LANES == 8
#define EACH_BLOCK(a, b, c, d) a, b, c, d, a + 4, b + 4, c + 4, d + 4
#define EVEN_BLOCKS 0, 1, 2, 3, 8, 9, 10, 11
#define ODD_BLOCKS 4, 5, 6, 7, 12, 13, 14, 15
#else
#define EACH_BLOCK(a, b, c, d) a, b, c, d
#endif

INLINE void transpose(uvec square[LANES]) {
    uvec turned[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i += 2) {
        turned[i] = SHUFFLE(square[i], square[i + 1], EACH_BLOCK(0, LANES, 1, LANES + 1));
        turned[i + 1] = SHUFFLE(square[i], square[i + 1], EACH_BLOCK(2, LANES + 2, 3, LANES + 3));
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i += 4)
        for (int j = 0; j < 2; j++) {
            square[i + 2 * j] = SHUFFLE(turned[i + j], turned[i + j + 2], EACH_BLOCK(0, 1, LANES, LANES + 1));
            square[i + 2 * j + 1] = SHUFFLE(turned[i + j], turned[i + j + 2], EACH_BLOCK(2, 3, LANES + 2, LANES + 3));
        }
#if LANES > 4
#pragma GCC unroll 4
    for (int blocks = LANES / 4, far = 4; blocks > 1; blocks /= 2, far *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) turned[i] = square[i];
#pragma GCC unroll 16
        for (int i = 0; i < LANES / 2; i++) {
            const int from = i % far + i / far * 2 * far;
            square[from] = SHUFFLE(turned[from], turned[from + far], EVEN_BLOCKS);
            square[from + far] = SHUFFLE(turned[from], turned[from + far], ODD_BLOCKS);
        }
    }
#endif
}
#endif
