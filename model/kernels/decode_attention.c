/* One token a row on a CPU: compression, the indexer's choice and attention, straight on the decode state.
 *
 * B rows, H heads, C head width, m tokens an entry, K picks; all fp32, contiguous; integers are longs.
 * position [B] of the new tokens. Rings [B, ring, …]: a token's slot is its position mod ring. Entries lie in
 * pages [blocks, per, C]: entry c of row b is pages[tables[b, c / per], c % per], tables [B, A].
 */
#include <math.h>
#include "decode_parts.h"

#include "products.h"

/* Keys that lie one after the other. */
typedef struct { const float *keys; long count; } run;

/* The window's keys of a token: its ring up to the slots that are not seen. At most two runs. */
INLINE long window_runs(long position, long window, long ring, long C, const float *keys, run *runs) {
    const long count = position + 1 < window ? position + 1 : window;
    const long first = (position + 1 - count) % ring, ahead = ring - first;
    if (count == ring || count <= ahead) {
        runs[0] = (run){keys + (count == ring ? 0 : first) * C, count};
        return 1;
    }
    runs[0] = (run){keys, count - ahead};
    runs[1] = (run){keys + first * C, ahead};
    return 2;
}

/* The first `stop` entries, or those of picks [K] (up to the first -1). */
INLINE long entry_runs(long stop, long K, long per, long C, const float *pages, const long *table,
                       const long *picks, run *runs) {
    long n = 0;
    if (!picks)
        for (long c = 0; c < stop; c += per)
            runs[n++] = (run){pages + table[c / per] * per * C, stop - c < per ? stop - c : per};
    else
        for (long k = 0; k < K && picks[k] >= 0; k++)
            runs[n++] = (run){pages + (table[picks[k] / per] * per + picks[k] % per) * C, 1};
    return n;
}

/* out [B, H, C] of query [B, H, C]; new_keys [B, C] go into the ring keys [B, ring, C] first. pages and
 * picks [B, K] may be null. work: H (most keys) floats, places:
 * H + 2 (most runs + 2) pointers. */
void attend(long B, long H, long C, long window, long ring, long m, long per, long A, long K, long most,
            float scale, const float *query, const float *new_keys, float *keys, const long *position,
            const float *pages, const long *tables, const long *picks, const float *sink, float *out,
            float *work, void **places) {
    const float **heads = (const float **)places;
    float **logits = (float **)places + H;
    run *runs = (run *)(places + 2 * H);
    for (long b = 0; b < B; b++) {
        memcpy(keys + (b * ring + position[b] % ring) * C, new_keys + b * C, C * sizeof(float));
        long count = window_runs(position[b], window, ring, C, keys + b * ring * C, runs);
        if (pages)
            count += entry_runs((position[b] + 1) / m, K, per, C, pages, tables + b * A,
                                picks ? picks + b * K : 0, runs + count);
        for (long h = 0; h < H; h++) {
            heads[h] = query + (b * H + h) * C;
            logits[h] = work + h * most;
        }
        long n = 0;
        for (long i = 0; i < count; i++) {
            product(H, runs[i].count, C, heads, runs[i].keys, logits);
            for (long h = 0; h < H; h++) logits[h] += runs[i].count;
            n += runs[i].count;
        }
        float *sum = out + b * H * C;
        memset(sum, 0, H * C * sizeof(float));
        for (long h = 0; h < H; h++) soften(n, scale, sink[h], work + h * most);
        for (long i = 0, at = 0; i < count; at += runs[i++].count)
            for (long h = 0; h < H; h++)
                weigh(runs[i].count, C, work + h * most + at, runs[i].keys, sum + h * C);
    }
}

/* entry [C] = Σ over the window's slots of softmax(gates) · values, a softmax a channel. Series of 2 C
 * channels (CSA) pool the window before, if there is one, by their first half, their own by the second. */
INLINE void pool(long C, long m, long series, long ring, long position, const float *values,
                 const float *gates, float *entry, float *most, float *sum) {
    const long slots = series == C ? m : 2 * m, seen = position + 1 < slots ? position + 1 : slots;
    for (int pass = 0; pass < 2; pass++)
        for (long back = seen - 1; back >= 0; back--) {
            const long at = (position - back) % ring * series + (series != C && back < m ? C : 0);
            const float *v = values + at, *g = gates + at;
            const int is_first = back == seen - 1;
            if (!pass)
                for (long c = 0; c < C; c++) most[c] = is_first || g[c] > most[c] ? g[c] : most[c];
            else
                for (long c = 0; c < C; c++) {
                    const float p = exponential(g[c] - most[c]);
                    sum[c] = p + (is_first ? 0 : sum[c]);
                    entry[c] = p * v[c] + (is_first ? 0 : entry[c]);
                }
        }
    for (long c = 0; c < C; c++) entry[c] /= sum[c];
}

/* RMS norm times weight, then the last P pairs turned to `position`. */
INLINE void finish(long C, long P, float eps, const float *weight, const float *frequencies, long position,
                   float *entry) {
    float square[1], *result = square;
    const float *x = entry;
    product(1, 1, C, &x, entry, &result);
    const float scale = 1.0f / sqrtf(square[0] / (float)C + eps);
    for (long c = 0; c < C; c++) entry[c] *= scale * weight[c];
    for (long p = 0; p < P; p++) {
        float *pair = entry + C - 2 * (P - p);
        const float angle = (float)position * frequencies[p], c = cosf(angle), s = sinf(angle);
        const float a = pair[0], b = pair[1];
        pair[0] = a * c - b * s;
        pair[1] = a * s + b * c;
    }
}

/* Take in new_values, new_gates [B, series] (gates plus ape [m, series]); what closes goes to the pages. */
void compress(long B, long C, long m, long series, long P, long ring, long per, long A, float eps,
              const long *position, const float *new_values, const float *new_gates, const float *ape,
              const float *weight, const float *frequencies, const long *tables, float *values, float *gates,
              float *pages, float *work) {
    for (long b = 0; b < B; b++) {
        const long at = position[b], entry = at / m;
        float *v = values + b * ring * series, *g = gates + b * ring * series;
        memcpy(v + at % ring * series, new_values + b * series, series * sizeof(float));
        for (long c = 0; c < series; c++)
            g[at % ring * series + c] = new_gates[b * series + c] + ape[at % m * series + c];
        if ((at + 1) % m) continue;
        float *place = pages + (tables[b * A + entry / per] * per + entry % per) * C;
        pool(C, m, series, ring, at, v, g, place, work, work + C);
        finish(C, P, eps, weight, frequencies, at - (m - 1), place);
    }
}

/* The K-th largest of x [n], which is reordered. */
INLINE float kth_largest(long n, long K, float *x) {
    long low = 0, high = n - 1;
    while (low < high) {
        const float pivot = x[low + (high - low) / 2];
        long i = low, j = high;
        while (i <= j) {
            while (x[i] > pivot) i++;
            while (x[j] < pivot) j--;
            if (i > j) break;
            const float kept = x[i];
            x[i++] = x[j];
            x[j--] = kept;
        }
        if (K - 1 <= j) high = j;
        else if (K - 1 >= i) low = i;
        else break;
    }
    return x[K - 1];
}

/* picks [B, K]: the columns with the K highest Σ_h weight[h] relu(query[h] · key), ascending, of equals the
 * lowest; -1 where fewer are visible. work: (H + 2) M floats, M the most columns; places: 2 H pointers. */
void pick(long B, long H, long C, long K, long m, long per, long A, long M, const float *query,
          const float *weight, const long *position, const float *pages, const long *tables, long *picks,
          float *work, void **places) {
    const float **heads = (const float **)places;
    float **match = (float **)places + H, *scores = work + H * M, *sorted = scores + M;
    for (long b = 0; b < B; b++) {
        const long stop = (position[b] + 1) / m;
        long *mine = picks + b * K, n = 0;
        for (long c = 0; c < stop; c += per) {
            const long count = stop - c < per ? stop - c : per;
            for (long h = 0; h < H; h++) {
                heads[h] = query + (b * H + h) * C;
                match[h] = work + h * M + c;
            }
            product(H, count, C, heads, pages + tables[b * A + c / per] * per * C, match);
        }
        memset(scores, 0, stop * sizeof(float));
        for (long h = 0; h < H; h++)
            for (long c = 0; c < stop; c++)
                scores[c] += weight[b * H + h] * (work[h * M + c] > 0 ? work[h * M + c] : 0);
        memcpy(sorted, scores, stop * sizeof(float));
        const float least = stop > K ? kth_largest(stop, K, sorted) : -INFINITY;
        long ties = K;
        for (long c = 0; c < stop && stop > K; c++) ties -= scores[c] > least;
        for (long c = 0; c < stop && n < K; c++)
            if (scores[c] > least || stop <= K || (scores[c] == least && ties-- > 0)) mine[n++] = c;
        while (n < K) mine[n++] = -1;
    }
}
