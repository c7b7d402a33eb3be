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
    for (long r = 0; r < n; r++) {
        const float w = weight ? weight[r] : 1.0f;
        _Pragma("GCC ivdep") /* y may be gate */
        for (long i = r * I; i < (r + 1) * I; i++) {
            const float g = gate[i] > limit ? limit : gate[i];
            y[i] = g / (1.0f + exponential(-g)) * clamped(up[i], limit) * w;
        }
    }
}

/* d_y becomes y; gate and up become their gradients; d_weight [n] is written where weight is given. */
void experts_activate_backward(long n, long I, float limit, const float *weight, float *gate, float *up,
                               float *d_y, float *d_weight) {
    for (long r = 0; r < n; r++) {
        const float w = weight ? weight[r] : 1.0f;
        float sums[LANES] = {0}, sum = 0;
        for (long first = r * I; first < (r + 1) * I; first += LANES) {
            const long count = (r + 1) * I - first < LANES ? (r + 1) * I - first : LANES;
            _Pragma("GCC ivdep")
            for (long l = 0; l < count; l++) {
                const long i = first + l;
                const float g = gate[i] > limit ? limit : gate[i], u = clamped(up[i], limit), d = d_y[i] * w;
                const float s = 1.0f / (1.0f + exponential(-g)), silu = g * s;
                sums[l] += d_y[i] * silu * u;
                d_y[i] = silu * u * w;
                up[i] = u != up[i] && up[i] == up[i] ? 0.0f : d * silu;
                gate[i] = gate[i] > limit ? 0.0f : (s + silu * (1.0f - s)) * d * u;
            }
        }
        if (!weight) continue;
        for (int l = 0; l < LANES; l++) sum += sums[l];
        d_weight[r] = sum;
    }
}

/* x [n, D] = all[rows], or all[rows] += x. */
void experts_gather(long n, long D, const long *rows, const float *all, float *x) {
    for (long r = 0; r < n; r++) memcpy(x + r * D, all + rows[r] * D, D * sizeof(float));
}

void experts_scatter(long n, long D, const long *rows, const float *x, float *all) {
    for (long r = 0; r < n; r++) {
        float *to = all + rows[r] * D;
        _Pragma("GCC ivdep")
        for (long c = 0; c < D; c++) to[c] += x[r * D + c];
    }
}
