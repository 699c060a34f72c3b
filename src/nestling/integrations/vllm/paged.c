/* Attention over vLLM's pages: coordinates of tokens that are not exact any more, and exact ones from pages of their own.

   A page is what a block holds of a KV head: keys with the tokens side by side, [rank][tokens], then values,
   [tokens][rank]. So logits are sums over coordinates of whole vectors of tokens, and outputs sums over tokens of whole
   vectors of coordinates. Softmax is taken in one pass over a request's tokens, with a running maximum and sum for each
   query (row), and one for coordinates and exact tokens together. Built and called by kernels.py.
*/
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define TILE 64 /* tokens that are read at once */
#define ROWS 48 /* queries of a job, as far as one token has fewer */
#define INLINE static inline __attribute__((always_inline))

typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));

typedef struct {
    void *data;
    int64_t block_stride, head_stride; /* in numbers */
    int64_t tokens, rank;              /* of a block; of keys as of values */
    const int32_t *table;              /* blocks of each request, a row of table_stride */
    int64_t table_stride;
    const int64_t *slots; /* where new tokens go */
} Pages;

typedef struct {
    int64_t heads, group, width; /* KV heads, queries to each, and what a head has of coordinates */
    int64_t half;                /* numbers have 16 bits (bf16) and not 32 */
    int64_t sinks, window, block;
    int64_t spans, span;         /* of positions behind the sinks, by which the mean of keys moves, and their length */
    float scale;
    const float *key_encode, *key_decode, *value_encode, *value_decode; /* [heads][rank][width]; none at full width */
    const float *key_bias, *value_bias;                                 /* [heads][width], or none */
    const float *key_drift;                                             /* [heads][spans][width], or none */
} Layer;

INLINE float number(const void *data, int64_t i, const int half) {
    if (!half) return ((const float *)data)[i];
    union { uint32_t u; float f; } bits = {(uint32_t)((const uint16_t *)data)[i] << 16};
    return bits.f;
}

INLINE void put(void *data, int64_t i, float value, const int half) {
    if (!half) {
        ((float *)data)[i] = value;
        return;
    }
    union { float f; uint32_t u; } bits = {value};
    const uint32_t rounded = (bits.u + 0x7fff + ((bits.u >> 16) & 1)) >> 16; /* to the nearest, ties to even */
    ((uint16_t *)data)[i] = value != value ? 0x7fc0 : (uint16_t)rounded;
}

INLINE const void *at(const void *data, int64_t i, const int half) { return (const char *)data + i * (half ? 2 : 4); }

static void read(const void *from, int64_t count, float *to, int half) {
    if (half)
        for (int64_t i = 0; i < count; i++) to[i] = number(from, i, 1);
    else
        memcpy(to, from, count * sizeof(float));
}

static float dot(const float *a, const float *b, int64_t count) {
    float sum = 0.0f;
    for (int64_t i = 0; i < count; i++) sum += a[i] * b[i];
    return sum;
}

/* e^x for x <= 0, to 2e-7 of it; nothing below e^-87 */
INLINE float exponential(float x) {
    const float n = __builtin_rintf(x * 1.44269504f), f = x - n * 0.693147181f;
    float p = 1.9875691e-4f;
    p = p * f + 1.3981999e-3f;
    p = p * f + 8.3334519e-3f;
    p = p * f + 4.1665796e-2f;
    p = p * f + 1.6666666e-1f;
    p = p * f + 0.5f;
    const float y = p * f * f + f + 1.0f;
    union { int32_t i; float f; } power = {((int32_t)(n < -126.0f ? -126.0f : n) + 127) << 23};
    return x < -87.0f ? 0.0f : y * power.f;
}

/* Store new tokens. */

static void store_one(const Pages *pages, const float *encode, const float *key, int64_t token, int64_t head,
                      int64_t width, int half, int value) {
    const int64_t slot = pages->slots[token], rank = pages->rank;
    if (slot < 0) return;
    const int64_t place = slot % pages->tokens;
    const int64_t page = slot / pages->tokens * pages->block_stride + head * pages->head_stride;
    const int64_t first = page + (value ? rank * pages->tokens + place * rank : place), step = value ? 1 : pages->tokens;
    for (int64_t c = 0; c < rank; c++)
        put(pages->data, first + c * step, encode ? dot(key, encode + (head * rank + c) * width, width) : key[c], half);
}

/* Keys and values [tokens][heads][width], whose tokens are so many numbers apart. exact: NULL where there are none. */
void nestling_store(const Layer *layer, const Pages *coded, const Pages *exact, const void *key, int64_t key_stride,
                    const void *value, int64_t value_stride, int64_t tokens, int threads) {
    const int half = (int)layer->half;
    const int64_t width = layer->width;
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens > 4)
    for (int64_t job = 0; job < tokens * layer->heads; job++) {
        const int64_t token = job / layer->heads, head = job % layer->heads;
        float row[width];
        for (int side = 0; side < 2; side++) {
            const int64_t first = token * (side ? value_stride : key_stride) + head * width;
            read(at(side ? value : key, first, half), width, row, half);
            store_one(coded, side ? layer->value_encode : layer->key_encode, row, token, head, width, half, side);
            if (exact) store_one(exact, NULL, row, token, head, width, half, side);
        }
    }
}

/* Read them. */

/* Of rows (up to four) with `rank` coordinates the products with keys [rank][stride], to tokens from t on. */
INLINE void score(const int rows, const float *query, int64_t rank, const float *keys, int64_t stride, int64_t t,
                  float *out) {
    v16 sum[4] = {{0.0f}, {0.0f}, {0.0f}, {0.0f}};
    for (int64_t c = 0; c < rank; c++) {
        const v16 key = *(const v16 *)(keys + c * stride + t);
#pragma GCC unroll 4
        for (int n = 0; n < rows; n++) sum[n] += query[n * rank + c] * key;
    }
#pragma GCC unroll 4
    for (int n = 0; n < rows; n++) *(v16 *)(out + n * TILE + t) = sum[n];
}

/* Of two vectors of tokens at once. */
INLINE void score_two(const int rows, const float *query, int64_t rank, const float *keys, int64_t stride, int64_t t,
                      float *out) {
    v16 sum[4][2] = {{{0.0f}}};
    for (int64_t c = 0; c < rank; c++) {
        const v16 first = *(const v16 *)(keys + c * stride + t), second = *(const v16 *)(keys + c * stride + t + 16);
#pragma GCC unroll 4
        for (int n = 0; n < rows; n++) {
            sum[n][0] += query[n * rank + c] * first;
            sum[n][1] += query[n * rank + c] * second;
        }
    }
#pragma GCC unroll 4
    for (int n = 0; n < rows; n++) {
        *(v16 *)(out + n * TILE + t) = sum[n][0];
        *(v16 *)(out + n * TILE + t + 16) = sum[n][1];
    }
}

/* Add the values [tokens][rank] of tokens first to last, by the weights of rows, to coordinates c and on of `out`. */
#define WEIGH(NAME, VECTOR)                                                                                            \
    INLINE void NAME(const int rows, const float *weight, const float *values, int64_t rank, int64_t first,            \
                     int64_t last, int64_t c, float *out) {                                                            \
        VECTOR sum[4];                                                                                                 \
        _Pragma("GCC unroll 4") for (int n = 0; n < rows; n++) sum[n] = *(VECTOR *)(out + n * rank + c);               \
        for (int64_t t = first; t < last; t++) {                                                                       \
            const VECTOR value = *(const VECTOR *)(values + t * rank + c);                                             \
            _Pragma("GCC unroll 4") for (int n = 0; n < rows; n++) sum[n] += weight[n * TILE + t] * value;             \
        }                                                                                                              \
        _Pragma("GCC unroll 4") for (int n = 0; n < rows; n++) *(VECTOR *)(out + n * rank + c) = sum[n];               \
    }
WEIGH(weigh_16, v16)
WEIGH(weigh_8, v8)

INLINE void score_rows(const int rows, const float *query, int64_t rank, const float *keys, int64_t stride,
                       int64_t count, float *out) {
    int64_t t = 0;
    for (; t + 32 <= count; t += 32) score_two(rows, query, rank, keys, stride, t, out);
    for (; t < count; t += 16) score(rows, query, rank, keys, stride, t, out);
}

INLINE void weigh_rows(const int rows, const float *weight, const float *values, int64_t rank, int64_t first,
                       int64_t last, float *out) {
    int64_t c = 0;
    for (; c + 16 <= rank; c += 16) weigh_16(rows, weight, values, rank, first, last, c, out);
    for (; c < rank; c += 8) weigh_8(rows, weight, values, rank, first, last, c, out);
}

#define FOR_ROWS(DO, left, ...)                                                                                        \
    switch (left) {                                                                                                    \
    case 1: DO(1, __VA_ARGS__); break;                                                                                 \
    case 2: DO(2, __VA_ARGS__); break;                                                                                 \
    case 3: DO(3, __VA_ARGS__); break;                                                                                 \
    default: DO(4, __VA_ARGS__);                                                                                       \
    }

/* What a job has of its rows. Tokens first[n] to last[n] of a run are those that row n sees. */
typedef struct {
    int64_t rows;
    int64_t *first, *last;
    float *most, *total, *coded_total;     /* the largest logit, the sum of weights, and that of coordinates */
    float *query, *coded_query, *bias;     /* [rows][width], [rows][rank]; what compressed tokens' logits have more */
    float *out, *coded_out;                /* the same, weighted sums */
    float *logits, *keys, *values;         /* [rows][TILE]; a tile, where its numbers have 16 bits */
} Job;

/* What row n has more in the logits of compressed tokens from a position on, and where that ends. */
static float bias_at(const Job *job, const Layer *layer, int64_t head, int64_t n, int64_t position, int64_t *end) {
    if (!layer->key_drift) return job->bias[n];
    int64_t number = (position - layer->sinks) / layer->span;
    if (number >= layer->spans - 1)
        number = layer->spans - 1;
    else if (layer->sinks + (number + 1) * layer->span < *end)
        *end = layer->sinks + (number + 1) * layer->span;
    const float *drift = layer->key_drift + (head * layer->spans + number) * layer->width;
    return job->bias[n] + dot(job->query + n * layer->width, drift, layer->width);
}

/* Weights of a tile's tokens in place of their logits, and sums so far to the same largest logit. */
static void weights(Job *job, const Layer *layer, int64_t rank, int64_t head, int64_t start, int64_t count, int coded) {
    for (int64_t n = 0; n < job->rows; n++) {
        float *line = job->logits + n * TILE, most = job->most[n], total = 0.0f;
        int64_t first = job->first[n] - start, last = job->last[n] - start;
        first = first < 0 ? 0 : first;
        last = last > count ? count : last;
        if (first >= last) {
            memset(line, 0, count * sizeof(float));
            continue;
        }
        for (int64_t t = first; t < last;) {
            int64_t end = start + last;
            const float more = coded ? bias_at(job, layer, head, n, start + t, &end) : 0.0f;
            for (; t < end - start; t++) {
                line[t] += more;
                most = line[t] > most ? line[t] : most;
            }
        }
        if (most > job->most[n]) {
            const float less = exponential(job->most[n] - most);
            job->most[n] = most;
            job->total[n] *= less;
            job->coded_total[n] *= less;
            for (int64_t d = 0; d < layer->width; d++) job->out[n * layer->width + d] *= less;
            if (job->coded_out != job->out)
                for (int64_t c = 0; c < rank; c++) job->coded_out[n * rank + c] *= less;
        }
        for (int64_t t = 0; t < first; t++) line[t] = 0.0f;
        for (int64_t t = first; t < last; t++) {
            line[t] = exponential(line[t] - most);
            total += line[t];
        }
        for (int64_t t = last; t < count; t++) line[t] = 0.0f;
        job->total[n] += total;
        if (coded) job->coded_total[n] += total;
    }
}

/* All tokens of a run, by tiles. exact: not by coordinates; coded_rank: of the layer's coordinates. */
static void attend(Job *job, const Layer *layer, const Pages *pages, const int32_t *table, int64_t head, int exact,
                   int64_t coded_rank) {
    int64_t first = job->first[0], last = job->last[0];
    for (int64_t n = 1; n < job->rows; n++) {
        first = job->first[n] < first ? job->first[n] : first;
        last = job->last[n] > last ? job->last[n] : last;
    }
    const int64_t rank = pages->rank, tokens = pages->tokens;
    const float *query = exact ? job->query : job->coded_query;
    float *out = exact ? job->out : job->coded_out;
    int64_t count;
    for (int64_t start = first / 16 * 16; start < last; start += count) {
        const int64_t inside = start % tokens, rest = tokens - inside, low = first > start ? first - start : 0;
        count = rest < TILE ? rest : TILE;
        count = last - start < count ? last - start : count;
        const int64_t padded = (count + 15) / 16 * 16; /* what is behind the last token is hidden */
        const int64_t page = table[start / tokens] * pages->block_stride + head * pages->head_stride;
        const int64_t key = page + inside, value = page + rank * tokens + inside * rank;
        const float *keys = (const float *)pages->data + key, *values = (const float *)pages->data + value;
        int64_t stride = tokens;
        if (layer->half) {
            for (int64_t c = 0; c < rank; c++)
                read(at(pages->data, key + c * tokens, 1), padded, job->keys + c * TILE, 1);
            read(at(pages->data, value, 1), count * rank, job->values, 1);
            keys = job->keys, values = job->values, stride = TILE;
        }
        for (int64_t n = 0; n < job->rows; n += 4)
            FOR_ROWS(score_rows, job->rows - n, query + n * rank, rank, keys, stride, padded, job->logits + n * TILE)
        weights(job, layer, coded_rank, head, start, count, !exact);
        for (int64_t n = 0; n < job->rows; n += 4)
            FOR_ROWS(weigh_rows, job->rows - n, job->logits + n * TILE, values, rank, low, count, out + n * rank)
    }
}

static int64_t coded_tokens(const Layer *layer, int64_t length) {
    const int64_t left = length - layer->sinks - layer->window;
    return left > 0 ? left / layer->block * layer->block : 0;
}

/* The queries of a job, with the scale, and in coordinates. */
static void open_job(Job *job, const Layer *layer, int64_t rank, int64_t head, const void *query, int64_t stride) {
    const int64_t width = layer->width;
    for (int64_t n = 0; n < job->rows; n++) {
        float *row = job->query + n * width;
        const int64_t place = n / layer->group * stride + (head * layer->group + n % layer->group) * width;
        read(at(query, place, (int)layer->half), width, row, (int)layer->half);
        for (int64_t d = 0; d < width; d++) row[d] *= layer->scale;
        job->most[n] = -1e30f;
        job->total[n] = job->coded_total[n] = 0.0f;
        job->bias[n] = layer->key_bias ? dot(row, layer->key_bias + head * width, width) : 0.0f;
        if (layer->key_decode)
            for (int64_t c = 0; c < rank; c++)
                job->coded_query[n * rank + c] = dot(row, layer->key_decode + (head * rank + c) * width, width);
    }
    memset(job->out, 0, job->rows * width * sizeof(float));
    memset(job->coded_out, 0, job->rows * rank * sizeof(float));
}

/* Its output, decoded. */
static void close_job(Job *job, const Layer *layer, int64_t rank, int64_t head, void *out, int64_t stride) {
    const int64_t width = layer->width;
    for (int64_t n = 0; n < job->rows; n++) {
        float *row = job->out + n * width;
        if (layer->value_decode)
            for (int64_t c = 0; c < rank; c++) {
                const float weight = job->coded_out[n * rank + c];
                const float *decode = layer->value_decode + (head * rank + c) * width;
                for (int64_t d = 0; d < width; d++) row[d] += weight * decode[d];
            }
        if (layer->value_bias)
            for (int64_t d = 0; d < width; d++) row[d] += job->coded_total[n] * layer->value_bias[head * width + d];
        const int64_t place = n / layer->group * stride + (head * layer->group + n % layer->group) * width;
        for (int64_t d = 0; d < width; d++) put(out, place + d, row[d] / job->total[n], (int)layer->half);
    }
}

/* Queries and output [tokens][heads * group][width], a token so many numbers after the other. Request i has the tokens
   starts[i] to starts[i + 1], which are the last of its lengths[i]. exact: NULL in a layer where nothing is compressed,
   all tokens of which are in `coded` as they are. */
void nestling_attend(const Layer *layer, const Pages *coded, const Pages *exact, const void *query,
                     int64_t query_stride, void *out, int64_t out_stride, const int32_t *starts,
                     const int32_t *lengths, int64_t requests, int threads) {
    const int64_t width = layer->width, rank = coded->rank, half = layer->half;
    const int64_t step = layer->group < ROWS ? ROWS / layer->group : 1, rows = step * layer->group;
    int64_t *tiles = malloc((requests + 1) * sizeof(int64_t));
    tiles[0] = 0;
    for (int64_t i = 0; i < requests; i++) tiles[i + 1] = tiles[i] + (starts[i + 1] - starts[i] + step - 1) / step;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int64_t tile = half ? 2 * TILE * width : 0;
        float *memory = malloc(sizeof(float) * (rows * (2 * width + 2 * rank + 4 + TILE) + tile));
        int64_t *limits = malloc(sizeof(int64_t) * 2 * rows);
        float *next = memory;
#define TAKE(COUNT) (next += (COUNT), next - (COUNT))
        Job job = {.first = limits, .last = limits + rows};
        job.query = TAKE(rows * width), job.out = TAKE(rows * width);
        job.coded_query = layer->key_decode ? TAKE(rows * rank) : job.query;
        job.coded_out = layer->value_decode ? TAKE(rows * rank) : job.out;
        job.most = TAKE(rows), job.total = TAKE(rows), job.coded_total = TAKE(rows), job.bias = TAKE(rows);
        job.logits = TAKE(rows * TILE), job.keys = TAKE(tile / 2), job.values = TAKE(tile / 2);
#pragma omp for schedule(dynamic)
        for (int64_t number = 0; number < tiles[requests] * layer->heads; number++) {
            const int64_t head = number % layer->heads, tile_number = number / layer->heads;
            int64_t i = 0;
            while (tiles[i + 1] <= tile_number) i++;
            const int64_t start = starts[i] + (tile_number - tiles[i]) * step, left = starts[i + 1] - start;
            const int64_t before = lengths[i] - (starts[i + 1] - start); /* tokens before the first query */
            job.rows = (left < step ? left : step) * layer->group;
            open_job(&job, layer, rank, head, at(query, start * query_stride, (int)half), query_stride);
            const int32_t *table = coded->table + i * coded->table_stride;
            for (int64_t n = 0; n < job.rows; n++) {
                const int64_t length = before + n / layer->group + 1;
                job.first[n] = exact ? layer->sinks : 0;
                job.last[n] = exact ? layer->sinks + coded_tokens(layer, length) : length;
            }
            attend(&job, layer, coded, table, head, 0, rank);
            if (exact) {
                table = exact->table + i * exact->table_stride;
                for (int64_t n = 0; n < job.rows; n++) {
                    const int64_t length = before + n / layer->group + 1;
                    job.first[n] = 0;
                    job.last[n] = length < layer->sinks ? length : layer->sinks;
                }
                attend(&job, layer, exact, table, head, 1, rank);
                for (int64_t n = 0; n < job.rows; n++) {
                    const int64_t length = before + n / layer->group + 1;
                    job.first[n] = layer->sinks + coded_tokens(layer, length);
                    job.last[n] = length;
                }
                attend(&job, layer, exact, table, head, 1, rank);
            }
            close_job(&job, layer, rank, head, (char *)out + start * out_stride * (half ? 2 : 4), out_stride);
        }
        free(memory);
        free(limits);
    }
    free(tiles);
}
