/* The indexer's choice for packed rows and chunks on a CPU, query by query, fp32; integers are longs.
 *
 * n queries, H index heads, M columns, K picks. match [n, H, M] = q · k; score[i] = Σ_h weight[h] ·
 * max(match[h, i], 0). A query sees the columns first … stop - 1; it picks the K highest, of equals the
 * lowest column.
 */
#include <stdint.h>
#include "products.h"

#define BINS 2048 /* of 11 bits */

/* An unsigned number of the same order; -0 and 0 are equal. */
INLINE uint32_t ordered(float x) {
    uint32_t bits;
    x += 0.0f;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* The bin [11 bits at `shift`] in which the K-th highest of n keys lies; K becomes its rank in that bin. */
INLINE uint32_t bin_of(long n, const uint32_t *keys, int shift, long *K) {
    int32_t counts[BINS] = {0};
    for (long i = 0; i < n; i++) counts[keys[i] >> shift & (BINS - 1)]++;
    long bin = BINS - 1;
    for (; *K > counts[bin]; bin--) *K -= counts[bin];
    return (uint32_t)bin;
}

/* The K-th highest of n keys, n >= K >= 1; K becomes its rank among its equals. `rest` holds n. */
INLINE uint32_t select_keys(long n, const uint32_t *keys, long *K, uint32_t *rest) {
    uint32_t found = 0;
    static const int shifts[] = {21, 10, 0}; /* 11, 11 and 10 bits; the last bin has one bit from before */
    for (int step = 0; step < 3; step++) {
        const int shift = shifts[step];
        const uint32_t bin = bin_of(n, keys, shift, K);
        long left = 0;
        for (long i = 0; i < n; i++) {
            rest[left] = keys[i];
            left += (keys[i] >> shift & (BINS - 1)) == bin;
        }
        found |= bin << shift;
        keys = rest;
        n = left;
    }
    return found;
}

/* Queries of one part. */
static void pick(part_t queries, long H, long M, long K, const float *match, const float *weight,
                 const long *first, const long *stop, long *picks, float *work) {
    uint32_t *keys = (uint32_t *)work + M, *rest = keys + M;
    for (long t = queries.first; t < queries.first + queries.count; t++) {
        const long start = first[t], count = stop[t] - start;
        long *own = picks + t * K, made = 0;
        if (count <= K) {
            for (; made < count; made++) own[made] = start + made;
        } else {
            memset(work, 0, count * sizeof(float));
            for (long h = 0; h < H; h++) {
                const float w = weight[t * H + h], *line = match + (t * H + h) * M + start;
                for (long i = 0; i < count; i++) work[i] += w * (line[i] > 0.0f ? line[i] : 0.0f);
            }
            for (long i = 0; i < count; i++) keys[i] = ordered(work[i]);
            long equals = K;
            const uint32_t least = select_keys(count, keys, &equals, rest);
            for (long i = 0; made < K; i++) {
                const int is_equal = keys[i] == least && equals > 0;
                own[made] = start + i;
                made += keys[i] > least || is_equal;
                equals -= is_equal;
            }
        }
        for (; made < K; made++) own[made] = -1;
    }
}

/* picks [n, K]: columns, ascending, then -1. work: 3 M numbers of 32 bits for each of `parts`. */
void index_pick(long n, long H, long M, long K, long parts, const float *match, const float *weight,
                const long *first, const long *stop, long *picks, float *work) {
    AT_ONCE
    for (long p = 0; p < parts; p++)
        pick(part_of(p, parts, n), H, M, K, match, weight, first, stop, picks, work + p * 3 * M);
}
