/* What a decoding step is made of, each described where it is defined; integers are longs. */

void hc_read_forward(long R, int n, long D, int is_whole, int rounds, float eps, float norm_eps,
                     const float *streams, const float *fn, const float *base, const float *scale,
                     float *mixes, float *input, float *pre, float *post, float *comb, float *inv);
void hc_write_forward(long R, int n, long D, const float *streams, const float *output, const float *post,
                      const float *comb, float *written);
void norm_rotate_forward(long n, long heads, long width, long pairs, float eps, float sign, const float *x,
                         const float *weight, const float *rotation, float *y, float *scale);
void attend(long B, long H, long C, long window, long ring, long m, long per, long A, long K, long most,
            float scale, const float *query, const float *new_keys, float *keys, const long *position,
            const float *pages, const long *tables, const long *picks, const float *sink, float *out,
            float *work, void **places);
void compress(long B, long C, long m, long series, long P, long ring, long per, long A, float eps,
              const long *position, const float *new_values, const float *new_gates, const float *ape,
              const float *weight, const float *frequencies, const long *tables, float *values, float *gates,
              float *pages, float *work);
void pick(long B, long H, long C, long K, long m, long per, long A, long M, const float *query,
          const float *weight, const long *position, const float *pages, const long *tables, long *picks,
          float *work, void **places);
void moe_route(long R, long D, long E, long K, float scaling, const float *hidden, const float *gate,
               const float *bias, const long *table, const long *ids, long *chosen, float *weight,
               float *work);
void moe_forward(long R, long D, long E, long K, long I, long S, float limit, const float *hidden,
                 const long *chosen, const float *weight, const float *w1, const float *w2, const float *w3,
                 const float *s1, const float *s2, const float *s3, float *out, float *work, void **places);
