/* One layer's mixture of experts for the few rows of a decoding step, on a CPU.
 *
 * R rows, D model width, E experts of width I, K a row, S width of the shared expert; all fp32, contiguous.
 * hidden, out [R, D]; gate [E, D]; w1, w3 [E, I, D], w2 [E, D, I]; shared w1, w3 [S, D], w2 [D, S].
 * So few rows cost as much as reading the weights: every expert's are read once, several experts at once, and
 * added in rising order: a row's result depends on nothing but the row. An expert meets few of the rows and
 * takes products over channels; router and shared expert meet all, side by side.
 */
#include <float.h>
#include <math.h>

#include "decode_parts.h"
#include "row_lanes.h"

/* gate = silu(min(gate, limit)) · clamp(up, ±limit) · weight; NaN stays NaN */
INLINE void activate(long count, float limit, float weight, const float *up, float *gate) {
    for (long c = 0; c < count; c++) {
        const float g = gate[c] > limit ? limit : gate[c];
        const float u = up[c] > limit ? limit : up[c] < -limit ? -limit : up[c];
        gate[c] = g / (1.0f + exponential(-g)) * u * weight;
    }
}

/* out[r] [D] = weight[r] · expert(x[r]) of n rows; gate, up [n][I] are working space. */
static void expert(long n, long D, long I, float limit, const float **x, const float *w1, const float *w2,
                   const float *w3, const float *weight, float **gate, float **up, float **out) {
    product(n, I, D, x, w1, gate);
    product(n, I, D, x, w3, up);
    for (long r = 0; r < n; r++) activate(I, limit, weight[r], up[r], gate[r]);
    product(n, D, I, (const float **)gate, w2, out);
}

/* out [R, D] = the shared expert of hidden [R, D]; work: SIDE (2 D + 2 S) floats. */
static void shared_expert(long R, long D, long S, float limit, const float *hidden, const float *w1,
                          const float *w2, const float *w3, float *out, float *work) {
    float *x = work, *y = x + SIDE * D, *gate = y + SIDE * D, *up = gate + SIDE * S;
    for (long r = 0; r < R; r += SIDE) {
        const long here = R - r < SIDE ? R - r : SIDE;
        spread(here, D, hidden + r * D, x);
        multiply(here, D, S, x, w1, gate);
        multiply(here, D, S, x, w3, up);
        activate(S * lanes_of(here), limit, 1.0f, up, gate);
        multiply(here, S, D, gate, w2, y);
        collect(here, D, D, y, out + r * D);
    }
}

/* Scores sqrt(softplus(logits)), in place. */
INLINE void score(long E, float *row) {
    for (long e = 0; e < E; e++) {
        const float z = row[e], soft = z > 20.0f ? z : log1pf(expf(z));
        row[e] = sqrtf(soft < FLT_MIN ? FLT_MIN : soft);
    }
}

/* The K largest of scores + bias, of equals the lowest; selection [E] is working space. */
INLINE void choose(long E, long K, const float *scores, const float *bias, float *selection, long *chosen) {
    for (long e = 0; e < E; e++) selection[e] = scores[e] + bias[e];
    for (long k = 0; k < K; k++) {
        long best = 0;
        for (long e = 1; e < E; e++) best = selection[e] > selection[best] ? e : best;
        chosen[k] = best;
        selection[best] = -INFINITY;
    }
}

/* chosen [R, K] and weight [R, K]; table [vocabulary, K] of a hash router, or bias [E] of a learned one.
 * work: (R + 1) E + SIDE (D + MOST_OUTS) floats. */
void moe_route(long R, long D, long E, long K, float scaling, const float *hidden, const float *gate,
               const float *bias, const long *table, const long *ids, long *chosen, float *weight,
               float *work) {
    float *selection = work + R * E;
    const product_of logits = {gate, E, work};
    project(R, D, hidden, 1, &logits, selection + E);
    for (long r = 0; r < R; r++) {
        float *scores = work + r * E, sum = 0;
        score(E, scores);
        if (table)
            memcpy(chosen + r * K, table + ids[r] * K, K * sizeof(long));
        else
            choose(E, K, scores, bias, selection, chosen + r * K);
        for (long k = 0; k < K; k++) sum += weight[r * K + k] = scores[chosen[r * K + k]];
        for (long k = 0; k < K; k++) weight[r * K + k] = weight[r * K + k] / (sum + 1e-20f) * scaling;
    }
}

/* out [R, D] from chosen, weight [R, K]. places: 4 R K pointers; work: R K (2 I + D + 1) + 2 E floats or, where
 * that is more, SIDE (2 D + 2 S) floats. */
void moe_forward(long R, long D, long E, long K, long I, long S, float limit, const float *hidden,
                 const long *chosen, const float *weight, const float *w1, const float *w2, const float *w3,
                 const float *s1, const float *s2, const float *s3, float *out, float *work, void **places) {
    const long most = R * K, parts = even_parts(most, I * D / 16);
    const float **x = (const float **)places;
    float **gate = (float **)places + most, **up = gate + most, **down = up + most;
    float *share = work + most * (2 * I + D);
    int *starts = (int *)(share + most), pairs = 0; /* [E + 1] */
    shared_expert(R, D, S, limit, hidden, s1, s2, s3, out, work);
    for (long i = 0; i < most; i++) {
        gate[i] = work + i * I;
        up[i] = work + (most + i) * I;
        down[i] = work + 2 * most * I + i * D;
    }
    for (long e = 0; e < E; e++) {
        starts[e] = pairs;
        for (long r = 0; r < R; r++)
            for (long k = 0; k < K; k++)
                if (chosen[r * K + k] == e) {
                    x[pairs] = hidden + r * D;
                    share[pairs++] = weight[r * K + k];
                    break;
                }
    }
    starts[E] = pairs;
    AT_ONCE
    for (long e = 0; e < E; e++) {
        const int i = starts[e];
        expert(starts[e + 1] - i, D, I, limit, x + i, w1 + e * I * D, w2 + e * D * I, w3 + e * I * D, share + i,
               gate + i, up + i, down + i);
    }
    for (int i = 0; i < pairs; i++) {
        float *sum = out + (x[i] - hidden);
        for (long c = 0; c < D; c++) sum[c] += down[i][c];
    }
}
