/* Products of some tens of rows with a matrix: rows lie side by side in the lanes of vectors, fp32.
 *
 * R rows, at most SIDE of them, P = R rounded up to whole vectors. `Lanes` [width, P] hold channel c of row r
 * at c P + r; rows beyond R are zero. A sum goes over the channels in order, one after the other: a row's
 * result depends on nothing but the row, and no sum over lanes is needed, which is why these products beat those
 * of products.h where a matrix meets many rows and lies in a cache.
 */
#include "products.h"

#define SIDE 32 /* rows side by side */
#define WIDE 8  /* lines of the matrix that meet the rows at once */
#define MOST_OUTS 256 /* results of a row that wait to be laid as rows again */
#define LINES(outs) _Pragma("GCC unroll 8") for (int o = 0; o < (outs); o++)

INLINE long lanes_of(long R) { return (R + LANES - 1) / LANES * LANES; }

/* A square of LANES vectors is mirrored: four times, halves of the square are shuffled into each other. */
INLINE void mirror(vec *square) {
    _Pragma("GCC unroll 4") for (int turn = 0; turn < 4; turn++) {
        vec next[LANES];
        _Pragma("GCC unroll 8") for (int i = 0; i < LANES / 2; i++) {
            const vec a = square[i], b = square[i + LANES / 2];
            next[2 * i] =
                __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            next[2 * i + 1] =
                __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
        _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++) square[i] = next[i];
    }
}

/* lanes [width, P] from x [R, width] */
static void spread(long R, long width, const float *x, float *lanes) {
    const long P = lanes_of(R);
    for (long r = 0; r < P; r += LANES)
        for (long c = 0; c < width; c += LANES) {
            const long channels = width - c < LANES ? width - c : LANES;
            vec square[LANES];
            for (long i = 0; i < LANES; i++) {
                const float *from = x + (r + i) * width + c;
                if (r + i >= R) square[i] = (vec){0};
                else square[i] = channels == LANES ? *(const vec *)from : load(from, channels);
            }
            mirror(square);
            for (long i = 0; i < channels; i++) *(vec *)(lanes + (c + i) * P + r) = square[i];
        }
}

/* y [R, width] from lanes [width, P]; rows of y begin `stride` apart. */
static void collect(long R, long width, long stride, const float *lanes, float *y) {
    const long P = lanes_of(R);
    for (long r = 0; r < R; r += LANES)
        for (long c = 0; c < width; c += LANES) {
            const long channels = width - c < LANES ? width - c : LANES;
            vec square[LANES];
            for (long i = 0; i < LANES; i++)
                square[i] = i < channels ? *(const vec *)(lanes + (c + i) * P + r) : (vec){0};
            mirror(square);
            for (long i = 0; i < LANES && r + i < R; i++)
                memcpy(y + (r + i) * stride + c, square + i, channels * sizeof(float));
        }
}

/* y [outs, P] = w [outs, width] · x [width, P] of `vecs` vectors of rows; loops over both vanish. */
INLINE void strip(int outs, int vecs, long width, long P, const float *x, const float *w, float *y) {
    vec sum[WIDE][SIDE / LANES];
    LINES(outs) EACH(vecs) sum[o][r] = (vec){0};
    for (long c = 0; c < width; c++) {
        vec here[SIDE / LANES];
        EACH(vecs) here[r] = *(const vec *)(x + c * P + r * LANES);
        if (c % LANES == 0) LINES(outs) __builtin_prefetch(w + (o + WIDE) * width + c, 0, 2);
        LINES(outs) {
            const vec weight = every(w[o * width + c]);
            EACH(vecs) sum[o][r] = fused(here[r], weight, sum[o][r]);
        }
    }
    LINES(outs) EACH(vecs) *(vec *)(y + o * P + r * LANES) = sum[o][r];
}

/* Lanes y [outs, P] = w [outs, width] · lanes x [width, P] of R rows. */
static void multiply(long R, long width, long outs, const float *x, const float *w, float *y) {
    const long P = lanes_of(R), strips = outs / WIDE, parts = even_parts(outs, 2 * width);
    AT_ONCE
    for (long p = 0; p < parts; p++)
        for (long o = p * strips / parts * WIDE; o < (p + 1) * strips / parts * WIDE; o += WIDE)
            if (P == LANES) strip(WIDE, 1, width, P, x, w + o * width, y + o * P);
            else strip(WIDE, 2, width, P, x, w + o * width, y + o * P);
    for (long o = strips * WIDE; o < outs; o++)
        if (P == LANES) strip(1, 1, width, P, x, w + o * width, y + o * P);
        else strip(1, 2, width, P, x, w + o * width, y + o * P);
}

/* A matrix [outs, width] and where its products with R rows go: y [R, outs]. */
typedef struct { const float *w; long outs; float *y; } product_of;

/* y = w · x of each matrix for x [R, width], any R. work: SIDE (width + MOST_OUTS) floats. */
static void project(long R, long width, const float *x, int count, const product_of *products, float *work) {
    float *lanes = work, *sums = work + SIDE * width;
    for (long r = 0; r < R; r += SIDE) {
        const long here = R - r < SIDE ? R - r : SIDE;
        spread(here, width, x + r * width, lanes);
        for (int i = 0; i < count; i++)
            for (long o = 0; o < products[i].outs; o += MOST_OUTS) {
                const product_of p = products[i];
                const long outs = p.outs - o < MOST_OUTS ? p.outs - o : MOST_OUTS;
                multiply(here, width, outs, lanes, p.w + o * width, sums);
                collect(here, outs, p.outs, sums, p.y + r * p.outs + o);
            }
    }
}
