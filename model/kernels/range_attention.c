/* Attention of packed rows and chunks on a CPU, forward and backward, query by query.
 *
 * B rows, T queries, H heads, C head width, S window keys and M entries a row, K picks; fp32, contiguous;
 * integers are longs. Query t sees the window keys oldest[t] … offset + t and the entries first[t] …
 * stop[t] - 1, or of those picks[t] (up to the first -1). Nothing is computed for keys that it does not see.
 */
#include "products.h"

/* One query: its keys in two stretches, and where their gradients go. */
typedef struct {
    long near, far, C, H, most; /* keys of either kind; a line of `weights` holds `most` */
    const float *near_keys, *far_keys;
    const float **heads;
    float *weights, **lines;
} query_t;

typedef struct {
    long T, S, M, K, offset;
    const float *window, *entries;
    const long *oldest, *first, *stop, *picks;
} keys_t;

/* Fill in the keys of query t of row b; picked ones are gathered into `copies` [K, C]. */
INLINE void look(const keys_t *k, long b, long t, float *copies, query_t *q) {
    const long at = b * k->T + t, oldest = k->oldest[at], C = q->C;
    q->near = k->offset + t - oldest + 1;
    q->near_keys = k->window + (b * k->S + oldest) * C;
    q->far = 0;
    if (!k->entries) return;
    const float *entries = k->entries + b * k->M * C;
    if (!k->picks) {
        q->far = k->stop[at] - k->first[at];
        q->far_keys = entries + k->first[at] * C;
        return;
    }
    const long *picks = k->picks + at * k->K;
    for (; q->far < k->K && picks[q->far] >= 0; q->far++)
        memcpy(copies + q->far * C, entries + picks[q->far] * C, C * sizeof(float));
    q->far_keys = copies;
}

/* lines [H][near + far] = x [H, C] · keys */
INLINE void match(query_t *q, const float *x, float *lines) {
    for (long h = 0; h < q->H; h++) {
        q->heads[h] = x + h * q->C;
        q->lines[h] = lines + h * q->most;
    }
    product(q->H, q->near, q->C, q->heads, q->near_keys, q->lines);
    for (long h = 0; h < q->H; h++) q->lines[h] += q->near;
    product(q->H, q->far, q->C, q->heads, q->far_keys, q->lines);
}

/* out [H, C] += weights [H][near + far] · keys */
INLINE void mix(const query_t *q, const float *weights, float *out) {
    for (long h = 0; h < q->H; h++) {
        weigh(q->near, q->C, weights + h * q->most, q->near_keys, out + h * q->C);
        weigh(q->far, q->C, weights + h * q->most + q->near, q->far_keys, out + h * q->C);
    }
}

/* work: H most + K C floats; places: 2 H pointers. */
void range_forward(long B, long T, long H, long C, long S, long M, long K, long offset, long most,
                   float scale, const float *query, const float *window, const float *entries,
                   const long *oldest, const long *first, const long *stop, const long *picks,
                   const float *sink, float *out, float *work, void **places) {
    const keys_t keys = {T, S, M, K, offset, window, entries, oldest, first, stop, picks};
    query_t q = {.C = C, .H = H, .most = most, .weights = work};
    q.heads = (const float **)places;
    q.lines = (float **)places + H;
    memset(out, 0, B * T * H * C * sizeof(float));
    for (long b = 0; b < B; b++)
        for (long t = 0; t < T; t++) {
            const long at = (b * T + t) * H * C;
            look(&keys, b, t, work + H * most, &q);
            match(&q, query + at, work);
            for (long h = 0; h < H; h++) soften(q.near + q.far, scale, sink[h], work + h * most);
            mix(&q, work, out + at);
        }
}

/* d_key [C] += Σ_h score[h] x[h] + weight[h] grad[h], both coefficients `most` apart. */
INLINE void spread(const query_t *q, const float *score, const float *weight, const float *x,
                   const float *grad, float *d_key) {
    const long C = q->C, most = q->most;
    long c = 0;
    for (; c + LANES <= C; c += LANES) {
        vec sum = *(const vec *)(d_key + c);
        for (long h = 0; h < q->H; h++)
            sum += score[h * most] * *(const vec *)(x + h * C + c) +
                   weight[h * most] * *(const vec *)(grad + h * C + c);
        *(vec *)(d_key + c) = sum;
    }
    for (; c < C; c++)
        for (long h = 0; h < q->H; h++)
            d_key[c] += score[h * most] * x[h * C + c] + weight[h * most] * grad[h * C + c];
}

/* d_window, d_entries and d_sink are added to. work: 2 H most + K C floats; places: 2 H pointers. */
void range_backward(long B, long T, long H, long C, long S, long M, long K, long offset, long most,
                    float scale, const float *query, const float *window, const float *entries,
                    const long *oldest, const long *first, const long *stop, const long *picks,
                    const float *sink, const float *out, const float *grad, float *d_query, float *d_window,
                    float *d_entries, float *d_sink, float *work, void **places) {
    const keys_t keys = {T, S, M, K, offset, window, entries, oldest, first, stop, picks};
    query_t q = {.C = C, .H = H, .most = most, .weights = work};
    float *scores = work + H * most, *copies = scores + H * most;
    q.heads = (const float **)places;
    q.lines = (float **)places + H;
    memset(d_query, 0, B * T * H * C * sizeof(float));
    for (long b = 0; b < B; b++)
        for (long t = 0; t < T; t++) {
            const long row = b * T + t, at = row * H * C;
            look(&keys, b, t, copies, &q);
            match(&q, query + at, work);
            match(&q, grad + at, scores);
            for (long h = 0; h < H; h++) {
                const float own = soften(q.near + q.far, scale, sink[h], work + h * most);
                const float *g = grad + at + h * C;
                float inner, *result = &inner, *p = work + h * most, *s = scores + h * most;
                product(1, 1, C, &g, out + at + h * C, &result);
                for (long j = 0; j < q.near + q.far; j++) s[j] = scale * p[j] * (s[j] - inner);
                d_sink[h] -= own * inner;
            }
            mix(&q, scores, d_query + at);
            float *d_near = d_window + (q.near_keys - window);
            for (long j = 0; j < q.near; j++)
                spread(&q, scores + j, work + j, query + at, grad + at, d_near + j * C);
            for (long j = 0; j < q.far; j++) {
                const long column = picks ? picks[row * K + j] : first[row] + j;
                spread(&q, scores + q.near + j, work + q.near + j, query + at, grad + at,
                       d_entries + (b * M + column) * C);
            }
        }
}
