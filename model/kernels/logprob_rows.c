/* Log-probability and entropy of rows of logits on a CPU, and the logits' gradient, each in one pass of fp32.
 *
 * n rows, V logits of a row z, y its target: lse = log Σ e^z, logprob = z_y - lse, entropy = lse - Σ p z.
 */
#include <math.h>
#include "products.h"

/* The next LANES of z, or the `count` left, beyond which they weigh nothing. */
INLINE void take(const float *z, int count, float most, float *sum, float *weighted) {
    for (int l = 0; l < count; l++) {
        const float from_most = z[l] - most, e = exponential(from_most);
        sum[l] += e;
        weighted[l] += e * from_most;
    }
}

static void forward_row(long V, const float *z, long y, float *lse, float *logprob, float *entropy) {
    float largest[LANES], sum[LANES] = {0}, weighted[LANES] = {0}, most = z[0], all = 0, mean = 0;
    for (int l = 0; l < LANES; l++) largest[l] = most;
    long v = 0;
    for (; v + LANES <= V; v += LANES)
        for (int l = 0; l < LANES; l++) largest[l] = z[v + l] > largest[l] ? z[v + l] : largest[l];
    for (; v < V; v++) most = z[v] > most ? z[v] : most;
    for (int l = 0; l < LANES; l++) most = largest[l] > most ? largest[l] : most;
    for (v = 0; v + LANES <= V; v += LANES) take(z + v, LANES, most, sum, weighted);
    take(z + v, (int)(V - v), most, sum, weighted);
    for (int l = 0; l < LANES; l++) all += sum[l], mean += weighted[l];
    const float log_all = logf(all);
    *lse = most + log_all;
    *logprob = z[y] - most - log_all;
    *entropy = log_all - mean / all;
}

void logprob_forward(long n, long V, const float *logits, const long *targets, float *lse, float *logprob,
                     float *entropy) {
    const long parts = even_parts(n, V);
    AT_ONCE
    for (long p = 0; p < parts; p++) {
        const part_t own = part_of(p, parts, n);
        for (long r = own.first; r < own.first + own.count; r++)
            forward_row(V, logits + r * V, targets[r], lse + r, logprob + r, entropy + r);
    }
}

/* d [n, V], which may be the logits: gradient of the logits before their division by the temperature, from those of
 * logprob and of entropy. */
void logprob_backward(long n, long V, float temperature, const float *logits, const long *targets,
                      const float *lse, const float *entropy, const float *d_logprob, const float *d_entropy,
                      float *d) {
    const long parts = even_parts(n, V);
    AT_ONCE
    for (long p = 0; p < parts; p++) {
        const part_t own = part_of(p, parts, n);
        for (long r = own.first; r < own.first + own.count; r++) {
            const float a = d_logprob[r] / temperature, b = d_entropy[r] / temperature, h = entropy[r];
            _Pragma("GCC ivdep") for (long v = r * V; v < (r + 1) * V; v++) {
                const float log_p = logits[v] - lse[r];
                d[v] = -exponential(log_p) * (a + b * (log_p + h));
            }
            d[r * V + targets[r]] += a;
        }
    }
}
