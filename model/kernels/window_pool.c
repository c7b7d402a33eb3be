/* Pooling of closed windows on a CPU: a softmax a channel over a window's slots, forward and backward, fp32.
 *
 * E windows, S slots of each, m tokens of a window, C channels of an entry, `series` channels of a token: C where
 * S = m, 2 C where S = 2 m; then the first m slots read a token's first half, the others its second. values and
 * gates [T, series], ape [m, series], source [E, S] a slot's token, is_present [E, S] bytes; all contiguous. A slot
 * is in one window, so what goes to tokens is written, not added.
 */
#include "products.h"

typedef struct {
    long S, m, C, series;
    const float *values, *gates, *ape;
    const long *source;
    const unsigned char *is_present;
} windows_t;

/* Where slot s of window e lies in [T, series], and in ape: both from the first channel that it reads. */
INLINE long place(const windows_t *w, long e, long s) {
    return w->source[e * w->S + s] * w->series + (s >= w->m ? w->C : 0);
}

INLINE long bias(const windows_t *w, long s) { return s % w->m * w->series + (s >= w->m ? w->C : 0); }

/* p [S, C] of window e; work: 2 C floats. */
static void soften_slots(const windows_t *w, long e, float *restrict p, float *restrict work) {
    const long C = w->C;
    float *restrict most = work, *restrict sum = work + C;
    for (long c = 0; c < C; c++) most[c] = -3e38f, sum[c] = 0;
    for (long s = 0; s < w->S; s++) {
        float *restrict line = p + s * C;
        if (!w->is_present[e * w->S + s]) continue;
        const float *gate = w->gates + place(w, e, s), *own = w->ape + bias(w, s);
        for (long c = 0; c < C; c++) {
            line[c] = gate[c] + own[c];
            most[c] = line[c] > most[c] ? line[c] : most[c];
        }
    }
    for (long s = 0; s < w->S; s++) {
        float *restrict line = p + s * C;
        if (!w->is_present[e * w->S + s]) continue;
        for (long c = 0; c < C; c++) sum[c] += line[c] = exponential(line[c] - most[c]);
    }
    for (long s = 0; s < w->S; s++)
        if (w->is_present[e * w->S + s])
            for (long c = 0; c < C; c++) p[s * C + c] /= sum[c];
}

/* pooled [E, C]; for each of `parts`, work: (S + 2) C floats. */
void pool_forward(long E, long S, long m, long C, long series, long parts, const float *values,
                  const float *gates, const float *ape, const long *source, const unsigned char *is_present,
                  float *pooled, float *work) {
    const windows_t w = {S, m, C, series, values, gates, ape, source, is_present};
    AT_ONCE
    for (long p = 0; p < parts; p++) {
        const part_t own = part_of(p, parts, E);
        float *share = work + p * (S + 2) * C;
        for (long e = own.first; e < own.first + own.count; e++) {
            float *restrict sum = pooled + e * C;
            soften_slots(&w, e, share, share + S * C);
            memset(sum, 0, C * sizeof(float));
            for (long s = 0; s < S; s++) {
                if (!is_present[e * S + s]) continue;
                const float *value = values + place(&w, e, s);
                for (long c = 0; c < C; c++) sum[c] += share[s * C + c] * value[c];
            }
        }
    }
}

/* d_values and d_gates [T, series] are written where slots are, d_ape [parts, m, series] is added to. */
void pool_backward(long E, long S, long m, long C, long series, long parts, const float *values,
                   const float *gates, const float *ape, const long *source, const unsigned char *is_present,
                   const float *pooled, const float *grad, float *d_values, float *d_gates, double *d_ape,
                   float *work) {
    const windows_t w = {S, m, C, series, values, gates, ape, source, is_present};
    AT_ONCE
    for (long p = 0; p < parts; p++) {
        const part_t own = part_of(p, parts, E);
        float *share = work + p * (S + 2) * C;
        for (long e = own.first; e < own.first + own.count; e++) {
            const float *d = grad + e * C, *y = pooled + e * C;
            soften_slots(&w, e, share, share + S * C);
            for (long s = 0; s < S; s++) {
                if (!is_present[e * S + s]) continue;
                const long at = place(&w, e, s);
                const float *value = values + at, *line = share + s * C;
                float *restrict to_value = d_values + at, *restrict to_gate = d_gates + at;
                double *restrict to_ape = d_ape + p * m * series + bias(&w, s);
                for (long c = 0; c < C; c++) {
                    const float both = line[c] * d[c], slope = both * (value[c] - y[c]);
                    to_value[c] = both;
                    to_gate[c] = slope;
                    to_ape[c] += slope;
                }
            }
        }
    }
}
