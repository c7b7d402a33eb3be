/* SwiGLU with V4's clamp on a CPU: y = silu(min(gate, limit)) · clamp(up, ±limit), n numbers, fp32.
 *
 * Slopes are zero strictly beyond a limit.
 */
#include "products.h"

INLINE float clamped(float x, float limit) { return x > limit ? limit : x < -limit ? -limit : x; }

void gated_forward(long n, float limit, const float *gate, const float *up, float *y) {
    for (long i = 0; i < n; i++) {
        const float g = gate[i] > limit ? limit : gate[i];
        y[i] = g / (1.0f + exponential(-g)) * clamped(up[i], limit);
    }
}

void gated_backward(long n, float limit, const float *gate, const float *up, const float *d_y, float *d_gate,
                    float *d_up) {
    for (long i = 0; i < n; i++) {
        const float g = gate[i] > limit ? limit : gate[i], u = clamped(up[i], limit);
        const float s = 1.0f / (1.0f + exponential(-g)), silu = g * s;
        d_up[i] = u != up[i] && up[i] == up[i] ? 0.0f : d_y[i] * silu;
        d_gate[i] = gate[i] > limit ? 0.0f : (s + silu * (1.0f - s)) * d_y[i] * u;
    }
}
