/* Rows parted among as many threads as PyTorch has: its own OpenMP's, since those that wait for their next piece
 * of work spin, and others would share the cores with them.
 *
 * Rows that do not meet are parted evenly. Where parts add to something each has its own sum, and `fixed_parts`
 * counts them by the number of rows alone: no bit depends on the number of threads.
 */
#ifndef THREADS_H
#define THREADS_H

#define LANES 16
#define LEAST 32768 /* numbers of a part: below, waking a thread costs more than it saves */
#define FEWEST 512  /* rows of a part that has sums of its own */
#define MOST_PARTS 8

/* One for all files of a library. */
__attribute__((weak)) int num_threads = 1;
__attribute__((weak)) void set_num_threads(long threads) { num_threads = (int)threads; }

/* The next loop's rounds run at once where `parts` is above 1. */
#define AT_ONCE _Pragma("omp parallel for num_threads(num_threads) schedule(static, 1) if(parts > 1)")

typedef struct { long first, count; } part_t;

static inline long at_most(long a, long b) { return a < b ? a : b; }
static inline long at_least_one(long a) { return a > 1 ? a : 1; }

static inline long even_parts(long R, long numbers_a_row) {
    return at_least_one(at_most(num_threads, R * numbers_a_row / LEAST));
}

static inline long fixed_parts(long R) { return at_least_one(at_most(MOST_PARTS, R / FEWEST)); }

/* The p-th of `parts` parts of R rows: whole LANES, all alike but the last ones. */
static inline part_t part_of(long p, long parts, long R) {
    const long size = ((R + parts - 1) / parts + LANES - 1) / LANES * LANES, first = at_most(p * size, R);
    return (part_t){first, at_most(size, R - first)};
}

#endif
