/* RMS norm and interleaved rotation of the last channels on a CPU, in one pass over the rows.
 *
 * n tokens, h heads of a token, C channels of a head, P rotated channel pairs; all fp32, contiguous.
 * x, y [n, h, C]; rotation [n, P] complex (re, im), shared by the heads of a token, may be null;
 * weight [C], may be null; scale [n, h] = 1 / sqrt(mean(x^2) + eps), null where there is no norm.
 * Sums run over LANES partial sums in a fixed order: a row's result depends on nothing but the row.
 */
#include <math.h>
#include "decode_parts.h"
#include "threads.h"

#define INLINE static inline __attribute__((always_inline))

INLINE float dot(long width, const float *a, const float *b) {
    float part[LANES] = {0};
    long i = 0;
    for (; i + LANES <= width; i += LANES)
        for (int l = 0; l < LANES; l++) part[l] += a[i + l] * b[i + l];
    for (int l = 0; i < width; i++, l++) part[l] += a[i] * b[i];
    for (int step = LANES / 2; step; step /= 2)
        for (int l = 0; l < step; l++) part[l] += part[l + step];
    return part[0];
}

/* The last 2 P channels of y by rotation, or by its conjugate. */
INLINE void turn(long width, long pairs, const float *rotation, float sign, float *y) {
    float *tail = y + width - 2 * pairs;
    for (long p = 0; p < pairs; p++) {
        const float a = tail[2 * p], b = tail[2 * p + 1], c = rotation[2 * p], d = sign * rotation[2 * p + 1];
        tail[2 * p] = a * c - b * d;
        tail[2 * p + 1] = a * d + b * c;
    }
}

static void forward(long first, long stop, long heads, long width, long pairs, float eps, float sign,
                    const float *x, const float *weight, const float *rotation, float *y, float *scale) {
    for (long t = first; t < stop; t++)
        for (long h = 0; h < heads; h++) {
            const long row = t * heads + h;
            const float *in = x + row * width;
            float *out = y + row * width, s = 1.0f;
            if (scale) scale[row] = s = 1.0f / sqrtf(dot(width, in, in) / (float)width + eps);
            if (weight)
                for (long i = 0; i < width; i++) out[i] = in[i] * s * weight[i];
            else
                for (long i = 0; i < width; i++) out[i] = in[i] * s;
            if (rotation) turn(width, pairs, rotation + 2 * pairs * t, sign, out);
        }
}

void norm_rotate_forward(long n, long heads, long width, long pairs, float eps, float sign, const float *x,
                         const float *weight, const float *rotation, float *y, float *scale) {
    const long parts = even_parts(n, heads * width);
    AT_ONCE
    for (long p = 0; p < parts; p++) {
        const part_t own = part_of(p, parts, n);
        forward(own.first, own.first + own.count, heads, width, pairs, eps, sign, x, weight, rotation, y, scale);
    }
}

/* d_x [n, h, C] of tokens first … stop - 1; `sums` [C] are added to where weight is given. */
static void backward(long first, long stop, long heads, long width, long pairs, float sign, const float *x,
                     const float *weight, const float *rotation, const float *scale, const float *d_y,
                     float *d_x, double *sums) {
    for (long t = first; t < stop; t++)
        for (long h = 0; h < heads; h++) {
            const long row = t * heads + h;
            const float *in = x + row * width;
            float *out = d_x + row * width;
            for (long i = 0; i < width; i++) out[i] = d_y[row * width + i];
            if (rotation) turn(width, pairs, rotation + 2 * pairs * t, -sign, out);
            const float s = scale ? scale[row] : 1.0f;
            if (weight)
                for (long i = 0; i < width; i++) {
                    sums[i] += (double)(out[i] * in[i] * s);
                    out[i] *= weight[i];
                }
            if (scale) {
                /* y = x s: dx = s (dy - x s^2 mean(dy x)) */
                const float inner = dot(width, out, in) / (float)width * s * s;
                for (long i = 0; i < width; i++) out[i] = s * (out[i] - in[i] * inner);
            }
        }
}

/* d_x [n, h, C] from d_y; d_weight [fixed_parts(n), C] (doubles, added to) where weight is given. */
void norm_rotate_backward(long n, long heads, long width, long pairs, float sign, const float *x,
                          const float *weight, const float *rotation, const float *scale, const float *d_y,
                          float *d_x, double *d_weight) {
    const long parts = weight ? fixed_parts(n) : even_parts(n, heads * width);
    AT_ONCE
    for (long p = 0; p < parts; p++) {
        const part_t own = part_of(p, parts, n);
        backward(own.first, own.first + own.count, heads, width, pairs, sign, x, weight, rotation, scale, d_y,
                 d_x, weight ? d_weight + p * width : 0);
    }
}
