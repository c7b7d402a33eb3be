/* mHC on a CPU: what model/hyper_connections.py computes from the streams, forward and backward.
 *
 * R tokens, n streams, D model width, K = n (2 + n) rows of a connection's matrix (n of a collapse's).
 * streams [R, n, D], fn [K, n D], mixes [R, K] = streams · fn before the division by the RMS; all fp32 and
 * contiguous. LANES tokens go through the gates side by side, one a lane; along the width a vector is LANES
 * channels. What needs a token's streams happens while they are in cache.
 */
#include <math.h>
#include "decode_parts.h"
#include "products.h"

#define MOST 8 /* streams */
#define MOST_ROWS (MOST * (MOST + 2))
#define EACH_LANE for (int l = 0; l < LANES; l++)
#define STREAMS(i) _Pragma("GCC unroll 8") for (int i = 0; i < n; i++)
#define STRIPE 4 /* vectors of the width that a rank-K update holds in registers */

/* Lane by lane, through memory: loops over arrays become vector instructions. */
INLINE vec exponentials(vec x) {
    float a[LANES];
    memcpy(a, &x, sizeof a);
    EACH_LANE a[l] = exponential(a[l]);
    memcpy(&x, a, sizeof a);
    return x;
}

INLINE vec larger(vec x, vec y) {
    float a[LANES], b[LANES];
    memcpy(a, &x, sizeof a);
    memcpy(b, &y, sizeof b);
    EACH_LANE a[l] = b[l] > a[l] ? b[l] : a[l];
    memcpy(&x, a, sizeof a);
    return x;
}

INLINE vec sigmoid(vec z) { return 1.0f / (1.0f + exponentials(-z)); }

/* LANES channels, or the `count` that are left of a line. */
INLINE vec fetch(const float *from, long count) {
    return count == LANES ? *(const vec *)from : load(from, count);
}

INLINE void put(float *to, vec v, long count) {
    if (count == LANES) *(vec *)to = v;
    else memcpy(to, &v, count * sizeof(float));
}

/* `body` at c = 0, LANES … of D channels, `count` of them at a time. */
#define ALONG(D, body)                                                                                      \
    for (long c = 0; c < (D); c += LANES) {                                                                 \
        if (c + LANES <= (D)) { const long count = LANES; body }                                            \
        else { const long count = (D) - c; body }                                                           \
    }

INLINE int group_of(int n, int is_row, int entry) { return is_row ? entry / n : entry % n; }

/* Divide x [n*n] by its sums over destinations (is_row) or sources, plus eps; the sums are kept. */
INLINE void normalise(int n, int is_row, float eps, vec *x, vec *sums) {
    vec inverse[MOST];
    for (int a = 0; a < n; a++) {
        sums[a] = (vec){0} + eps;
        for (int b = 0; b < n; b++) sums[a] += is_row ? x[a * n + b] : x[b * n + a];
        inverse[a] = 1.0f / sums[a];
    }
    for (int e = 0; e < n * n; e++) x[e] *= inverse[group_of(n, is_row, e)];
}

/* Softmax over destinations plus eps, then 2 rounds - 1 normalisations; x [n*n] from logits to result.
 * trail [steps][n*n] and sums [steps][n] are kept where trail is given. */
INLINE void sinkhorn(int n, int rounds, float eps, vec *x, vec *trail, vec *sums) {
    for (int i = 0; i < n; i++) {
        vec most = x[i * n], sum = {0};
        for (int j = 1; j < n; j++) most = larger(most, x[i * n + j]);
        for (int j = 0; j < n; j++) sum += x[i * n + j] = exponentials(x[i * n + j] - most);
        for (int j = 0; j < n; j++) x[i * n + j] = x[i * n + j] / sum + eps;
    }
    for (int step = 0; step < 2 * rounds - 1; step++) {
        vec here[MOST], *kept = trail ? sums + step * n : here;
        if (trail) memcpy(trail + step * n * n, x, sizeof(vec) * n * n);
        if (step % 2) normalise(n, 1, eps, x, kept);
        else normalise(n, 0, eps, x, kept);
    }
}

/* d [n*n]: gradient of what a step gave, y, becomes that of what it took. */
INLINE void normalise_backward(int n, int is_row, const vec *y, const vec *sums, vec *d) {
    vec dot[MOST], inverse[MOST];
    for (int a = 0; a < n; a++) {
        dot[a] = (vec){0};
        inverse[a] = 1.0f / sums[a];
    }
    for (int e = 0; e < n * n; e++) dot[group_of(n, is_row, e)] += d[e] * y[e];
    for (int e = 0; e < n * n; e++) {
        const int a = group_of(n, is_row, e);
        d[e] = (d[e] - dot[a]) * inverse[a];
    }
}

/* d [n*n]: gradient of the result y, becomes the gradient of the logits. */
INLINE void sinkhorn_backward(int n, int rounds, float eps, const vec *y, const vec *trail, const vec *sums,
                              vec *d) {
    for (int step = 2 * rounds - 2; step >= 0; step--) {
        if (step % 2) normalise_backward(n, 1, y, sums + step * n, d);
        else normalise_backward(n, 0, y, sums + step * n, d);
        y = trail + step * n * n;
    }
    for (int i = 0; i < n; i++) {
        vec dot = {0};
        for (int j = 0; j < n; j++) dot += d[i * n + j] * (y[i * n + j] - eps);
        for (int j = 0; j < n; j++) d[i * n + j] = (y[i * n + j] - eps) * (d[i * n + j] - dot);
    }
}

/* z [K] = scale · mixes / RMS + base of LANES tokens from r0; missing lanes repeat the last token. */
INLINE void gates(long R, int n, int K, long r0, const float *mixes, const float *inv, const float *base,
                  const float *scale, vec *z) {
    float lines[MOST_ROWS][LANES];
    EACH_LANE {
        const long r = r0 + l < R ? r0 + l : R - 1;
        for (int k = 0; k < K; k++) lines[k][l] = mixes[r * K + k] * inv[r];
    }
    for (int k = 0; k < K; k++)
        z[k] = scale[k < n ? 0 : k < 2 * n ? 1 : 2] * *(const vec *)lines[k] + base[k];
}

/* Without fn the mixes are given. */
INLINE void read_forward(long R, int n, long D, int is_whole, int rounds, float eps, float norm_eps,
                         const float *streams, const float *fn, const float *base, const float *scale,
                         float *mixes, float *input, float *pre, float *post, float *comb, float *inv) {
    const int K = is_whole ? n * (n + 2) : n;
    const long width = n * D;
    for (long r0 = 0; r0 < R; r0 += LANES) {
        const int lanes = R - r0 < LANES ? (int)(R - r0) : LANES;
        const float *x[LANES];
        float *y[LANES];
        for (int l = 0; l < lanes; l++) {
            vec squares = {0};
            x[l] = streams + (r0 + l) * width;
            y[l] = mixes + (r0 + l) * K;
            ALONG(width, const vec v = fetch(x[l] + c, count); squares = fused(v, v, squares);)
            inv[r0 + l] = 1.0f / sqrtf(total(squares) / (float)width + norm_eps);
        }
        if (fn) product(lanes, K, width, x, fn, y);
        vec z[MOST_ROWS];
        gates(R, n, K, r0, mixes, inv, base, scale, z);
        STREAMS(j) z[j] = sigmoid(z[j]) + eps;
        if (is_whole) {
            for (int j = n; j < 2 * n; j++) z[j] = 2 * sigmoid(z[j]);
            sinkhorn(n, rounds, eps, z + 2 * n, 0, 0);
        }
        for (int l = 0; l < lanes; l++) {
            const long r = r0 + l;
            float *p = pre + r * n;
            STREAMS(j) p[j] = z[j][l];
            for (int j = 0; is_whole && j < n; j++) post[r * n + j] = z[n + j][l];
            for (int e = 0; is_whole && e < n * n; e++) comb[r * n * n + e] = z[2 * n + e][l];
            ALONG(D, vec sum = {0};
                  STREAMS(j) sum = fused(every(p[j]), fetch(x[l] + j * D + c, count), sum);
                  put(input + r * D + c, sum, count);)
        }
    }
}

/* What a stripe of a read's backward is made of. */
typedef struct {
    int n, K;
    long D;
    const float *streams, *fn, *pre, *d_input, *d_mixes, *passed; /* passed: may be null */
    float *d_streams;
} read_t;

/* d_streams = pre d_input + along streams + d_mixes · fn + passed: stream j from channel c, `rows` tokens from r0. */
INLINE void stripe(int rows, int vectors, long count, const read_t *q, long r0, const float *along, int j,
                   long c) {
    const long D = q->D, width = q->n * D, at = j * D + c;
    vec sum[ROWS][STRIPE];
    EACH(rows) ALSO(vectors) {
        const long t = r0 + r;
        sum[r][o] = q->pre[t * q->n + j] * fetch(q->d_input + t * D + c + o * LANES, count) +
                    along[r] * fetch(q->streams + t * width + at + o * LANES, count);
    }
    const float *d_mixes = q->d_mixes + r0 * q->K;
    for (int k = 0; k < q->K; k++) {
        vec line[STRIPE];
        ALSO(vectors) line[o] = fetch(q->fn + k * width + at + o * LANES, count);
        EACH(rows) ALSO(vectors) sum[r][o] = fused(every(d_mixes[r * q->K + k]), line[o], sum[r][o]);
    }
    EACH(rows) ALSO(vectors) {
        const long to = (r0 + r) * width + at + o * LANES;
        if (q->passed) sum[r][o] += fetch(q->passed + to, count);
        put(q->d_streams + to, sum[r][o], count);
    }
}

INLINE void stripes(int rows, const read_t *q, long r0, const float *along) {
    for (int j = 0; j < q->n; j++) {
        long c = 0;
        for (; c + STRIPE * LANES <= q->D; c += STRIPE * LANES)
            stripe(rows, STRIPE, LANES, q, r0, along, j, c);
        for (; c + LANES <= q->D; c += LANES) stripe(rows, 1, LANES, q, r0, along, j, c);
        if (c < q->D) stripe(rows, 1, q->D - c, q, r0, along, j, c);
    }
}

/* work: (2 rounds - 1) · n (n + 1) vectors. */
INLINE void read_backward(long R, int n, long D, int is_whole, int rounds, float eps, const float *streams,
                          const float *fn, const float *base, const float *scale, const float *mixes,
                          const float *pre, const float *inv, const float *d_input, const float *d_post,
                          const float *d_comb, const float *passed, float *d_streams, float *d_mixes,
                          double *d_base, double *d_scale, vec *work) {
    const int K = is_whole ? n * (n + 2) : n, steps = 2 * rounds - 1;
    const long width = n * D;
    vec *trail = work, *sums = work + steps * n * n;
    const read_t q = {n, K, D, streams, fn, pre, d_input, d_mixes, passed, d_streams};
    for (long r0 = 0; r0 < R; r0 += LANES) {
        vec z[MOST_ROWS], d[MOST_ROWS], y[MOST * MOST];
        float lines[MOST_ROWS][LANES], along[LANES];
        const int lanes = R - r0 < LANES ? (int)(R - r0) : LANES;
        memset(lines, 0, sizeof lines);
        for (int l = 0; l < lanes; l++) {
            const long r = r0 + l;
            vec dot[MOST];
            STREAMS(j) dot[j] = (vec){0};
            ALONG(D, const vec g = fetch(d_input + r * D + c, count);
                  STREAMS(j) dot[j] = fused(g, fetch(streams + r * width + j * D + c, count), dot[j]);)
            STREAMS(j) {
                const float s = pre[r * n + j] - eps;
                lines[j][l] = total(dot[j]) * s * (1 - s);
            }
            for (int j = 0; is_whole && j < n; j++) lines[n + j][l] = d_post[r * n + j];
            for (int e = 0; is_whole && e < n * n; e++) lines[2 * n + e][l] = d_comb[r * n * n + e];
        }
        gates(R, n, K, r0, mixes, inv, base, scale, z);
        memcpy(d, lines, K * sizeof(vec));
        if (is_whole) {
            for (int j = n; j < 2 * n; j++) {
                const vec s = sigmoid(z[j]);
                d[j] *= 2 * s * (1 - s);
            }
            memcpy(y, z + 2 * n, sizeof(vec) * n * n);
            sinkhorn(n, rounds, eps, y, trail, sums);
            sinkhorn_backward(n, rounds, eps, y, trail, sums, d + 2 * n);
        }
        for (int l = 0; l < lanes; l++) {
            const long r = r0 + l;
            float d_inv = 0;
            for (int k = 0; k < K; k++) {
                const int group = k < n ? 0 : k < 2 * n ? 1 : 2;
                const float m = mixes[r * K + k], d_u = d[k][l] * scale[group];
                d_base[k] += d[k][l];
                d_scale[group] += (double)d[k][l] * (m * inv[r]);
                d_mixes[r * K + k] = d_u * inv[r];
                d_inv += d_u * m;
            }
            along[l] = -inv[r] * inv[r] * inv[r] / (float)width * d_inv;
        }
        int l = 0;
        for (; l + ROWS <= lanes; l += ROWS) stripes(ROWS, &q, r0 + l, along + l);
        for (; l < lanes; l++) stripes(1, &q, r0 + l, along + l);
    }
}

INLINE void write_forward(long R, int n, long D, const float *streams, const float *output,
                          const float *post, const float *comb, float *written) {
    for (long r = 0; r < R; r++) {
        const float *x = streams + r * n * D, *p = post + r * n, *weight = comb + r * n * n;
        ALONG(D, const vec o = fetch(output + r * D + c, count); vec line[MOST];
              STREAMS(j) line[j] = fetch(x + j * D + c, count);
              STREAMS(k) {
                  vec sum = p[k] * o;
                  STREAMS(j) sum = fused(every(weight[j * n + k]), line[j], sum);
                  put(written + (r * n + k) * D + c, sum, count);
              })
    }
}

INLINE void write_backward(long R, int n, long D, const float *streams, const float *output,
                           const float *post, const float *comb, const float *grad, float *d_streams,
                           float *d_output, float *d_post, float *d_comb) {
    for (long r = 0; r < R; r++) {
        const float *p = post + r * n, *weight = comb + r * n * n;
        vec of_post[MOST], of_comb[MOST * MOST];
        STREAMS(k) of_post[k] = (vec){0};
        for (int e = 0; e < n * n; e++) of_comb[e] = (vec){0};
        ALONG(D, const vec o = fetch(output + r * D + c, count); vec g[MOST]; vec sum = {0};
              STREAMS(k) {
                  g[k] = fetch(grad + (r * n + k) * D + c, count);
                  of_post[k] = fused(g[k], o, of_post[k]);
                  sum = fused(every(p[k]), g[k], sum);
              }
              put(d_output + r * D + c, sum, count);
              STREAMS(j) {
                  const vec x = fetch(streams + (r * n + j) * D + c, count);
                  sum = (vec){0};
                  STREAMS(k) {
                      of_comb[j * n + k] = fused(x, g[k], of_comb[j * n + k]);
                      sum = fused(every(weight[j * n + k]), g[k], sum);
                  }
                  put(d_streams + (r * n + j) * D + c, sum, count);
              })
        STREAMS(k) d_post[r * n + k] = total(of_post[k]);
        for (int e = 0; e < n * n; e++) d_comb[r * n * n + e] = total(of_comb[e]);
    }
}

/* Four streams, V4's number, are compiled apart: their loops unroll. */
#define FOR_STREAMS(call_4, call_n) do { if (n == 4) { call_4; } else { call_n; } } while (0)
/* `body` for rows r0 … r0 + m - 1 of each part. */
#define FOR_PARTS(body)                                                                                     \
    AT_ONCE                                                                                                 \
    for (long p = 0; p < parts; p++) {                                                                      \
        const part_t own = part_of(p, parts, R);                                                            \
        const long r0 = own.first, m = own.count;                                                           \
        body;                                                                                               \
    }

void hc_read_forward(long R, int n, long D, int is_whole, int rounds, float eps, float norm_eps,
                     const float *streams, const float *fn, const float *base, const float *scale,
                     float *mixes, float *input, float *pre, float *post, float *comb, float *inv) {
    const long parts = even_parts(R, n * D), K = is_whole ? n * (n + 2) : n;
#define READ(n)                                                                                             \
    read_forward(m, n, D, is_whole, rounds, eps, norm_eps, streams + r0 * n * D, fn, base, scale,           \
                 mixes + r0 * K, input + r0 * D, pre + r0 * n, post + r0 * n, comb + r0 * n * n, inv + r0)
    FOR_PARTS(FOR_STREAMS(READ(4), READ(n)))
#undef READ
}

/* passed [R, n, D] or null: what else is added to d_streams. d_base [fixed_parts(R), K], d_scale [fixed_parts(R), …] are added to; work: for each part what it says above. */
void hc_read_backward(long R, int n, long D, int is_whole, int rounds, float eps, const float *streams,
                      const float *fn, const float *base, const float *scale, const float *mixes,
                      const float *pre, const float *inv, const float *d_input, const float *d_post,
                      const float *d_comb, const float *passed, float *d_streams, float *d_mixes, double *d_base,
                      double *d_scale, float *work) {
    const long parts = fixed_parts(R), K = is_whole ? n * (n + 2) : n, groups = is_whole ? 3 : 1;
    const long space = is_whole ? (2 * rounds - 1) * n * (n + 1) : 0;
#define READ(n)                                                                                             \
    read_backward(m, n, D, is_whole, rounds, eps, streams + r0 * n * D, fn, base, scale, mixes + r0 * K,    \
                  pre + r0 * n, inv + r0, d_input + r0 * D, d_post + r0 * n, d_comb + r0 * n * n,           \
                  passed ? passed + r0 * n * D : 0, d_streams + r0 * n * D, d_mixes + r0 * K,               \
                  d_base + p * K, d_scale + p * groups, (vec *)work + p * space)
    FOR_PARTS(FOR_STREAMS(READ(4), READ(n)))
#undef READ
}

void hc_write_forward(long R, int n, long D, const float *streams, const float *output, const float *post,
                      const float *comb, float *written) {
    const long parts = even_parts(R, n * D);
#define WRITE(n)                                                                                            \
    write_forward(m, n, D, streams + r0 * n * D, output + r0 * D, post + r0 * n, comb + r0 * n * n,         \
                  written + r0 * n * D)
    FOR_PARTS(FOR_STREAMS(WRITE(4), WRITE(n)))
#undef WRITE
}

void hc_write_backward(long R, int n, long D, const float *streams, const float *output, const float *post,
                       const float *comb, const float *grad, float *d_streams, float *d_output,
                       float *d_post, float *d_comb) {
    const long parts = even_parts(R, n * D);
#define WRITE(n)                                                                                            \
    write_backward(m, n, D, streams + r0 * n * D, output + r0 * D, post + r0 * n, comb + r0 * n * n,        \
                   grad + r0 * n * D, d_streams + r0 * n * D, d_output + r0 * D, d_post + r0 * n,           \
                   d_comb + r0 * n * n)
    FOR_PARTS(FOR_STREAMS(WRITE(4), WRITE(n)))
#undef WRITE
}
