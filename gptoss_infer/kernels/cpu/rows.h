// What is done to each token's vector: normalising, rotating, choosing experts.

#pragma once

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
template <class T>
void top_k(const T* logits, int64_t n, int64_t e, int64_t k, int64_t* chosen, float* weights) {
    for (int64_t row = 0; row < n; row++, chosen += k, weights += k) {
        float total = 0;
        for (int64_t j = 0; j < k; j++) {
            int64_t best = -1;
            float value = 0;
            for (int64_t i = 0; i < e; i++) {
                float candidate = to_float(logits[row * e + i]);
                bool taken = false;
                for (int64_t before = 0; before < j; before++) taken |= chosen[before] == i;
                if (!taken && (best < 0 || candidate > value)) best = i, value = candidate;
            }
            chosen[j] = best;
            weights[j] = value;
        }
        float top = weights[0];
        for (int64_t j = 0; j < k; j++) total += weights[j] = std::exp(weights[j] - top);
        for (int64_t j = 0; j < k; j++) weights[j] /= total;
    }
}

}  // namespace gptoss
