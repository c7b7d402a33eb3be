/* What stands between the matrix products of V4's experts on a CPU: n rows of one expert at a time, fp32.
 *
 * D model width, I expert width; rows are contiguous. y = w · silu(min(gate, limit)) · clamp(up, ±limit),
 * w the router's weight of the row; slopes are zero strictly beyond a limit.
 */
#include "products.h"

INLINE float clamped(float x, float limit) { return x > limit ? limit : x < -limit ? -limit : x; }

/* weight: [n], or null for 1. */
void experts_activate(long n, long I, float limit, const float *gate, const float *up, const float *weight,
                      float *y) {
    const long parts = even_parts(n, I);
    AT_ONCE
    for (long p = 0; p < parts; p++) {
        const part_t own = part_of(p, parts, n);
        for (long r = own.first; r < own.first + own.count; r++) {
            const float w = weight ? weight[r] : 1.0f;
            _Pragma("GCC ivdep") /* y may be gate */
            for (long i = r * I; i < (r + 1) * I; i++) {
                const float g = gate[i] > limit ? limit : gate[i];
                y[i] = g / (1.0f + exponential(-g)) * clamped(up[i], limit) * w;
            }
        }
    }
}

/* `count` numbers of one row: d_y becomes y, gate and up their gradients; d_y · y / w is added to sums. */
INLINE void slopes(int count, float limit, float w, float *gate, float *up, float *d_y, float *sums) {
    for (int l = 0; l < count; l++) {
        const float raw = gate[l], lift = up[l], grad = d_y[l];
        const float g = raw > limit ? limit : raw, u = clamped(lift, limit);
        const float s = 1.0f / (1.0f + exponential(-g)), silu = g * s;
        sums[l] += grad * silu * u;
        d_y[l] = silu * u * w;
        up[l] = (lift > limit) | (lift < -limit) ? 0.0f : grad * w * silu;
        gate[l] = raw > limit ? 0.0f : (s + silu * (1.0f - s)) * grad * w * u;
    }
}

static void activate_backward(part_t rows, long I, float limit, const float *weight, float *restrict gate,
                              float *restrict up, float *restrict d_y, float *d_weight) {
    for (long r = rows.first; r < rows.first + rows.count; r++) {
        const float w = weight ? weight[r] : 1.0f;
        float sums[LANES] = {0}, sum = 0;
        long i = r * I;
        for (; i + LANES <= (r + 1) * I; i += LANES) {
            float own[LANES], lift[LANES], grad[LANES]; /* copies: nothing overlaps */
            memcpy(own, gate + i, sizeof own);
            memcpy(lift, up + i, sizeof lift);
            memcpy(grad, d_y + i, sizeof grad);
            slopes(LANES, limit, w, own, lift, grad, sums);
            memcpy(gate + i, own, sizeof own);
            memcpy(up + i, lift, sizeof lift);
            memcpy(d_y + i, grad, sizeof grad);
        }
        slopes((int)((r + 1) * I - i), limit, w, gate + i, up + i, d_y + i, sums);
        if (!weight) continue;
        for (int l = 0; l < LANES; l++) sum += sums[l];
        d_weight[r] = sum;
    }
}

/* d_y becomes y; gate and up become their gradients; d_weight [n] is written where weight is given. */
void experts_activate_backward(long n, long I, float limit, const float *weight, float *gate, float *up,
                               float *d_y, float *d_weight) {
    const long parts = even_parts(n, I);
    AT_ONCE
    for (long p = 0; p < parts; p++)
        activate_backward(part_of(p, parts, n), I, limit, weight, gate, up, d_y, d_weight);
}

/* x [n, D] = all[rows], or all[rows] += x. */
void experts_gather(long n, long D, const long *rows, const float *all, float *x) {
    const long parts = even_parts(n, D);
    AT_ONCE
    for (long p = 0; p < parts; p++) {
        const part_t own = part_of(p, parts, n);
        for (long r = own.first; r < own.first + own.count; r++)
            memcpy(x + r * D, all + rows[r] * D, D * sizeof(float));
    }
}

void experts_scatter(long n, long D, const long *rows, const float *x, float *all) {
    for (long r = 0; r < n; r++) {
        float *to = all + rows[r] * D;
        _Pragma("GCC ivdep")
        for (long c = 0; c < D; c++) to[c] += x[r * D + c];
    }
}
