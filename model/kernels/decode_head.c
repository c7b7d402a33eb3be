/* What follows the last block of a decoding step on a CPU: logits, and a token a row.
 *
 * R rows, D model width, V vocabulary; all fp32, contiguous; integers are longs.
 */
#include <math.h>

#include "row_lanes.h"

#define GROUP 64 /* numbers whose sum is kept: a draw looks at those of one group alone */

/* logits [R, V] = weight [V, D] · hidden [R, D]; work: SIDE (D + MOST_OUTS) floats. */
void head_logits(long R, long D, long V, const float *hidden, const float *weight, float *logits,
                 float *work) {
    const product_of all = {weight, V, logits};
    project(R, D, hidden, 1, &all, work);
}

INLINE float largest_of(long V, const float *x) {
    float lanes[LANES], most = x[0];
    for (int l = 0; l < LANES; l++) lanes[l] = most;
    long v = 0;
    for (; v + LANES <= V; v += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] = x[v + l] > lanes[l] ? x[v + l] : lanes[l];
    for (; v < V; v++) most = x[v] > most ? x[v] : most;
    for (int l = 0; l < LANES; l++) most = lanes[l] > most ? lanes[l] : most;
    return most;
}

/* e [count] = e^(x - most), nothing below 1e-38; their sum. */
INLINE double rise(long count, float most, const float *x, float *e) {
    double sums[LANES] = {0}, sum = 0;
    long i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int l = 0; l < LANES; l++) {
            const float z = x[i + l] - most;
            e[i + l] = z < -87.0f ? 0.0f : exponential(z);
            sums[l] += e[i + l];
        }
    for (; i < count; i++) sum += e[i] = x[i] - most < -87.0f ? 0.0f : exponential(x[i] - most);
    for (int l = 0; l < LANES; l++) sum += sums[l];
    return sum;
}

/* The first place at which the running sum of e [V] exceeds `target`, else the last that adds to it. */
INLINE long place_of(long V, double target, const float *e, const double *groups) {
    double sum = 0;
    long v = 0, last = 0;
    for (; v + GROUP < V && sum + groups[v / GROUP] <= target; v += GROUP) sum += groups[v / GROUP];
    for (; v < V; v++) {
        sum += e[v];
        if (e[v] > 0) last = v;
        if (sum > target) break;
    }
    return last;
}

/* tokens [R] by inverse CDF of softmax(logits / temperature) at uniform [R], the first of the largest where
 * temperature [R] is 0; logprobs [R] theirs, at temperature 1 for those, not finite where a logit is NaN or
 * infinite. work: V floats, groups: V / GROUP + 1. */
void head_draw(long R, long V, const float *logits, const float *temperature, const double *uniform,
               long *tokens, float *logprobs, float *work, double *groups) {
    for (long r = 0; r < R; r++, logits += V) {
        const float scale = temperature[r] > 0 ? temperature[r] : 1.0f;
        for (long v = 0; v < V; v++) work[v] = logits[v] / scale;
        const float most = largest_of(V, work);
        long token = 0;
        if (temperature[r] <= 0)
            while (token < V - 1 && logits[token] != most) token++;
        float own = work[token];
        double total = 0;
        for (long v = 0; v < V; v += GROUP)
            total += groups[v / GROUP] = rise(V - v < GROUP ? V - v : GROUP, most, work + v, work + v);
        if (temperature[r] > 0) {
            token = place_of(V, uniform[r] * total, work, groups);
            own = logits[token] / scale;
        }
        tokens[r] = token;
        logprobs[r] = own - most - logf((float)total);
    }
}
