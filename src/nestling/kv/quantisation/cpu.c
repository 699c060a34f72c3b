/* Products with packed codes (see pack.py), without unpacking them to memory.

   rows: bytes, one row of `stride` bytes for each packed row, a token a byte. counts: blocks of 8, 4, 3, 2 and 1 bits,
   in that order, which is that of their coordinates. Eight tokens are a vector: codes of a block of eight coordinates
   are unpacked into registers, and used there by up to four queries. The loops over coordinates and queries have
   constant bounds once they are inlined, and are unrolled. Built by kernels.py; packed.py has the same in torch.
*/
#include <stdint.h>

#define TILE 512 /* tokens of a job, or of a partial sum */
#define INLINE static inline __attribute__((always_inline))

static const int WIDTH[5] = {8, 4, 3, 2, 1};

typedef struct { const uint8_t *high, *low; int64_t stride; } Block; /* low: the last bits of codes of three */

static Block block_of(const uint8_t *rows, int64_t stride, const int64_t *counts, int kind, int64_t number) {
    int64_t fours = 8 * counts[0], twos = fours + 4 * counts[1], ones = twos + 2 * (counts[2] + counts[3]);
    switch (kind) {
    case 0: return (Block){rows + 8 * number * stride, 0, stride};
    case 1: return (Block){rows + (fours + 4 * number) * stride, 0, stride};
    case 2: return (Block){rows + (twos + 2 * number) * stride, rows + (ones + number) * stride, stride};
    case 3: return (Block){rows + (twos + 2 * (counts[2] + number)) * stride, 0, stride};
    default: return (Block){rows + (ones + counts[2] + number) * stride, 0, stride};
    }
}

/* Coordinate c of a block at a token. */
INLINE float code(const Block *b, const int width, const int c, int64_t t) {
    switch (width) {
    case 8: return (float)b->high[c * b->stride + t];
    case 4: return (float)((b->high[c % 4 * b->stride + t] >> (c / 4 * 4)) & 15);
    case 3: return (float)(((b->high[c % 2 * b->stride + t] >> (c / 2 * 2)) & 3) << 1 | ((b->low[t] >> c) & 1));
    case 2: return (float)((b->high[c % 2 * b->stride + t] >> (c / 2 * 2)) & 3);
    default: return (float)((b->high[t] >> c) & 1);
    }
}

INLINE void score(const Block *b, const int width, const int queries, const float *q, int64_t q_stride, int64_t start,
                  int count, float *out, int64_t out_stride) {
    float by[4][8];
    for (int n = 0; n < queries; n++)
        for (int c = 0; c < 8; c++) by[n][c] = q[n * q_stride + c];
#pragma GCC ivdep
    for (int t = 0; t < count; t++) {
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma GCC unroll 8
        for (int c = 0; c < 8; c++) {
            const float value = code(b, width, c, start + t);
#pragma GCC unroll 4
            for (int n = 0; n < queries; n++) sum[n] += by[n][c] * value;
        }
#pragma GCC unroll 4
        for (int n = 0; n < queries; n++) out[n * out_stride + t] += sum[n];
    }
}

INLINE void weigh(const Block *b, const int width, const int queries, const int first, const float *w,
                  int64_t w_stride, int64_t start, int count, float *out, int64_t out_stride) {
    float sum[4][2] = {{0.0f}};
    for (int t = 0; t < count; t++) {
#pragma GCC unroll 2
        for (int c = 0; c < 2; c++) {
            const float value = code(b, width, first + c, start + t);
#pragma GCC unroll 4
            for (int n = 0; n < queries; n++) sum[n][c] += w[n * w_stride + t] * value;
        }
    }
    for (int n = 0; n < queries; n++)
        for (int c = 0; c < 2; c++) out[n * out_stride + first + c] += sum[n][c];
}

#define FOR_QUERIES(DO, width)                                                                                         \
    switch (queries) {                                                                                                 \
    case 1: DO(width, 1); break;                                                                                       \
    case 2: DO(width, 2); break;                                                                                       \
    case 3: DO(width, 3); break;                                                                                       \
    default: DO(width, 4);                                                                                             \
    }
#define FOR_WIDTHS(DO)                                                                                                 \
    switch (width) {                                                                                                   \
    case 8: FOR_QUERIES(DO, 8); break;                                                                                 \
    case 4: FOR_QUERIES(DO, 4); break;                                                                                 \
    case 3: FOR_QUERIES(DO, 3); break;                                                                                 \
    case 2: FOR_QUERIES(DO, 2); break;                                                                                 \
    default: FOR_QUERIES(DO, 1);                                                                                       \
    }

static void score_block(const Block *b, int width, int queries, const float *q, int64_t q_stride, int64_t start,
                        int count, float *out, int64_t out_stride) {
#define SCORE(W, N) score(b, W, N, q, q_stride, start, count, out, out_stride)
    FOR_WIDTHS(SCORE)
}

static void weigh_block(const Block *b, int width, int queries, const float *w, int64_t w_stride, int64_t start,
                        int count, float *out, int64_t out_stride) {
#define WEIGH(W, N)                                                                                                    \
    do {                                                                                                               \
        weigh(b, W, N, 0, w, w_stride, start, count, out, out_stride);                                                 \
        weigh(b, W, N, 2, w, w_stride, start, count, out, out_stride);                                                 \
        weigh(b, W, N, 4, w, w_stride, start, count, out, out_stride);                                                 \
        weigh(b, W, N, 6, w, w_stride, start, count, out, out_stride);                                                 \
    } while (0)
    FOR_WIDTHS(WEIGH)
}

/* out[g][n][t] (+)= sum over c of query[g][n][c] * code[g][c][t] - shift[g][n] */
void nestling_score(const uint8_t *rows, int64_t stride, int64_t packed, const int64_t *counts, const float *query,
                    const float *shift, int64_t groups, int64_t queries, int64_t width, int64_t tokens, float *out,
                    int64_t out_stride, int add, int threads) {
    int64_t tiles = (tokens + TILE - 1) / TILE;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t job = 0; job < groups * tiles; job++) {
        int64_t g = job / tiles, start = job % tiles * TILE;
        int count = tokens - start < TILE ? (int)(tokens - start) : TILE;
        for (int64_t n = 0; n < queries; n++) {
            float *line = out + (g * queries + n) * out_stride + start;
            for (int t = 0; t < count; t++) line[t] = (add ? line[t] : 0.0f) - shift[g * queries + n];
        }
        for (int64_t n = 0; n < queries; n += 4) {
            int some = queries - n < 4 ? (int)(queries - n) : 4;
            const float *q = query + (g * queries + n) * width;
            float *to = out + (g * queries + n) * out_stride + start;
            for (int kind = 0; kind < 5; kind++)
                for (int64_t number = 0; number < counts[kind]; number++, q += 8) {
                    Block b = block_of(rows + g * packed * stride, stride, counts, kind, number);
                    score_block(&b, WIDTH[kind], some, q, width, start, count, to, out_stride);
                }
        }
    }
}

/* out[g][n][c] = sum over t of weight[g][n][t] * code[g][c][t]; out is zero before */
void nestling_weighted(const uint8_t *rows, int64_t stride, int64_t packed, const int64_t *counts, const float *weight,
                       int64_t weight_stride, int64_t groups, int64_t queries, int64_t width, int64_t tokens,
                       float *out, int threads) {
    int64_t blocks = counts[0] + counts[1] + counts[2] + counts[3] + counts[4];
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t job = 0; job < groups * blocks; job++) {
        int64_t g = job / blocks, number = job % blocks;
        int kind = 0;
        float *to = out + g * queries * width + 8 * number;
        while (number >= counts[kind]) number -= counts[kind++];
        Block b = block_of(rows + g * packed * stride, stride, counts, kind, number);
        for (int64_t n = 0; n < queries; n += 4) {
            int some = queries - n < 4 ? (int)(queries - n) : 4;
            for (int64_t start = 0; start < tokens; start += TILE) {
                int count = tokens - start < TILE ? (int)(tokens - start) : TILE;
                const float *w = weight + (g * queries + n) * weight_stride + start;
                weigh_block(&b, WIDTH[kind], some, w, weight_stride, start, count, to + n * width, width);
            }
        }
    }
}
