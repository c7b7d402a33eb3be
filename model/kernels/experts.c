/* V4's experts on a CPU, fp32: an expert's rows go through its three matrices a piece at a time, and between the
 * products they stay in cache. Whole pieces, or whole experts, go to threads, whose products are each one thread's:
 * no thread waits for another between two products, and no bit depends on their number.
 *
 * D model width, I expert width, w1 and w3 [E, I, D], w2 [E, D, I], n rows of one expert at a time; rows are
 * contiguous. y = w · silu(min(gate, limit)) · clamp(up, ±limit), w the router's weight of the row; slopes are zero
 * strictly beyond a limit.
 */
#include "products.h"
#ifdef _OPENMP
#include <omp.h>
#define OWN_THREAD omp_get_thread_num()
#else
#define OWN_THREAD 0
#endif
/* The next loop's rounds go to whichever thread is free. */
#define AS_FREE _Pragma("omp parallel for num_threads(num_threads) schedule(dynamic, 1) if(num_threads > 1)")

INLINE float clamped(float x, float limit) { return x > limit ? limit : x < -limit ? -limit : x; }

/* weight: [n], or null for 1. */
static void activate(long n, long I, float limit, const float *gate, const float *up, const float *weight, float *y) {
    for (long r = 0; r < n; r++) {
        const float w = weight ? weight[r] : 1.0f;
        _Pragma("GCC ivdep") /* y may be gate */
        for (long i = r * I; i < (r + 1) * I; i++) {
            const float g = gate[i] > limit ? limit : gate[i];
            y[i] = g / (1.0f + exponential(-g)) * clamped(up[i], limit) * w;
        }
    }
}

/* `count` numbers of one row: d_y becomes y, gate and up their gradients; d_y · y / w is added to sums. */
INLINE void slopes(int count, float limit, float w, float *gate, float *up, float *d_y, float *sums) {
    for (int l = 0; l < count; l++) {
        const float raw = gate[l], lift = up[l], grad = d_y[l];
        const float g = raw > limit ? limit : raw, u = clamped(lift, limit);
        const float s = 1.0f / (1.0f + exponential(-g)), silu = g * s;
        sums[l] += grad * silu * u;
        d_y[l] = silu * u * w;
        up[l] = (lift > limit) | (lift < -limit) ? 0.0f : grad * w * silu;
        gate[l] = raw > limit ? 0.0f : (s + silu * (1.0f - s)) * grad * w * u;
    }
}

/* d_y becomes y; gate and up become their gradients; d_weight [n] is written where weight is given. */
static void activate_backward(long n, long I, float limit, const float *weight, float *restrict gate,
                              float *restrict up, float *restrict d_y, float *d_weight) {
    for (long r = 0; r < n; r++) {
        const float w = weight ? weight[r] : 1.0f;
        float sums[LANES] = {0}, sum = 0;
        long i = r * I;
        for (; i + LANES <= (r + 1) * I; i += LANES) {
            float own[LANES], lift[LANES], grad[LANES]; /* copies: nothing overlaps */
            memcpy(own, gate + i, sizeof own);
            memcpy(lift, up + i, sizeof lift);
            memcpy(grad, d_y + i, sizeof grad);
            slopes(LANES, limit, w, own, lift, grad, sums);
            memcpy(gate + i, own, sizeof own);
            memcpy(up + i, lift, sizeof lift);
            memcpy(d_y + i, grad, sizeof grad);
        }
        slopes((int)((r + 1) * I - i), limit, w, gate + i, up + i, d_y + i, sums);
        if (!weight) continue;
        for (int l = 0; l < LANES; l++) sum += sums[l];
        d_weight[r] = sum;
    }
}

/* The matrix library's product, of matrices by columns. */
typedef void (*gemm_t)(const char *, const char *, const int *, const int *, const int *, const float *,
                       const float *, const int *, const float *, const int *, const float *, float *, const int *);

typedef struct {
    long D, I, rows; /* of a piece, at most */
    float limit;
    gemm_t gemm;
    const float *w1, *w2, *w3, *hidden, *share;
    const long *tokens; /* of each pair, or null: pairs are the tokens, shares 1 */
} experts_t;

/* c [n, m] (+)= a · b by rows: a is [n, k], or [k, n] mirrored; b [k, m], or [m, k] mirrored. */
INLINE void times(gemm_t gemm, long n, long m, long k, const float *a, int mirrors_a, const float *b,
                  int mirrors_b, int adds, float *c) {
    const int N = (int)n, M = (int)m, K = (int)k;
    const float one = 1, kept = (float)adds;
    gemm(mirrors_b ? "T" : "N", mirrors_a ? "T" : "N", &M, &N, &K, &one, b, mirrors_b ? &K : &M, a,
         mirrors_a ? &N : &K, &kept, c, &M);
}

/* Rows of pairs first … first + n - 1: where they lie, or copied to `copies`. */
INLINE const float *rows_of(const experts_t *q, const float *all, long first, long n, float *copies) {
    if (!q->tokens) return all + first * q->D;
    for (long r = 0; r < n; r++) memcpy(copies + r * q->D, all + q->tokens[first + r] * q->D, q->D * sizeof(float));
    return copies;
}

/* gate and up [n, I] of x [n, D] */
INLINE void inner(const experts_t *q, long expert, long n, const float *x, float *gate, float *up) {
    times(q->gemm, n, q->I, q->D, x, 0, q->w1 + expert * q->I * q->D, 1, 0, gate);
    times(q->gemm, n, q->I, q->D, x, 0, q->w3 + expert * q->I * q->D, 1, 0, up);
}

/* out [pairs, D]: for each of the `tasks` (expert, first pair, behind its last) what the expert makes of the pairs,
 * times share [pairs]. gates, ups [pairs, I] for the backward, or null. work [num_threads, 3, rows, max(D, I)]. */
void experts_forward(gemm_t gemm, long num_tasks, long D, long I, long rows, float limit, const long *tasks,
                     const long *tokens, const float *hidden, const float *share, const float *w1,
                     const float *w2, const float *w3, float *out, float *gates, float *ups, float *work) {
    const experts_t q = {D, I, rows, limit, gemm, w1, w2, w3, hidden, share, tokens};
    const long size = rows * (D > I ? D : I);
    AS_FREE
    for (long task = 0; task < num_tasks; task++) {
        const long *own = tasks + 3 * task;
        float *active = work + OWN_THREAD * 3 * size, *copies = active + 2 * size;
        for (long first = own[1]; first < own[2]; first += rows) {
            const long n = at_most(rows, own[2] - first);
            float *gate = gates ? gates + first * I : active, *up = ups ? ups + first * I : active + size;
            inner(&q, own[0], n, rows_of(&q, hidden, first, n, copies), gate, up);
            activate(n, I, limit, gate, up, share ? share + first : 0, active);
            times(gemm, n, D, I, active, 0, w2 + own[0] * D * I, 1, 0, out + first * D);
        }
    }
}

typedef struct { const float *grad, *gates, *ups; float *d_w1, *d_w2, *d_w3, *d_share, *d_x; } slopes_t;

/* One piece of a task's backward, the `is_first`: d_w… of the task are set, else added to. */
static void piece_backward(const experts_t *q, const slopes_t *to, long expert, long task, long first, long n,
                           int is_first, float *work) {
    const long D = q->D, I = q->I, size = q->rows * (D > I ? D : I), matrix = D * I;
    float *gate = work, *up = work + size, *active = work + 2 * size;
    const float *x = rows_of(q, q->hidden, first, n, work + 3 * size);
    const float *grad = rows_of(q, to->grad, first, n, work + 4 * size);
    if (to->gates) {
        memcpy(gate, to->gates + first * I, n * I * sizeof(float));
        memcpy(up, to->ups + first * I, n * I * sizeof(float));
    } else {
        inner(q, expert, n, x, gate, up);
    }
    times(q->gemm, n, I, D, grad, 0, q->w2 + expert * matrix, 0, 0, active);
    activate_backward(n, I, q->limit, q->share ? q->share + first : 0, gate, up, active,
                      q->share ? to->d_share + first : 0);
    if (to->d_w1) {
        times(q->gemm, D, I, n, grad, 1, active, 0, !is_first, to->d_w2 + task * matrix);
        times(q->gemm, I, D, n, gate, 1, x, 0, !is_first, to->d_w1 + task * matrix);
        times(q->gemm, I, D, n, up, 1, x, 0, !is_first, to->d_w3 + task * matrix);
    }
    times(q->gemm, n, D, I, gate, 0, q->w1 + expert * matrix, 0, 0, to->d_x + first * D);
    times(q->gemm, n, D, I, up, 0, q->w3 + expert * matrix, 0, 1, to->d_x + first * D);
}

/* d_x [pairs, D] and d_share [pairs] from grad [R, D], and gates and ups of the forward unless they are null; d_w… [tasks, …], zeros where a task has no pairs, unless
 * null. work [num_threads, 5, rows, max(D, I)]. */
void experts_backward(gemm_t gemm, long num_tasks, long D, long I, long rows, float limit, const long *tasks,
                      const long *tokens, const float *hidden, const float *share, const float *w1,
                      const float *w2, const float *w3, const float *grad, const float *gates, const float *ups,
                      float *d_w1, float *d_w2, float *d_w3, float *d_share, float *d_x, float *work) {
    const experts_t q = {D, I, rows, limit, gemm, w1, w2, w3, hidden, share, tokens};
    const slopes_t to = {grad, gates, ups, d_w1, d_w2, d_w3, d_share, d_x};
    const long size = rows * (D > I ? D : I), bytes = D * I * sizeof(float);
    AS_FREE
    for (long task = 0; task < num_tasks; task++) {
        const long *own = tasks + 3 * task;
        for (long first = own[1]; first < own[2]; first += rows)
            piece_backward(&q, &to, own[0], task, first, at_most(rows, own[2] - first), first == own[1],
                           work + OWN_THREAD * 5 * size);
        if (own[1] < own[2] || !d_w1) continue;
        memset(d_w1 + task * D * I, 0, bytes);
        memset(d_w2 + task * D * I, 0, bytes);
        memset(d_w3 + task * D * I, 0, bytes);
    }
}

/* sum [R, D] of each token's K rows of all, which lie at places [R, K] */
void experts_sum(long R, long K, long D, const long *places, const float *all, float *sum) {
    const long parts = even_parts(R, K * D);
    AT_ONCE
    for (long p = 0; p < parts; p++) {
        const part_t own = part_of(p, parts, R);
        for (long r = own.first; r < own.first + own.count; r++) {
            float *restrict to = sum + r * D;
            memcpy(to, all + places[r * K] * D, D * sizeof(float));
            for (long k = 1; k < K; k++) {
                const float *from = all + places[r * K + k] * D;
                for (long c = 0; c < D; c++) to[c] += from[c];
            }
        }
    }
}
