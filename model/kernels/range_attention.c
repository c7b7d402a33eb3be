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

/* out[r] [C] += Σ_j weights[r][j] keys[j] from channel c: `rows` heads, `vectors` wide, in registers. */
INLINE void mix_block(int rows, int vectors, long n, long C, long most, const float *weights,
                      const float *keys, long c, float *out) {
    vec sum[ROWS][OUTS];
    EACH(rows) ALSO(vectors) sum[r][o] = *(const vec *)(out + r * C + c + o * LANES);
    for (long j = 0; j < n; j++) {
        vec line[OUTS];
        ALSO(vectors) line[o] = *(const vec *)(keys + j * C + c + o * LANES);
        EACH(rows) ALSO(vectors) sum[r][o] = fused(every(weights[r * most + j]), line[o], sum[r][o]);
    }
    EACH(rows) ALSO(vectors) *(vec *)(out + r * C + c + o * LANES) = sum[r][o];
}

INLINE void mix_keys(long n, long H, long C, long most, const float *weights, const float *keys, float *out) {
    const long whole = C / (OUTS * LANES) * OUTS * LANES;
    long h = 0;
    for (; h + ROWS <= H; h += ROWS)
        for (long c = 0; c < whole; c += OUTS * LANES)
            mix_block(ROWS, OUTS, n, C, most, weights + h * most, keys, c, out + h * C);
    for (; h < H; h++)
        for (long c = 0; c < whole; c += OUTS * LANES)
            mix_block(1, OUTS, n, C, most, weights + h * most, keys, c, out + h * C);
    for (h = 0; h < H; h++) {
        long c = whole;
        for (; c + LANES <= C; c += LANES)
            mix_block(1, 1, n, C, most, weights + h * most, keys, c, out + h * C);
        for (long j = 0; j < n; j++)
            for (long i = c; i < C; i++) out[h * C + i] += weights[h * most + j] * keys[j * C + i];
    }
}

/* out [H, C] += weights [H][near + far] · keys */
INLINE void mix(const query_t *q, const float *weights, float *out) {
    mix_keys(q->near, q->H, q->C, q->most, weights, q->near_keys, out);
    mix_keys(q->far, q->H, q->C, q->most, weights + q->near, q->far_keys, out);
}

/* Rows b T + t of one part. */
static void forward(part_t rows, const keys_t *keys, long H, long C, long most, float scale,
                    const float *query, const float *sink, float *out, float *work, void **places) {
    query_t q = {.C = C, .H = H, .most = most, .weights = work};
    q.heads = (const float **)places;
    q.lines = (float **)places + H;
    memset(out + rows.first * H * C, 0, rows.count * H * C * sizeof(float));
    for (long row = rows.first; row < rows.first + rows.count; row++) {
        const long at = row * H * C;
        look(keys, row / keys->T, row % keys->T, work + H * most, &q);
        match(&q, query + at, work);
        for (long h = 0; h < H; h++) soften(q.near + q.far, scale, sink[h], work + h * most);
        mix(&q, work, out + at);
    }
}

/* For each of `parts`, work: H most + K C floats, places: 2 H pointers. */
void range_forward(long B, long T, long H, long C, long S, long M, long K, long offset, long most, long parts,
                   float scale, const float *query, const float *window, const float *entries,
                   const long *oldest, const long *first, const long *stop, const long *picks,
                   const float *sink, float *out, float *work, void **places) {
    const keys_t keys = {T, S, M, K, offset, window, entries, oldest, first, stop, picks};
    AT_ONCE
    for (long p = 0; p < parts; p++)
        forward(part_of(p, parts, B * T), &keys, H, C, most, scale, query, sink, out,
                work + p * (H * most + K * C), places + p * 2 * H);
}

/* d_key[r] [C] += Σ_h score[h][r] x[h] + weight[h][r] grad[h] from channel c: `rows` keys in registers. */
INLINE void spread_block(int rows, int vectors, const query_t *q, const float *score, const float *weight,
                         const float *x, const float *grad, long c, float **d_key) {
    const long C = q->C, most = q->most;
    vec sum[ROWS][OUTS];
    EACH(rows) ALSO(vectors) sum[r][o] = *(const vec *)(d_key[r] + c + o * LANES);
    for (long h = 0; h < q->H; h++) {
        vec own[OUTS], from[OUTS];
        ALSO(vectors) {
            own[o] = *(const vec *)(x + h * C + c + o * LANES);
            from[o] = *(const vec *)(grad + h * C + c + o * LANES);
        }
        EACH(rows) ALSO(vectors) {
            sum[r][o] = fused(every(score[h * most + r]), own[o], sum[r][o]);
            sum[r][o] = fused(every(weight[h * most + r]), from[o], sum[r][o]);
        }
    }
    EACH(rows) ALSO(vectors) *(vec *)(d_key[r] + c + o * LANES) = sum[r][o];
}

INLINE void spread_rows(int rows, const query_t *q, const float *score, const float *weight, const float *x,
                        const float *grad, float **d_key) {
    const long C = q->C, most = q->most;
    long c = 0;
    for (; c + 2 * LANES <= C; c += 2 * LANES) spread_block(rows, 2, q, score, weight, x, grad, c, d_key);
    for (; c + LANES <= C; c += LANES) spread_block(rows, 1, q, score, weight, x, grad, c, d_key);
    for (; c < C; c++)
        for (long h = 0; h < q->H; h++)
            EACH(rows) {
                const float *s = score + h * most, *w = weight + h * most;
                d_key[r][c] += s[r] * x[h * C + c] + w[r] * grad[h * C + c];
            }
}

/* Gradients of n keys, of the one at columns[j] or else `start` + j; a column comes at most once. */
INLINE void spread(long n, const query_t *q, const float *score, const float *weight, const float *x,
                   const float *grad, const long *columns, long start, float *d_keys) {
    float *places[ROWS];
    for (long j = 0; j < n;) {
        const int rows = n - j < ROWS ? 1 : ROWS;
        for (int r = 0; r < rows; r++) places[r] = d_keys + (columns ? columns[j + r] : start + j + r) * q->C;
        if (rows == ROWS) spread_rows(ROWS, q, score + j, weight + j, x, grad, places);
        else spread_rows(1, q, score + j, weight + j, x, grad, places);
        j += rows;
    }
}

typedef struct { const float *query, *sink, *out, *grad; float *d_query, *d_window; } backward_t;

/* Rows b T + t of one part; d_window, d_entries and d_sink are added to. */
static void backward(part_t rows, const keys_t *keys, const backward_t *g, long H, long C, long most,
                     float scale, float *d_entries, float *d_sink, float *work, void **places) {
    query_t q = {.C = C, .H = H, .most = most, .weights = work};
    float *scores = work + H * most, *copies = scores + H * most;
    q.heads = (const float **)places;
    q.lines = (float **)places + H;
    memset(g->d_query + rows.first * H * C, 0, rows.count * H * C * sizeof(float));
    for (long row = rows.first; row < rows.first + rows.count; row++) {
        const long at = row * H * C;
        look(keys, row / keys->T, row % keys->T, copies, &q);
        match(&q, g->query + at, work);
        match(&q, g->grad + at, scores);
        for (long h = 0; h < H; h++) {
            const float own = soften(q.near + q.far, scale, g->sink[h], work + h * most);
            const float *line = g->grad + at + h * C;
            float inner, *result = &inner, *p = work + h * most, *s = scores + h * most;
            product(1, 1, C, &line, g->out + at + h * C, &result);
            for (long j = 0; j < q.near + q.far; j++) s[j] = scale * p[j] * (s[j] - inner);
            d_sink[h] -= own * inner;
        }
        mix(&q, scores, g->d_query + at);
        const long *picks = keys->picks ? keys->picks + row * keys->K : 0;
        const long from = keys->first && !picks ? keys->first[row] : 0;
        spread(q.near, &q, scores, work, g->query + at, g->grad + at, 0, (q.near_keys - keys->window) / C,
               g->d_window);
        spread(q.far, &q, scores + q.near, work + q.near, g->query + at, g->grad + at, picks, from,
               d_entries + row / keys->T * keys->M * C);
    }
}

/* Neighbouring parts share keys of the window, so every other part goes first; entries, which all may share, and
 * sinks have a sum for each part that runs beside others: d_entries [(parts + 1) / 2, B, M, C], d_sink
 * [parts, H]. All are added to. For each part, work: 2 H most + K C floats, places: 2 H pointers. */
void range_backward(long B, long T, long H, long C, long S, long M, long K, long offset, long most, long parts,
                    float scale, const float *query, const float *window, const float *entries,
                    const long *oldest, const long *first, const long *stop, const long *picks,
                    const float *sink, const float *out, const float *grad, float *d_query, float *d_window,
                    float *d_entries, float *d_sink, float *work, void **places) {
    const keys_t keys = {T, S, M, K, offset, window, entries, oldest, first, stop, picks};
    const backward_t given = {query, sink, out, grad, d_query, d_window};
    for (int turn = 0; turn < 2; turn++)
        AT_ONCE
        for (long p = turn; p < parts; p += 2)
            backward(part_of(p, parts, B * T), &keys, &given, H, C, most, scale,
                     d_entries + p / 2 * B * M * C, d_sink + p * H, work + p * (2 * H * most + K * C),
                     places + p * 2 * H);
}
