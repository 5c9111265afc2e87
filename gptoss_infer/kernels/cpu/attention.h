// Attention of new tokens to keys and values that lie in pages, with sinks and a window.
//
// A query's keys are taken in chunks of CHUNK and splits of SPLIT positions, both at fixed places, and the splits are added
// in order: what a query yields depends neither on the batch nor on how splits are shared among threads.
//
// Legend: N new tokens, of B sequences, H query heads, K key/value heads, R = H / K query heads per kv head, D head size, P
// pages of a sequence. Computed in fp32.

#pragma once

#include <algorithm>
#include <cmath>

#include "linear.h"

namespace gptoss {

constexpr int64_t CHUNK = 64, SPLIT = 512;

inline float exp(float x) { return exp(splat(x))[0]; }

// What a kv head's R query heads of one token have gathered: the largest score, the sum of exp(score - largest) and the
// values weighted alike.
struct Gathered {
    int64_t heads, d;
    float *top, *total, *values;  // (R), (R), (R, D)
    static int64_t size(int64_t heads, int64_t d) { return heads * (2 + d); }
    Gathered(float* memory, int64_t heads, int64_t d)
        : heads(heads), d(d), top(memory), total(memory + heads), values(memory + 2 * heads) {}
    void clear() {
        for (int64_t r = 0; r < heads; r++) top[r] = -INFINITY, total[r] = 0;
        std::memset(values, 0, heads * d * sizeof(float));
    }
    void rescale(int64_t r, float new_top) {
        float factor = exp(top[r] - new_top);
        top[r] = new_top;
        total[r] *= factor;
        pieces(d, [&](int64_t i, int n) { store_piece(values + r * d + i, load_piece(values + r * d + i, n) * factor, n); });
    }
    void add(const Gathered& later) {
        for (int64_t r = 0; r < heads; r++) {
            float new_top = top[r] > later.top[r] ? top[r] : later.top[r];
            rescale(r, new_top);
            float factor = exp(later.top[r] - new_top);
            total[r] += later.total[r] * factor;
            pieces(d, [&](int64_t i, int n) {
                Vec sum = load_piece(values + r * d + i, n) + load_piece(later.values + r * d + i, n) * factor;
                store_piece(values + r * d + i, sum, n);
            });
        }
    }
};

// values[r] += sum over keys of weights[r][key] * v[key], for HEADS heads and WIDTH vectors of the head size.
template <int HEADS, int WIDTH, class T>
inline void add_some_values(const float* weights, const T* v, int64_t keys, float* values, int64_t d, int n) {
    Vec sums[HEADS][WIDTH];
    for (int r = 0; r < HEADS; r++)
        for (int i = 0; i < WIDTH; i++) sums[r][i] = load_piece(values + r * d + i * LANES, WIDTH == 1 ? n : LANES);
    for (int64_t key = 0; key < keys; key++) {
        Vec row[WIDTH];
        for (int i = 0; i < WIDTH; i++) row[i] = load_piece(v + key * d + i * LANES, WIDTH == 1 ? n : LANES);
        for (int r = 0; r < HEADS; r++)
            for (int i = 0; i < WIDTH; i++) sums[r][i] += row[i] * weights[r * CHUNK + key];
    }
    for (int r = 0; r < HEADS; r++)
        for (int i = 0; i < WIDTH; i++) store_piece(values + r * d + i * LANES, sums[r][i], WIDTH == 1 ? n : LANES);
}

template <int HEADS, class T>
inline void add_values(const float* weights, const T* v, int64_t keys, float* values, int64_t d) {
    constexpr int WIDTH = ACCS / 4;
    int64_t i = 0;
    for (; i + WIDTH * LANES <= d; i += WIDTH * LANES)
        add_some_values<HEADS, WIDTH>(weights, v + i, keys, values + i, d, LANES);
    pieces(d - i, [&](int64_t j, int n) {
        add_some_values<HEADS, 1>(weights, v + i + j, keys, values + i + j, d, n);
    });
}

template <class T>
struct Attention {
    const T *q, *k, *v;    // (N, H, D), (N, K, D) twice: the new tokens'
    const int64_t *sequences, *positions;  // (N): whose token it is, and its place there
    T *keys, *values;      // pools of pages (K, page_tokens, D)
    const int64_t *pages;  // (B, P): a sequence's pages, from its page `first_pages` on
    const int64_t *first_pages;  // (B)
    int64_t num_pages, page_tokens;
    const T* sinks;        // (H)
    int64_t n, h, kv, d, window;  // window 0: all are seen
    T* out;                // (N, H, D)
    int threads;

    // Where the slots of a position's page begin, from that position on, in a pool.
    int64_t offset(int64_t token, int64_t position, int64_t kv_head) const {
        int64_t sequence = sequences[token], nth = position / page_tokens - first_pages[sequence];
        return ((pages[sequence * num_pages + nth] * kv + kv_head) * page_tokens + position % page_tokens) * d;
    }

    int64_t first_seen(int64_t token) const {
        int64_t first = window > 0 ? positions[token] - window + 1 : 0;
        return first > 0 ? first : 0;
    }

    int64_t num_splits(int64_t token) const { return positions[token] / SPLIT - first_seen(token) / SPLIT + 1; }

    void run() const {
        for (int64_t token = 0; token < n; token++)
            for (int64_t head = 0; head < kv; head++) {
                int64_t to = offset(token, positions[token], head), from = (token * kv + head) * d;
                std::memcpy(keys + to, k + from, d * sizeof(T));
                std::memcpy(values + to, v + from, d * sizeof(T));
            }
        int64_t most = 1;
        for (int64_t token = 0; token < n; token++) most = std::max(most, num_splits(token));
        if (n * kv >= 4 * threads) most = 1;  // enough to share without cutting further
        int64_t heads = h / kv, size = Gathered::size(heads, d);
        auto memory = scratch<float>(most > 1 ? n * kv * most * size : 0);
        if (most > 1) parallel(n * kv * most, threads, [&](int64_t item) {
            int64_t token = item / most / kv, split = item % most;
            Gathered part(&memory[item * size], heads, d);
            if (split < num_splits(token)) gather(token, item / most % kv, first_seen(token) / SPLIT + split, part);
        });
        parallel(n * kv, threads, [&](int64_t item) {
            int64_t token = item / kv, head = item % kv, first = first_seen(token) / SPLIT;
            float* own = own_scratch<Use::RESULTS, float>(2 * size);
            Gathered all(most > 1 ? &memory[item * most * size] : own, heads, d);
            if (most == 1) gather(token, head, first, all);
            for (int64_t split = 1; split < num_splits(token); split++) {
                Gathered part(most > 1 ? &memory[(item * most + split) * size] : own + size, heads, d);
                if (most == 1) gather(token, head, first + split, part);
                all.add(part);
            }
            finish(token, head, all);
        });
    }

    // What the token's heads over one kv head gather from the positions of one split.
    void gather(int64_t token, int64_t kv_head, int64_t split, Gathered& to) const {
        int64_t heads = to.heads, seen = first_seen(token), last = positions[token];
        int64_t begin = seen > split * SPLIT ? seen : split * SPLIT;
        int64_t end = last + 1 < (split + 1) * SPLIT ? last + 1 : (split + 1) * SPLIT;
        Rows<T> queries(q + (token * h + kv_head * heads) * d, heads, d);
        float* scores = own_scratch<Use::SUMS, float>(heads * CHUNK);
        const float scale = 1 / std::sqrt((float)d);
        to.clear();
        for (int64_t at = begin; at < end;) {
            int64_t next = std::min((at / CHUNK + 1) * CHUNK, (at / page_tokens + 1) * page_tokens);
            int64_t count = std::min(next, end) - at;
            int64_t from = offset(token, at, kv_head);
            products(queries.get(), heads, Dense<T>{keys + from, d}, count, d, scores, CHUNK);
            for (int64_t r = 0; r < heads; r++) weigh(scores + r * CHUNK, count, scale, r, to);
            for (int64_t r = 0; r < heads; r += 4) {
                float *weights = scores + r * CHUNK, *sums = to.values + r * d;
                switch (std::min<int64_t>(heads - r, 4)) {
                    case 4: add_values<4>(weights, values + from, count, sums, d); break;
                    case 3: add_values<3>(weights, values + from, count, sums, d); break;
                    case 2: add_values<2>(weights, values + from, count, sums, d); break;
                    default: add_values<1>(weights, values + from, count, sums, d);
                }
            }
            at += count;
        }
    }

    // Turns scores into weights relative to the largest so far.
    void weigh(float* scores, int64_t count, float scale, int64_t r, Gathered& to) const {
        Vec top = splat(-INFINITY);
        for (int64_t i = count; i % LANES; i++) scores[i] = -INFINITY;
        for (int64_t i = 0; i < count; i += LANES) {
            Vec scaled = load(scores + i) * scale;
            store(scores + i, scaled);
            top = larger(top, scaled);
        }
        float new_top = largest(top);
        if (new_top > to.top[r]) to.rescale(r, new_top);
        Vec total{};
        for (int64_t i = 0; i < count; i += LANES) {
            Vec weight = exp(load(scores + i) - to.top[r]);
            store(scores + i, weight);
            total += weight;
        }
        to.total[r] += gptoss::sum(total);
    }

    void finish(int64_t token, int64_t kv_head, Gathered& all) const {
        for (int64_t r = 0; r < all.heads; r++) {
            int64_t head = kv_head * all.heads + r;
            float sink = to_float(sinks[head]), new_top = all.top[r] > sink ? all.top[r] : sink;
            all.rescale(r, new_top);
            float factor = 1 / (all.total[r] + exp(sink - new_top));
            pieces(d, [&](int64_t i, int n) {
                store_piece(out + (token * h + head) * d + i, load_piece(all.values + r * d + i, n) * factor, n);
            });
        }
    }
};

}  // namespace gptoss
