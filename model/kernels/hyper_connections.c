/* mHC on a CPU: what model/hyper_connections.py computes from the mixes, forward and backward.
 *
 * R tokens, n streams, D model width, K = n (2 + n) rows of a connection's matrix (n of a collapse's).
 * streams [R, n, D], mixes [K, R] = fn @ streams^T before the division by the RMS, all fp32, contiguous.
 * LANES tokens are worked on side by side, so that every loop over them is one vector instruction.
 */
#include <math.h>
#include <string.h>

#define LANES 16
#define MOST 8 /* streams */
#define INLINE static inline __attribute__((always_inline))
#define EACH_LANE for (int l = 0; l < LANES; l++)

typedef float vec[LANES];

/* The sums that one normalisation divides by: over sources (even steps) or destinations. */
INLINE void totals_of(int n, int step, float eps, vec *x, vec *total) {
    for (int a = 0; a < n; a++) {
        EACH_LANE total[a][l] = eps;
        for (int b = 0; b < n; b++) {
            const float *entry = step % 2 ? x[a * n + b] : x[b * n + a];
            EACH_LANE total[a][l] += entry[l];
        }
    }
}

INLINE int group_of(int n, int step, int entry) { return step % 2 ? entry / n : entry % n; }

/* Softmax over destinations plus eps, then 2 rounds - 1 normalisations; x [n*n] from logits to result.
 * trail [steps][n*n] and totals [steps][n] are kept where trail is given. */
INLINE void sinkhorn(int n, int rounds, float eps, vec *x, vec *trail, vec *totals) {
    for (int i = 0; i < n; i++) {
        vec most, sum;
        EACH_LANE most[l] = x[i * n][l];
        for (int j = 1; j < n; j++) EACH_LANE most[l] = x[i * n + j][l] > most[l] ? x[i * n + j][l] : most[l];
        EACH_LANE sum[l] = 0;
        for (int j = 0; j < n; j++) EACH_LANE {
            x[i * n + j][l] = expf(x[i * n + j][l] - most[l]);
            sum[l] += x[i * n + j][l];
        }
        for (int j = 0; j < n; j++) EACH_LANE x[i * n + j][l] = x[i * n + j][l] / sum[l] + eps;
    }
    for (int step = 0; step < 2 * rounds - 1; step++) {
        vec here[MOST], *total = trail ? totals + step * n : here;
        totals_of(n, step, eps, x, total);
        if (trail) memcpy(trail + step * n * n, x, sizeof(vec) * n * n);
        vec inverse[MOST];
        for (int a = 0; a < n; a++) EACH_LANE inverse[a][l] = 1.0f / total[a][l];
        for (int e = 0; e < n * n; e++) EACH_LANE x[e][l] *= inverse[group_of(n, step, e)][l];
    }
}

/* d [n*n]: gradient of the result, becomes the gradient of the logits. y: the result, overwritten. */
INLINE void sinkhorn_backward(int n, int rounds, float eps, vec *y, vec *trail, vec *totals, vec *d) {
    for (int step = 2 * rounds - 2; step >= 0; step--) {
        vec dot[MOST], inverse[MOST];
        for (int a = 0; a < n; a++) EACH_LANE {
            dot[a][l] = 0;
            inverse[a][l] = 1.0f / totals[step * n + a][l];
        }
        for (int e = 0; e < n * n; e++) EACH_LANE dot[group_of(n, step, e)][l] += d[e][l] * y[e][l];
        for (int e = 0; e < n * n; e++) {
            const int a = group_of(n, step, e);
            EACH_LANE d[e][l] = (d[e][l] - dot[a][l]) * inverse[a][l];
        }
        memcpy(y, trail + step * n * n, sizeof(vec) * n * n);
    }
    for (int i = 0; i < n; i++) {
        vec dot;
        EACH_LANE dot[l] = 0;
        for (int j = 0; j < n; j++) EACH_LANE {
            y[i * n + j][l] -= eps;
            dot[l] += d[i * n + j][l] * y[i * n + j][l];
        }
        for (int j = 0; j < n; j++) EACH_LANE d[i * n + j][l] = y[i * n + j][l] * (d[i * n + j][l] - dot[l]);
    }
}

/* z [K] = scale · mixes / RMS + base of up to LANES tokens from r0; missing lanes repeat the last token. */
INLINE void gates(long R, int n, int K, long r0, const float *mixes, const float *inv, const float *base,
                  const float *scale, vec *z) {
    for (int k = 0; k < K; k++) {
        const float s = scale[k < n ? 0 : k < 2 * n ? 1 : 2];
        for (int l = 0; l < LANES; l++) {
            const long r = r0 + l < R ? r0 + l : R - 1;
            z[k][l] = s * (mixes[k * R + r] * inv[r]) + base[k];
        }
    }
}

INLINE float sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }

INLINE void read_forward(long R, int n, long D, int is_whole, int rounds, float eps, float norm_eps,
                         const float *streams, const float *mixes, const float *base, const float *scale,
                         float *input, float *pre, float *post, float *comb, float *inv) {
    const int K = is_whole ? n * (n + 2) : n;
    const long width = n * D;
    for (long r = 0; r < R; r++) {
        float sums[LANES] = {0}, sum = 0;
        const float *x = streams + r * width;
        long c = 0;
        for (; c + LANES <= width; c += LANES) EACH_LANE sums[l] += x[c + l] * x[c + l];
        for (; c < width; c++) sum += x[c] * x[c];
        EACH_LANE sum += sums[l];
        inv[r] = 1.0f / sqrtf(sum / (float)width + norm_eps);
    }
    for (long r0 = 0; r0 < R; r0 += LANES) {
        vec z[MOST * (MOST + 2)];
        const int lanes = R - r0 < LANES ? (int)(R - r0) : LANES;
        gates(R, n, K, r0, mixes, inv, base, scale, z);
        if (is_whole) sinkhorn(n, rounds, eps, z + 2 * n, 0, 0);
        for (int l = 0; l < lanes; l++) {
            const long r = r0 + l;
            for (int j = 0; j < n; j++) pre[r * n + j] = sigmoid(z[j][l]) + eps;
            if (is_whole) {
                for (int j = 0; j < n; j++) post[r * n + j] = 2 * sigmoid(z[n + j][l]);
                for (int e = 0; e < n * n; e++) comb[r * n * n + e] = z[2 * n + e][l];
            }
            const float *x = streams + r * width;
            for (long c = 0; c < D; c++) {
                float sum = 0;
                for (int j = 0; j < n; j++) sum += pre[r * n + j] * x[j * D + c];
                input[r * D + c] = sum;
            }
        }
    }
}

/* d_streams lacks d_mixes^T @ fn, which the caller adds. work: (2 rounds - 1) · n (n + 1) vectors. */
INLINE void read_backward(long R, int n, long D, int is_whole, int rounds, float eps, const float *streams,
                          const float *mixes, const float *base, const float *scale, const float *pre,
                          const float *inv, const float *d_input, const float *d_post, const float *d_comb,
                          float *d_streams, float *d_mixes, double *d_base, double *d_scale, vec *work) {
    const int K = is_whole ? n * (n + 2) : n, steps = 2 * rounds - 1;
    const long width = n * D;
    vec *trail = work, *totals = work + steps * n * n;
    for (long r0 = 0; r0 < R; r0 += LANES) {
        vec z[MOST * (MOST + 2)], d[MOST * (MOST + 2)], y[MOST * MOST];
        const int lanes = R - r0 < LANES ? (int)(R - r0) : LANES;
        gates(R, n, K, r0, mixes, inv, base, scale, z);
        memset(d, 0, sizeof d);
        for (int l = 0; l < lanes; l++) {
            const long r = r0 + l;
            for (int j = 0; j < n; j++) {
                const float *x = streams + r * width + j * D, *g = d_input + r * D, s = pre[r * n + j] - eps;
                float sums[LANES] = {0}, dot = 0;
                long c = 0;
                for (; c + LANES <= D; c += LANES)
                    for (int i = 0; i < LANES; i++) sums[i] += x[c + i] * g[c + i];
                for (; c < D; c++) dot += x[c] * g[c];
                for (int i = 0; i < LANES; i++) dot += sums[i];
                d[j][l] = dot * s * (1 - s);
            }
            if (!is_whole) continue;
            for (int j = 0; j < n; j++) {
                const float s = sigmoid(z[n + j][l]);
                d[n + j][l] = d_post[r * n + j] * 2 * s * (1 - s);
            }
            for (int e = 0; e < n * n; e++) d[2 * n + e][l] = d_comb[r * n * n + e];
        }
        if (is_whole) {
            memcpy(y, z + 2 * n, sizeof(vec) * n * n);
            sinkhorn(n, rounds, eps, y, trail, totals);
            sinkhorn_backward(n, rounds, eps, y, trail, totals, d + 2 * n);
        }
        for (int l = 0; l < lanes; l++) {
            const long r = r0 + l;
            float d_inv = 0;
            for (int k = 0; k < K; k++) {
                const int group = k < n ? 0 : k < 2 * n ? 1 : 2;
                const float m = mixes[k * R + r], d_u = d[k][l] * scale[group];
                d_base[k] += d[k][l];
                d_scale[group] += (double)d[k][l] * (m * inv[r]);
                d_mixes[k * R + r] = d_u * inv[r];
                d_inv += d_u * m;
            }
            const float along = -inv[r] * inv[r] * inv[r] / (float)width * d_inv;
            for (int j = 0; j < n; j++) {
                const float p = pre[r * n + j], *x = streams + r * width + j * D, *g = d_input + r * D;
                float *out = d_streams + r * width + j * D;
                for (long c = 0; c < D; c++) out[c] = p * g[c] + along * x[c];
            }
        }
    }
}

INLINE void write_forward(long R, int n, long D, const float *streams, const float *output,
                          const float *post, const float *comb, float *written) {
    for (long r = 0; r < R; r++) {
        const float *x = streams + r * n * D, *o = output + r * D;
        for (int k = 0; k < n; k++) {
            float weight[MOST];
            for (int j = 0; j < n; j++) weight[j] = comb[(r * n + j) * n + k];
            const float p = post[r * n + k];
            for (long c = 0; c < D; c++) {
                float sum = p * o[c];
                for (int j = 0; j < n; j++) sum += weight[j] * x[j * D + c];
                written[(r * n + k) * D + c] = sum;
            }
        }
    }
}

INLINE float dot(long D, const float *a, const float *b) {
    float sums[LANES] = {0}, sum = 0;
    long c = 0;
    for (; c + LANES <= D; c += LANES) EACH_LANE sums[l] += a[c + l] * b[c + l];
    for (; c < D; c++) sum += a[c] * b[c];
    EACH_LANE sum += sums[l];
    return sum;
}

INLINE void write_backward(long R, int n, long D, const float *streams, const float *output,
                           const float *post, const float *comb, const float *grad, float *d_streams,
                           float *d_output, float *d_post, float *d_comb) {
    for (long r = 0; r < R; r++) {
        const float *x = streams + r * n * D, *g = grad + r * n * D, *p = post + r * n;
        for (int k = 0; k < n; k++) d_post[r * n + k] = dot(D, g + k * D, output + r * D);
        for (int j = 0; j < n; j++) {
            const float *weight = comb + (r * n + j) * n;
            for (int k = 0; k < n; k++) d_comb[(r * n + j) * n + k] = dot(D, x + j * D, g + k * D);
            for (long c = 0; c < D; c++) {
                float sum = 0;
                for (int k = 0; k < n; k++) sum += weight[k] * g[k * D + c];
                d_streams[(r * n + j) * D + c] = sum;
            }
        }
        for (long c = 0; c < D; c++) {
            float sum = 0;
            for (int k = 0; k < n; k++) sum += p[k] * g[k * D + c];
            d_output[r * D + c] = sum;
        }
    }
}

/* Four streams, V4's number, are compiled apart: their loops unroll. */
#define FOR_STREAMS(call_4, call_n) do { if (n == 4) { call_4; } else { call_n; } } while (0)

void hc_read_forward(long R, int n, long D, int is_whole, int rounds, float eps, float norm_eps,
                     const float *streams, const float *mixes, const float *base, const float *scale,
                     float *input, float *pre, float *post, float *comb, float *inv) {
    FOR_STREAMS(read_forward(R, 4, D, is_whole, rounds, eps, norm_eps, streams, mixes, base, scale, input,
                             pre, post, comb, inv),
                read_forward(R, n, D, is_whole, rounds, eps, norm_eps, streams, mixes, base, scale, input,
                             pre, post, comb, inv));
}

void hc_read_backward(long R, int n, long D, int is_whole, int rounds, float eps, const float *streams,
                      const float *mixes, const float *base, const float *scale, const float *pre,
                      const float *inv, const float *d_input, const float *d_post, const float *d_comb,
                      float *d_streams, float *d_mixes, double *d_base, double *d_scale, float *work) {
    FOR_STREAMS(read_backward(R, 4, D, is_whole, rounds, eps, streams, mixes, base, scale, pre, inv,
                              d_input, d_post, d_comb, d_streams, d_mixes, d_base, d_scale, (vec *)work),
                read_backward(R, n, D, is_whole, rounds, eps, streams, mixes, base, scale, pre, inv,
                              d_input, d_post, d_comb, d_streams, d_mixes, d_base, d_scale, (vec *)work));
}

void hc_write_forward(long R, int n, long D, const float *streams, const float *output, const float *post,
                      const float *comb, float *written) {
    FOR_STREAMS(write_forward(R, 4, D, streams, output, post, comb, written),
                write_forward(R, n, D, streams, output, post, comb, written));
}

void hc_write_backward(long R, int n, long D, const float *streams, const float *output, const float *post,
                       const float *comb, const float *grad, float *d_streams, float *d_output,
                       float *d_post, float *d_comb) {
    FOR_STREAMS(write_backward(R, 4, D, streams, output, post, comb, grad, d_streams, d_output, d_post, d_comb),
                write_backward(R, n, D, streams, output, post, comb, grad, d_streams, d_output, d_post, d_comb));
}
