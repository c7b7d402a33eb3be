/* Products of few rows with a matrix that is read once, e^x and attention's softmax, in fp32.
 *
 * The matrix goes by OUTS lines at a time, which meet all rows while they are in the first cache. A sum runs
 * over LANES partial sums in a fixed order: a row's result depends on nothing but the row and on where the
 * compiler fuses a product with a sum.
 */
#include <string.h>

#define LANES 16
#define ROWS 4
#define OUTS 4
#define AHEAD 2 /* groups of lines between what is read and what is asked of memory */
#define EACH(rows) _Pragma("GCC unroll 4") for (int r = 0; r < (rows); r++)
#define ALSO(outs) _Pragma("GCC unroll 4") for (int o = 0; o < (outs); o++)
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float vec8 __attribute__((vector_size(32)));
typedef float vec4 __attribute__((vector_size(16)));

INLINE float total(vec v) {
    vec8 eight = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                 __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    vec4 four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) +
                __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

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
            __builtin_prefetch(w + (o + AHEAD * OUTS) * width + c);
        }
        EACH(rows) {
            const vec here = *(const vec *)(x[r] + c);
            ALSO(outs) sum[r][o] += here * line[o];
        }
    }
    const long rest = width - c;
    if (rest) EACH(rows) ALSO(outs) sum[r][o] += load(x[r] + c, rest) * load(w + o * width + c, rest);
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
    float most = sink, sum[LANES] = {0}, all = 0;
    for (long i = 0; i < n; i++) {
        logits[i] *= scale;
        most = logits[i] > most ? logits[i] : most;
    }
    long i = 0;
    for (; i + LANES <= n; i += LANES)
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
            ALSO(4) part[o] += weight[j] * *(const vec *)(keys + j * C + c + o * LANES);
        ALSO(4) *(vec *)(sum + c + o * LANES) = part[o];
    }
    for (; c + LANES <= C; c += LANES) {
        vec part = *(const vec *)(sum + c);
        for (long j = 0; j < n; j++) part += weight[j] * *(const vec *)(keys + j * C + c);
        *(vec *)(sum + c) = part;
    }
    for (long j = 0; j < n; j++)
        for (long i = c; i < C; i++) sum[i] += weight[j] * keys[j * C + i];
}
