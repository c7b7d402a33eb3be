/* Products of few rows with a matrix that is read once, e^x and attention's softmax, in fp32.
 *
 * The matrix goes by OUTS lines at a time, which meet all rows while they are in the first cache. A sum runs
 * over LANES partial sums in a fixed order, and a product is fused with a sum where `fused` says so, nowhere
 * else (-ffp-contract=off): a row's result depends on nothing but the row, whatever compiles this.
 */
#include <string.h>
#include "threads.h"
#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

#define ROWS 4
#define OUTS 4
#define AHEAD 4 /* groups of lines between what is read and what is asked of memory */
#define EACH(rows) _Pragma("GCC unroll 4") for (int r = 0; r < (rows); r++)
#define ALSO(outs) _Pragma("GCC unroll 4") for (int o = 0; o < (outs); o++)
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float vec4 __attribute__((vector_size(16)));

INLINE vec every(float x) { return x - (vec){0}; }

/* a · b + c, rounded once where the processor can. */
INLINE vec fused(vec a, vec b, vec c) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    __m256 x[2], y[2], z[2];
    memcpy(x, &a, sizeof a);
    memcpy(y, &b, sizeof b);
    memcpy(z, &c, sizeof c);
    for (int i = 0; i < 2; i++) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
    memcpy(&c, z, sizeof c);
    return c;
#elif defined(__FP_FAST_FMAF)
    for (int l = 0; l < LANES; l++) c[l] = __builtin_fmaf(a[l], b[l], c[l]);
    return c;
#else
    return a * b + c;
#endif
}

/* Sums of four vectors, each in the order of `total`. */
INLINE vec4 totals(vec a, vec b, vec c, vec d) {
#define HALVES(x, y)                                                                                        \
    (__builtin_shufflevector(x, y, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +                \
     __builtin_shufflevector(x, y, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#define QUARTERS(x, y)                                                                                      \
    (__builtin_shufflevector(x, y, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +              \
     __builtin_shufflevector(x, y, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31))
    vec v = QUARTERS(HALVES(a, b), HALVES(c, d));
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    v += __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return __builtin_shufflevector(v, v, 0, 4, 8, 12);
}

/* The sum over the lanes: halves, quarters and so on are added. */
INLINE float total(vec v) { return totals(v, v, v, v)[0]; }

INLINE vec load(const float *from, long count) {
    vec v = {0};
    memcpy(&v, from, count * sizeof(float));
    return v;
}

/* y[r][0 .. outs) = w[0 .. outs) · x[r]; the loops over rows and outs vanish into registers. */
INLINE void block(int rows, int outs, long width, const float **x, const float *w, float **y, long at) {
    vec sum[ROWS][OUTS];
    EACH(rows) ALSO(outs) sum[r][o] = (vec){0};
    long c = 0;
    for (; c + LANES <= width; c += LANES) {
        vec line[OUTS];
        ALSO(outs) {
            line[o] = *(const vec *)(w + o * width + c);
            __builtin_prefetch(w + (o + AHEAD * OUTS) * width + c, 0, 2); /* into the second cache */
        }
        EACH(rows) {
            const vec here = *(const vec *)(x[r] + c);
            ALSO(outs) sum[r][o] = fused(here, line[o], sum[r][o]);
        }
    }
    const long rest = width - c;
    if (rest)
        EACH(rows) ALSO(outs) {
            const vec line = load(w + o * width + c, rest);
            sum[r][o] = fused(load(x[r] + c, rest), line, sum[r][o]);
        }
    if (outs == OUTS)
        EACH(rows) {
            const vec4 four = totals(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
            memcpy(y[r] + at, &four, sizeof four);
        }
    else
        EACH(rows) ALSO(outs) y[r][at + o] = total(sum[r][o]);
}

#define EACH_ROWS(rows, outs)                                                                               \
    switch (rows) {                                                                                         \
    case 1: block(1, outs, width, x + r, w + o * width, y + r, o); break;                                   \
    case 2: block(2, outs, width, x + r, w + o * width, y + r, o); break;                                   \
    case 3: block(3, outs, width, x + r, w + o * width, y + r, o); break;                                   \
    default: block(ROWS, outs, width, x + r, w + o * width, y + r, o);                                      \
    }

/* y[r] [num_outs] = w [num_outs, width] · x[r] [width], of n rows */
static void product(long n, long num_outs, long width, const float **x, const float *w, float **y) {
    long o = 0;
    for (; o + OUTS <= num_outs; o += OUTS)
        for (long r = 0; r < n; r += ROWS) EACH_ROWS(n - r, OUTS)
    for (; o < num_outs; o++)
        for (long r = 0; r < n; r += ROWS) EACH_ROWS(n - r, 1)
}

/* e^x to about 1e-7: 2^k by the exponent's bits, the rest by a polynomial on |r| <= ln 2 / 2. */
INLINE float exponential(float x) {
    const float magic = 12582912.0f; /* adding it rounds to an integer, in the low bits */
    x = x < -87.0f ? -87.0f : x > 87.0f ? 87.0f : x;
    const float shifted = x * 1.44269504f + magic, k = shifted - magic;
    const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int bits = (int)k;
    bits = (bits + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof bits);
    return p * power;
}

/* Logits [n] of one head become weights; the sink's weight comes back. */
INLINE float soften(long n, float scale, float sink, float *logits) {
    float largest[LANES], sum[LANES] = {0}, most = sink, all = 0;
    for (int l = 0; l < LANES; l++) largest[l] = sink;
    long i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) {
            logits[i + l] *= scale;
            largest[l] = logits[i + l] > largest[l] ? logits[i + l] : largest[l];
        }
    for (; i < n; i++) {
        logits[i] *= scale;
        most = logits[i] > most ? logits[i] : most;
    }
    for (int l = 0; l < LANES; l++) most = largest[l] > most ? largest[l] : most;
    for (i = 0; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) sum[l] += logits[i + l] = exponential(logits[i + l] - most);
    for (; i < n; i++) all += logits[i] = exponential(logits[i] - most);
    for (int l = 0; l < LANES; l++) all += sum[l];
    const float own = exponential(sink - most);
    all += own;
    for (i = 0; i < n; i++) logits[i] /= all;
    return own / all;
}

/* sum [C] += Σ_j weight[j] keys[j] */
INLINE void weigh(long n, long C, const float *weight, const float *keys, float *sum) {
    long c = 0;
    for (; c + 4 * LANES <= C; c += 4 * LANES) {
        vec part[4];
        ALSO(4) part[o] = *(const vec *)(sum + c + o * LANES);
        for (long j = 0; j < n; j++)
            ALSO(4) {
                const vec key = *(const vec *)(keys + j * C + c + o * LANES);
                part[o] = fused(every(weight[j]), key, part[o]);
            }
        ALSO(4) *(vec *)(sum + c + o * LANES) = part[o];
    }
    for (; c + LANES <= C; c += LANES) {
        vec part = *(const vec *)(sum + c);
        for (long j = 0; j < n; j++) part = fused(every(weight[j]), *(const vec *)(keys + j * C + c), part);
        *(vec *)(sum + c) = part;
    }
    for (long j = 0; j < n; j++)
        for (long i = c; i < C; i++) sum[i] += weight[j] * keys[j * C + i];
}
