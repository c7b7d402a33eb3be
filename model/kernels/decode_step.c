/* One block of the model for one token a row on a CPU: everything between two states of the streams.
 *
 * R rows, N streams, D model width; H heads of C channels, P pairs of them turned, L their latent's width; G
 * groups of heads, O rank of a group's output; m tokens an entry (0: sliding window only); h index heads of c
 * channels; E experts of width I, K a row, S width of the shared expert. All fp32, contiguous; integers are
 * longs. decode_step.py fills the structures in, in this order.
 */
#include "decode_parts.h"
#include "row_lanes.h"

typedef struct {
    long R, N, D, rounds, H, C, P, L, G, O, window, m, h, c, topk, E, K, I, S;
    long ring, entry_ring, index_ring, per, A; /* places of the rings, entries a block, blocks a row */
} sizes_t;

typedef struct { float eps, hc_eps, limit, scaling, attention_scale, index_scale; } numbers_t;

typedef struct { const float *fn, *base, *scale, *norm; } connection_t;
typedef struct { const float *wkv, *wgate, *ape, *norm; } compressor_t;

typedef struct {
    connection_t hc_attn;
    const float *wq_a, *q_norm, *wq_b, *wkv, *kv_norm, *wo_a, *wo_b, *sink;
    compressor_t compressor;
    const float *index_wq_b, *index_weights;
    compressor_t index_compressor;
    connection_t hc_ffn;
    const float *gate, *bias;
    const long *tid2eid;
    const float *w1, *w2, *w3, *s1, *s2, *s3;
} weights_t;

typedef struct { float *pages, *values, *gates; } series_t;
typedef struct {
    const long *position, *tables;
    const float *rotation, *frequencies;
    float *window;
    series_t entries, index;
} state_t;

/* Working space, all of it one piece of memory. */
typedef struct {
    float *mixes, *pre, *post, *comb, *inverse, *input, *hidden, *output, *streams;
    float *latent, *query, *kv, *attended, *values[2], *gates[2], *index_query, *index_weight, *shares;
    float *scratch;
    long *picks, *chosen;
    void **places;
} work_t;

INLINE long most_of(long a, long b) { return a > b ? a : b; }
/* Channels of a token's raw projections: CSA, which alone has an indexer, projects two series. */
INLINE long series_of(const sizes_t *s, long width) { return s->h ? 2 * width : width; }

/* Floats that the products, attention and experts need, one after the other. */
static long scratch_of(const sizes_t *s) {
    const long entries = s->A * s->per, heads = s->H * s->C, low = s->G * s->O;
    long most = most_of(s->N * s->D + s->N * (s->N + 2), heads + low + s->D);
    most = most_of(most, most_of(most_of(s->D, s->L) + MOST_OUTS, 2 * (s->D + s->S)));
    long floats = SIDE * most + (s->R + 1) * s->E;
    floats = most_of(floats, s->H * (s->window + most_of(entries, s->topk)));
    floats = most_of(floats, (s->h + 2) * entries);
    const long pairs = s->R * s->K * (2 * s->I + s->D + 1) + 2 * s->E;
    return most_of(floats, most_of(pairs, s->R * s->H + 2 * s->C + 2 * s->c));
}

/* Lays the working space out; how many floats it takes. Without memory it only counts. */
static long lay_out(const sizes_t *s, float *memory, work_t *w) {
    const long pointer = sizeof(void *) / sizeof(float), R = s->R, N = s->N;
    const long runs = 2 + most_of(s->topk, s->A);
    const long places = most_of(2 * (s->H + runs), most_of(2 * s->h, 4 * R * s->K));
    const long values[2] = {s->m ? series_of(s, s->C) : 0, s->h ? series_of(s, s->c) : 0};
    long n = 0;
#define PLACE(name, count)                                                                                  \
    do {                                                                                                    \
        if (memory) w->name = (void *)(memory + n);                                                         \
        n += ((count) + LANES - 1) / LANES * LANES;                                                         \
    } while (0)
    PLACE(mixes, N * (N + 2) * R);
    PLACE(pre, N * R);
    PLACE(post, N * R);
    PLACE(comb, N * N * R);
    PLACE(inverse, R);
    PLACE(input, R * s->D);
    PLACE(hidden, R * s->D);
    PLACE(output, R * s->D);
    PLACE(streams, R * N * s->D);
    PLACE(latent, R * s->L);
    PLACE(query, R * s->H * s->C);
    PLACE(kv, R * s->C);
    PLACE(attended, R * s->H * s->C);
    for (int i = 0; i < 2; i++) {
        PLACE(values[i], R * values[i]);
        PLACE(gates[i], R * values[i]);
    }
    PLACE(index_query, R * s->h * s->c);
    PLACE(index_weight, R * s->h);
    PLACE(shares, R * s->K);
    PLACE(picks, R * s->topk * pointer);
    PLACE(places, places * pointer);
    PLACE(scratch, scratch_of(s));
    return n;
}

/* count[0] = floats of working space that a step of these sizes needs. */
void block_work(const sizes_t *s, long *count) { *count = lay_out(s, 0, 0); }

/* A layer's input from the streams, normed, into `hidden`; its post and comb. */
static void read_streams(const sizes_t *s, const numbers_t *f, const connection_t *c, const float *streams,
                         work_t *w) {
    hc_read_forward(s->R, s->N, s->D, 1, s->rounds, f->hc_eps, f->eps, streams, c->fn, c->base, c->scale,
                    w->mixes, w->input, w->pre, w->post, w->comb, w->inverse);
    norm_rotate_forward(s->R, 1, s->D, 0, f->eps, 1, w->input, c->norm, 0, w->hidden, w->scratch);
}

/* Latent, query, key and what compressor and indexer need of the new tokens. */
static void project_tokens(const sizes_t *s, const numbers_t *f, const weights_t *g, const state_t *t,
                           int picks, work_t *w) {
    const long main = series_of(s, s->C), index = series_of(s, s->c);
    int count = 0;
    product_of of[7];
    of[count++] = (product_of){g->wq_a, s->L, w->latent};
    of[count++] = (product_of){g->wkv, s->C, w->kv};
    if (s->m) {
        of[count++] = (product_of){g->compressor.wkv, main, w->values[0]};
        of[count++] = (product_of){g->compressor.wgate, main, w->gates[0]};
    }
    if (s->h) {
        of[count++] = (product_of){g->index_compressor.wkv, index, w->values[1]};
        of[count++] = (product_of){g->index_compressor.wgate, index, w->gates[1]};
    }
    if (picks) of[count++] = (product_of){g->index_weights, s->h, w->index_weight};
    project(s->R, s->D, w->hidden, count, of, w->scratch);
    norm_rotate_forward(s->R, 1, s->L, 0, f->eps, 1, w->latent, g->q_norm, 0, w->latent, w->scratch);
    const product_of queries[2] = {{g->wq_b, s->H * s->C, w->query},
                                   {g->index_wq_b, s->h * s->c, w->index_query}};
    project(s->R, s->L, w->latent, picks ? 2 : 1, queries, w->scratch);
    norm_rotate_forward(s->R, s->H, s->C, s->P, f->eps, 1, w->query, 0, t->rotation, w->query, w->scratch);
    norm_rotate_forward(s->R, 1, s->C, s->P, f->eps, 1, w->kv, g->kv_norm, t->rotation, w->kv, w->scratch);
}

/* The columns that the indexer picks, into `picks`. */
static void pick_entries(const sizes_t *s, const numbers_t *f, const state_t *t, work_t *w) {
    norm_rotate_forward(s->R, s->h, s->c, s->P, 0, 1, w->index_query, 0, t->rotation, w->index_query, 0);
    for (long i = 0; i < s->R * s->h; i++) w->index_weight[i] *= f->index_scale;
    pick(s->R, s->h, s->c, s->topk, s->m, s->per, s->A, s->A * s->per, w->index_query, w->index_weight,
         t->position, t->index.pages, t->tables, w->picks, w->scratch, w->places);
}

/* Heads to the model's width, group by group, then together: `output` from `attended`. */
static void project_heads(const sizes_t *s, const weights_t *g, work_t *w) {
    const long heads = s->H * s->C, in = heads / s->G, low = s->G * s->O;
    float *lanes = w->scratch, *ranks = lanes + SIDE * heads, *sums = ranks + SIDE * low;
    for (long r = 0; r < s->R; r += SIDE) {
        const long here = s->R - r < SIDE ? s->R - r : SIDE, P = lanes_of(here);
        spread(here, heads, w->attended + r * heads, lanes);
        for (long i = 0; i < s->G; i++)
            multiply(here, in, s->O, lanes + i * in * P, g->wo_a + i * s->O * in, ranks + i * s->O * P);
        multiply(here, low, s->D, ranks, g->wo_b, sums);
        collect(here, s->D, s->D, sums, w->output + r * s->D);
    }
}

static void attention(const sizes_t *s, const numbers_t *f, const weights_t *g, const state_t *t, int picks,
                      work_t *w) {
    project_tokens(s, f, g, t, picks, w);
    const compressor_t *own[2] = {&g->compressor, &g->index_compressor};
    const series_t *kept[2] = {&t->entries, &t->index};
    const long widths[2] = {s->C, s->c}, rings[2] = {s->entry_ring, s->index_ring};
    for (int i = 0; i < (s->m ? s->h ? 2 : 1 : 0); i++)
        compress(s->R, widths[i], s->m, series_of(s, widths[i]), s->P, rings[i], s->per, s->A, f->eps,
                 t->position, w->values[i], w->gates[i], own[i]->ape, own[i]->norm, t->frequencies, t->tables,
                 kept[i]->values, kept[i]->gates, kept[i]->pages, w->scratch);
    if (picks) pick_entries(s, f, t, w);
    const long entries = !s->m ? 0 : picks ? s->topk : s->A * s->per;
    attend(s->R, s->H, s->C, s->window, s->ring, s->m ? s->m : 1, s->per, s->A, picks ? s->topk : 0,
           s->window + entries, f->attention_scale, w->query, w->kv, t->window, t->position, t->entries.pages,
           t->tables, picks ? w->picks : 0, g->sink, w->attended, w->scratch, w->places);
    norm_rotate_forward(s->R, s->H, s->C, s->P, 0, -1, w->attended, 0, t->rotation, w->attended, 0);
    project_heads(s, g, w);
}

static void experts(const sizes_t *s, const numbers_t *f, const weights_t *g, const long *ids, work_t *w) {
    moe_route(s->R, s->D, s->E, s->K, f->scaling, w->hidden, g->gate, g->bias, g->tid2eid, ids, w->chosen,
              w->shares, w->scratch);
    moe_forward(s->R, s->D, s->E, s->K, s->I, s->S, f->limit, w->hidden, w->chosen, w->shares, g->w1, g->w2,
                g->w3, g->s1, g->s2, g->s3, w->output, w->scratch, w->places);
}

/* streams [R, N, D] -> out, and the state one token further. picks: does the indexer choose; ids [R] tokens;
 * chosen [R, K]: where the experts go; memory: what `block_work` says. */
void block_step(const sizes_t *s, const numbers_t *f, const weights_t *g, const state_t *t, long picks,
                const float *streams, const long *ids, float *out, long *chosen, float *memory) {
    work_t w;
    lay_out(s, memory, &w);
    w.chosen = chosen;
    read_streams(s, f, &g->hc_attn, streams, &w);
    attention(s, f, g, t, (int)picks, &w);
    hc_write_forward(s->R, s->N, s->D, streams, w.output, w.post, w.comb, w.streams);
    read_streams(s, f, &g->hc_ffn, w.streams, &w);
    experts(s, f, g, ids, &w);
    hc_write_forward(s->R, s->N, s->D, w.streams, w.output, w.post, w.comb, out);
}
