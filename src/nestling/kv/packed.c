/* Products with packed codes (see pack.py), without unpacking them to memory: some hundred tokens at a time are turned
   into floats in the first-level cache and used by all queries there.

   rows: bytes, one row of `stride` bytes for each packed row, a token a byte. counts: blocks of 8, 4, 3, 2 and 1 bits,
   in that order, which is that of their coordinates. Built by kernels.py; the same functions in torch are in packed.py.
*/
#include <stdint.h>

#define TILE 256 /* tokens */

typedef struct { const uint8_t *row[2]; int shift[2], mask[2], up[2], parts; } Field;

/* Where the bits of coordinate c (0..7) of a block lie. */
static Field field_of(const uint8_t *rows, int64_t stride, const int64_t *counts, int width, int64_t block, int c) {
    int64_t fours = 8 * counts[0], twos = fours + 4 * counts[1], ones = twos + 2 * (counts[2] + counts[3]);
    Field f = {{0, 0}, {0, 0}, {0, 0}, {0, 0}, 1};
    switch (width) {
    case 8: f.row[0] = rows + (8 * block + c) * stride; f.mask[0] = 255; break;
    case 4: f.row[0] = rows + (fours + 4 * block + c % 4) * stride; f.shift[0] = c / 4 * 4; f.mask[0] = 15; break;
    case 3:
        f.row[0] = rows + (twos + 2 * block + c % 2) * stride; f.shift[0] = c / 2 * 2; f.mask[0] = 3; f.up[0] = 1;
        f.row[1] = rows + (ones + block) * stride; f.shift[1] = c; f.mask[1] = 1; f.parts = 2; break;
    case 2:
        f.row[0] = rows + (twos + 2 * (counts[2] + block) + c % 2) * stride; f.shift[0] = c / 2 * 2; f.mask[0] = 3;
        break;
    default: f.row[0] = rows + (ones + counts[2] + block) * stride; f.shift[0] = c; f.mask[0] = 1;
    }
    return f;
}

static void decode(const Field *f, int64_t start, int count, float *out) {
    const uint8_t *a = f->row[0] + start;
    const int shift = f->shift[0], mask = f->mask[0];
    if (f->parts == 1) {
        for (int t = 0; t < count; t++) out[t] = (float)((a[t] >> shift) & mask);
    } else {
        const uint8_t *b = f->row[1] + start;
        const int other = f->shift[1];
        for (int t = 0; t < count; t++) out[t] = (float)((((a[t] >> shift) & mask) << 1) | ((b[t] >> other) & 1));
    }
}

static const int WIDTH[5] = {8, 4, 3, 2, 1};

/* out[g][n][t] (+)= sum over c of query[g][n][c] * code[g][c][t] - shift[g][n] */
void nestling_score(const uint8_t *rows, int64_t stride, int64_t packed, const int64_t *counts, const float *query,
                    const float *shift, int64_t groups, int64_t queries, int64_t width, int64_t tokens, float *out,
                    int64_t out_stride, int add, int threads) {
    int64_t tiles = (tokens + TILE - 1) / TILE;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t job = 0; job < groups * tiles; job++) {
        int64_t g = job / tiles, start = job % tiles * TILE;
        int count = tokens - start < TILE ? (int)(tokens - start) : TILE;
        const uint8_t *own = rows + g * packed * stride;
        const float *q = query + g * queries * width;
        float *to = out + g * queries * out_stride + start, code[TILE];
        for (int64_t n = 0; n < queries; n++)
            for (int t = 0; t < count; t++)
                to[n * out_stride + t] = (add ? to[n * out_stride + t] : 0.0f) - shift[g * queries + n];
        int64_t place = 0;
        for (int w = 0; w < 5; w++)
            for (int64_t block = 0; block < counts[w]; block++)
                for (int c = 0; c < 8; c++, place++) {
                    Field f = field_of(own, stride, counts, WIDTH[w], block, c);
                    decode(&f, start, count, code);
                    for (int64_t n = 0; n < queries; n++) {
                        const float by = q[n * width + place];
                        float *line = to + n * out_stride;
                        for (int t = 0; t < count; t++) line[t] += by * code[t];
                    }
                }
    }
}

/* out[g][n][c] = sum over t of weight[g][n][t] * code[g][c][t] */
void nestling_weighted(const uint8_t *rows, int64_t stride, int64_t packed, const int64_t *counts, const float *weight,
                       int64_t weight_stride, int64_t groups, int64_t queries, int64_t width, int64_t tokens,
                       float *out, int threads) {
    int64_t blocks = counts[0] + counts[1] + counts[2] + counts[3] + counts[4];
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t job = 0; job < groups * blocks; job++) {
        int64_t g = job / blocks, block = job % blocks, w = 0;
        const uint8_t *own = rows + g * packed * stride;
        const float *by = weight + g * queries * weight_stride;
        float code[TILE], *to = out + g * queries * width + 8 * block;
        while (block >= counts[w]) block -= counts[w++];
        for (int c = 0; c < 8; c++) {
            Field f = field_of(own, stride, counts, WIDTH[w], block, c);
            for (int64_t n = 0; n < queries; n++) to[n * width + c] = 0.0f;
            for (int64_t start = 0; start < tokens; start += TILE) {
                int count = tokens - start < TILE ? (int)(tokens - start) : TILE;
                decode(&f, start, count, code);
                for (int64_t n = 0; n < queries; n++) {
                    const float *line = by + n * weight_stride + start;
                    float sum = 0.0f;
                    for (int t = 0; t < count; t++) sum += line[t] * code[t];
                    to[n * width + c] += sum;
                }
            }
        }
    }
}
