// What is done to each token's vector: normalising, rotating, choosing experts.

#pragma once

#include <algorithm>
#include <cmath>

#include "parallel.h"
#include "simd.h"

namespace gptoss {

constexpr int64_t SERIAL_VALUES = 1 << 14;  // fewer are not worth waking another thread

// out = x / rms(x) * weight, rows of c.
template <class T>
void rms_norm(const T* x, const float* weight, float eps, int64_t n, int64_t c, T* out, int threads) {
    parallel(n, n * c < SERIAL_VALUES ? 1 : threads, [&](int64_t row) {
        const T* from = x + row * c;
        Vec squares{};
        pieces(c, [&](int64_t i, int some) {
            Vec v = load_piece(from + i, some);
            squares += v * v;
        });
        float inverse = 1 / std::sqrt(sum(squares) / c + eps);
        pieces(c, [&](int64_t i, int some) {
            Vec scaled = load_piece(from + i, some) * inverse;
            store_piece(out + row * c + i, scaled * load_piece(weight + i, some), some);
        });
    });
}

// Rotates n rows of `heads` heads in place by the angles of their row; the pairs are the two halves of d.
template <class T>
void rotate(T* x, const float* cos, const float* sin, int64_t n, int64_t heads, int64_t d, int threads) {
    parallel(n, n * heads * d < SERIAL_VALUES ? 1 : threads, [&](int64_t row) {
        int64_t half = d / 2;
        for (int64_t head = 0; head < heads; head++) {
            T *first = x + (row * heads + head) * d, *second = first + half;
            pieces(half, [&](int64_t i, int some) {
                Vec a = load_piece(first + i, some), b = load_piece(second + i, some);
                Vec c = load_piece(cos + row * half + i, some), s = load_piece(sin + row * half + i, some);
                store_piece(first + i, a * c - b * s, some);
                store_piece(second + i, b * c + a * s, some);
            });
        }
    });
}

// The k largest of each row of logits (n, e), largest first, the earlier of equals first; and a softmax over them.
inline void top_k(const float* logits, int64_t n, int64_t e, int64_t k, int64_t* chosen, float* weights) {
    for (int64_t row = 0; row < n; row++, logits += e, chosen += k, weights += k) {
        for (int64_t j = 0; j < k; j++) {
            int64_t best = -1;
            for (int64_t i = 0; i < e; i++)
                if (std::find(chosen, chosen + j, i) == chosen + j && (best < 0 || logits[i] > logits[best])) best = i;
            chosen[j] = best;
            weights[j] = logits[best];
        }
        float top = weights[0], total = 0;
        for (int64_t j = 0; j < k; j++) total += weights[j] = std::exp(weights[j] - top);
        for (int64_t j = 0; j < k; j++) weights[j] /= total;
    }
}

// Where the largest of `count` values is, the first of equals.
inline int64_t largest_at(const float* values, int64_t count) {
    Vec best = splat(-INFINITY);
    Ints at{};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        Vec v = load(values + i);
        at = v > best ? (int)i - Ints{} : at;
        best = larger(v, best);
    }
    int64_t found = 0;
    for (int lane = 0; lane < LANES && i > 0; lane++) {
        int64_t candidate = at[lane] + lane;
        float v = values[candidate];
        if (v > values[found] || (v == values[found] && candidate < found)) found = candidate;
    }
    for (; i < count; i++)
        if (values[i] > values[found]) found = i;
    return found;
}

// Where the largest of each row's v values is.
inline void argmax(const float* x, int64_t n, int64_t v, int64_t* out, int threads) {
    constexpr int64_t PART = 1 << 14;
    int64_t parts = (v + PART - 1) / PART;
    auto found = scratch<int64_t>(n * parts);
    parallel(n * parts, threads, [&](int64_t item) {
        const float* row = x + item / parts * v;
        int64_t first = item % parts * PART;
        found[item] = first + largest_at(row + first, std::min(PART, v - first));
    });
    for (int64_t row = 0; row < n; row++) {
        int64_t* of_row = &found[row * parts];
        out[row] = *std::max_element(of_row, of_row + parts, [&](int64_t a, int64_t b) { return x[row * v + a] < x[row * v + b]; });
    }
}

}  // namespace gptoss
