/* Products with packed codes (see packing.py), without unpacking them to memory.

   rows: bytes, one row of `stride` bytes for each packed row, a token a byte. counts: blocks of 8, 7, ... 1 bits, in
   that order, which is that of their coordinates. Eight tokens are a vector: codes of a block of eight coordinates are
   unpacked into registers, and used there by up to four queries. The loops over coordinates and queries have constant
   bounds once they are inlined, and are unrolled. Built by cpu.py; packed.py has the same in torch.
*/
#include <stdint.h>

#define TILE 512 /* tokens of a job, or of a partial sum */
#define KINDS 8  /* of blocks: their widths are 8 - kind */
#define INLINE static inline __attribute__((always_inline))

typedef struct { const uint8_t *field[4]; int64_t stride; } Block; /* its rows of 8, 4, 2 and 1 bits a coordinate */

static Block block_of(const uint8_t *rows, int64_t stride, const int64_t *counts, int kind, int64_t number) {
    Block block = {.stride = stride};
    for (int i = 0; i < 4; i++) {
        const int bits = 8 >> i;
        int64_t before = number, total = 0;
        for (int k = 0; k < KINDS; k++)
            if ((8 - k) & bits) {
                before += k < kind ? counts[k] : 0;
                total += counts[k];
            }
        block.field[i] = rows + bits * before * stride;
        rows += bits * total * stride;
    }
    return block;
}

/* Coordinate c of a block at a token. */
INLINE float code(const Block *b, const int width, const int c, int64_t t) {
    if (width == 8) return (float)b->field[0][c * b->stride + t];
    int value = 0;
    if (width & 4) value = (b->field[1][c % 4 * b->stride + t] >> (c / 4 * 4)) & 15;
    if (width & 2) value = value << 2 | ((b->field[2][c % 2 * b->stride + t] >> (c / 2 * 2)) & 3);
    if (width & 1) value = value << 1 | ((b->field[3][t] >> c) & 1);
    return (float)value;
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
    case 7: FOR_QUERIES(DO, 7); break;                                                                                 \
    case 6: FOR_QUERIES(DO, 6); break;                                                                                 \
    case 5: FOR_QUERIES(DO, 5); break;                                                                                 \
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
            for (int kind = 0; kind < KINDS; kind++)
                for (int64_t number = 0; number < counts[kind]; number++, q += 8) {
                    Block b = block_of(rows + g * packed * stride, stride, counts, kind, number);
                    score_block(&b, 8 - kind, some, q, width, start, count, to, out_stride);
                }
        }
    }
}

/* out[g][n][c] = sum over t of weight[g][n][t] * code[g][c][t]; out is zero before */
void nestling_weighted(const uint8_t *rows, int64_t stride, int64_t packed, const int64_t *counts, const float *weight,
                       int64_t weight_stride, int64_t groups, int64_t queries, int64_t width, int64_t tokens,
                       float *out, int threads) {
    int64_t blocks = 0;
    for (int kind = 0; kind < KINDS; kind++) blocks += counts[kind];
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
                weigh_block(&b, 8 - kind, some, w, weight_stride, start, count, to + n * width, width);
            }
        }
    }
}
